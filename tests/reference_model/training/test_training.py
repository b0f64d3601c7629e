"""Training: the order of samples, the learning rate, and a run from data to checkpoint."""

import json
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch.overrides import TorchFunctionMode

from reference_model.checkpoints.checkpoint import load_checkpoint
from reference_model.cli import main
from reference_model.data.config import DataConfig
from reference_model.data.sampler import ImageGroupedSampler
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.metris import METRIS
from reference_model.training import distributed as scale
from reference_model.training import journal, state
from reference_model.training.config import TrainConfig
from reference_model.training.learner import Learner
from reference_model.training.run import Run
from reference_model.training.schedule import adamw, polynomial_decay
from reference_model.training.train import train
from tests.support.options import replace

images = st.lists(st.integers(0, 6), min_size=1, max_size=40)


@given(images, st.integers(1, 9), st.integers(1, 4), st.integers(0, 3))
def test_sampler_gives_each_record_at_most_once_in_full_batches(image_ids, batch_size, per_image, epoch):
    sampler = ImageGroupedSampler(image_ids, batch_size, per_image=per_image, seed=5)
    sampler.epoch = epoch
    batches = list(sampler)
    seen = [i for batch in batches for i in batch]
    assert len(batches) == len(sampler)
    assert len(set(seen)) == len(seen)
    assert len(image_ids) - len(seen) < batch_size
    if len(image_ids) >= batch_size:
        assert all(len(batch) == batch_size for batch in batches)


@given(
    images,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_sampler_order_does_not_depend_on_processes(image_ids, piece, world, accumulate, per_image, done):
    batch = piece * world * accumulate
    assume(len(image_ids) >= batch)
    options = {"per_image": per_image, "seed": 5}
    alone = ImageGroupedSampler(image_ids, batch, **options)
    done = min(done, alone.steps - 1)
    ranks = [
        ImageGroupedSampler(image_ids, batch, **options, rank=rank, world=world, accumulate=accumulate)
        for rank in range(world)
    ]
    for sampler in ranks:
        for _ in range(done):
            sampler.advance()
    taken = [list(sampler) for sampler in ranks]
    assert all(len(pieces) == (alone.steps - done) * accumulate for pieces in taken)
    assert all(len(piece_) == piece for pieces in taken for piece_ in pieces)
    # m · world + rank: the pieces of the processes in turn are the batches of one process.
    in_turn = [i for pieces in zip(*taken, strict=True) for piece_ in pieces for i in piece_]
    assert in_turn == [i for step in list(alone)[done:] for i in step]


def test_sampler_goes_on_where_it_was_in_the_middle_of_an_epoch():
    whole = ImageGroupedSampler(range(50), 8, seed=1)
    first, second = list(whole), (setattr(whole, "epoch", 1), list(whole))[1]
    sampler, ends = ImageGroupedSampler(range(50), 8, seed=1), []
    for _ in range(4):
        ends.append(sampler.advance())
    assert (sampler.epoch, sampler.position) == (0, 32) and list(sampler) == first[4:]
    for _ in range(2):
        ends.append(sampler.advance())
    assert ends == [False] * 5 + [True]
    assert (sampler.epoch, sampler.position) == (1, 0) and list(sampler) == second


def test_sampler_refuses_a_batch_that_cannot_be_shared():
    with pytest.raises(InputError, match=r"16 sentences cannot be cut into 3 processes x 2 .* multiple of 6"):
        ImageGroupedSampler(range(50), 16, world=3, accumulate=2)
    with pytest.raises(InputError, match=r"batch_size: is 16, but there are 9 sentences"):
        ImageGroupedSampler(range(9), 16, world=2)


@given(images, st.integers(1, 3))
def test_sampler_puts_sentences_of_an_image_side_by_side(image_ids, per_image):
    (order,) = ImageGroupedSampler(image_ids, len(image_ids), per_image=per_image)
    runs = 1 + sum(image_ids[a] != image_ids[b] for a, b in pairwise(order))
    groups = sum(-(-image_ids.count(i) // per_image) for i in set(image_ids))
    assert runs <= groups


def test_sampler_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = ImageGroupedSampler(range(50), 5, seed=seed)
        sampler.epoch = epoch
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_learning_rate_falls_by_the_power_to_zero_after_a_linear_rise():
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimiser = torch.optim.SGD([parameter], lr=2.0)
    schedule = polynomial_decay(optimiser, steps=100, power=0.9, warmup_steps=4)
    rates = []
    for _ in range(101):
        rates.append(schedule.get_last_lr()[0])
        optimiser.step()
        schedule.step()
    expected = [2.0 * min(1, (t + 1) / 5) * (1 - t / 100) ** 0.9 for t in range(101)]
    torch.testing.assert_close(torch.tensor(rates), torch.tensor(expected))


def test_optimiser_decays_matrices_only():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimiser = adamw(module, learning_rate=0.1, weight_decay=0.5)
    before = [p.clone() for p in module.parameters()]
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    changed = [not torch.equal(old, new) for old, new in zip(before, module.parameters())]
    assert changed == [True, False, False, False]


def test_run_gives_a_checkpoint_and_a_log(run, run_config):
    checkpoint = load_checkpoint(run)
    assert checkpoint.config.image_size == run_config.model.image_size
    assert checkpoint.config.vocab_size == len(checkpoint.tokenizer)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert entries[-1]["step"] == run_config.steps and 0 <= entries[-1]["val"]["mIoU"] <= 1


def test_same_seed_gives_the_same_weights(run, another):
    again, other = train(another()), train(another(seed=1, out=another().out.parent / "other"))
    first = load_checkpoint(run).model.state_dict()
    assert all(first[name].equal(t) for name, t in load_checkpoint(again).model.state_dict().items())
    assert any(not first[name].equal(t) for name, t in load_checkpoint(other).model.state_dict().items())


def test_cache_changes_no_weight(run, another):
    cached = load_checkpoint(train(another(cache=True))).model.state_dict()
    assert all(cached[name].equal(t) for name, t in load_checkpoint(run).model.state_dict().items())


def test_training_lowers_the_loss(another):
    config = another(steps=40, learning_rate=3e-3)
    entries = [json.loads(line) for line in (train(config) / "log.jsonl").read_text().splitlines()]
    totals = [entry["total"] for entry in entries if "total" in entry]
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 0}, "batch_size: must be > 0, got 0"),
        ({"steps": -3}, "steps: must be > 0, got -3"),
        ({"learning_rate": float("nan")}, "optim.learning_rate: must be > 0"),
        ({"contrastive_weight": -1.0}, "loss.contrastive_weight: must be >= 0"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(another, changes, says):
    config = another(**changes)
    with pytest.raises(InputError, match=says):
        train(config)
    assert not config.out.exists()


def test_finished_run_is_not_overwritten(run, run_config):
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds the weights of a run already"):
        train(run_config)
    assert (run / "model.safetensors").read_bytes() == before


def test_loss_that_is_not_finite_stops_the_run(another):
    with pytest.raises(InputError, match=r"step \d+: loss is (nan|inf).*lower optim.learning_rate"):
        train(another(learning_rate=1e30, steps=20))


# ----------------------------------------------------------------------------- what each option of a run does


def weights_of(config):
    return load_checkpoint(train(config)).model.state_dict()


def same(found, expected):
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.fixture
def held(monkeypatch):
    """What a run trains with, to look at after it."""
    found = {}
    made = Learner.__init__

    def watched(learner, *args):
        made(learner, *args)
        found["learner"] = learner
        found["start"] = {name: p.detach().clone() for name, p in learner.model.state_dict().items()}

    monkeypatch.setattr(Learner, "__init__", watched)
    return found


@pytest.mark.parametrize("encoder", ["image_encoder", "text_encoder"])
def test_frozen_encoder_does_not_move_and_the_rest_does(another, held, encoder, small):
    """With batch norm, whose statistics must stay too, and dropout, which must be off."""
    options = {"image_encoder": "resnet10t", "image_encoder_options": {"out_indices": [1, 2, 3, 4]}}
    weights = weights_of(another(model=replace(small, **options), **{f"{encoder}_lr": 0.0}))
    moved = {name for name, tensor in held["start"].items() if not torch.equal(weights[name], tensor)}
    assert not any(name.startswith(f"{encoder}.") for name in moved)
    other = {"image_encoder": "text_encoder", "text_encoder": "image_encoder"}[encoder]
    assert any(name.startswith(f"{other}.") for name in moved)
    assert any(name.startswith("decoder.") for name in moved)
    assert ("image_encoder.backbone.bn1.running_mean" in moved) == (encoder == "text_encoder")
    frozen = getattr(held["learner"].model, encoder)
    assert held["learner"].objective.training and not any(part.training for part in frozen.modules())


def test_learning_rate_of_an_encoder_is_multiplied(another, held):
    train(another(image_encoder_lr=0.1, text_encoder_lr=0.5, learning_rate=1e-3))
    model, groups = held["learner"].model, held["learner"].optimiser.param_groups
    rate = {p: group["initial_lr"] for group in groups for p in group["params"]}
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    for module, expected in ((model.image_encoder, 1e-4), (model.text_encoder, 5e-4), (model.decoder, 1e-3)):
        for p in module.parameters():
            assert rate[p] == pytest.approx(expected)
            assert decay[p] == (0.01 if p.ndim >= 2 else 0.0)
    assert len(rate) == len(list(held["learner"].bare.parameters()))


def test_average_of_the_weights_is_what_is_kept(another, held, monkeypatch):
    seen, update = [], Learner.update

    def watched(learner, report):
        update(learner, report)
        seen.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})

    monkeypatch.setattr(Learner, "update", watched)
    kept = weights_of(another(ema_decay=0.7))
    expected = dict(seen[0])
    for later in seen[1:]:
        expected = {name: 0.7 * value + 0.3 * later[name] for name, value in expected.items()}
    for name, value in expected.items():
        torch.testing.assert_close(kept[name], value)
    assert any(not torch.equal(kept[name], value) for name, value in seen[-1].items())


def test_activations_that_are_computed_twice_change_no_weight(run, another, held):
    """Dropout included: the second time draws what the first did."""
    weights = weights_of(another(checkpoint_activations=True))
    expected = load_checkpoint(run).model.state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-6)
    layers = scale.layers(held["learner"].model)
    assert len(layers) >= 8 and all("forward" in vars(layer) for layer in layers)


def test_layers_with_batch_norm_are_not_computed_twice(small):
    options = {"image_encoder": "resnet10t", "image_encoder_options": {"out_indices": [1, 2, 3, 4]}}
    model = build_metris(replace(small, **options))
    scale.checkpoint_layers(model)
    held_back = [layer for layer in scale.layers(model) if "forward" not in vars(layer)]
    assert held_back and all(part in model.image_encoder.modules() for part in held_back)


def test_bf16_computes_in_bf16_and_keeps_float32(run, another, held):
    found = []
    config = another(precision="bf16")
    torch.nn.Linear.forward, forward = _noting(found), torch.nn.Linear.forward
    try:
        weights = weights_of(config)
    finally:
        torch.nn.Linear.forward = forward
    assert torch.bfloat16 in found
    assert all(p.dtype == torch.float32 for p in held["learner"].bare.parameters())
    expected = load_checkpoint(run).model.state_dict()
    assert not same(weights, expected)
    entry = json.loads((config.out / "log.jsonl").read_text().splitlines()[0])
    other = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert entry["total"] == pytest.approx(other["total"], rel=0.05)


def _noting(found):
    forward = torch.nn.Linear.forward

    def noting(module, x):
        out = forward(module, x)
        found.append(out.dtype)
        return out

    return noting


def test_precision_returns_to_float32_in_the_next_run(run, another):
    train(another(precision="bf16"))
    again = weights_of(another(out=another().out.parent / "again"))
    assert same(again, load_checkpoint(run).model.state_dict())


def test_fp16_needs_a_gpu(another):
    with pytest.raises(InputError, match="precision fp16: needs a GPU, the device is cpu"):
        train(another(precision="fp16", device="cpu"))


def test_compile_compiles_the_model_once(another, monkeypatch):
    calls = []
    monkeypatch.setattr(METRIS, "compile", lambda model: calls.append(model))
    train(another(compile=True))
    assert len(calls) == 1


@pytest.mark.slow
def test_compiled_run_learns_the_same(another):
    """Without dropout, of which compiled code draws other numbers."""
    model = another().model
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = replace(model, text_encoder_options=model.text_encoder_options | without)
    runs = [another(model=model, compile=on, out=another().out.parent / str(on)) for on in (False, True)]
    assert_learn_the_same(*runs)


def test_channels_last_is_a_layout_and_no_other_run(another, held):
    runs = [another(channels_last=on, out=another().out.parent / str(on)) for on in (False, True)]
    assert_learn_the_same(*runs)
    assert not all(p.is_contiguous() for p in held["learner"].model.parameters())
    train(another(channels_last=False))
    assert all(p.is_contiguous() for p in held["learner"].model.parameters())


def assert_learn_the_same(*configs):
    """By losses and gradients: where a gradient is all but zero, Adam moves by the sign of a rounding."""
    curves = []
    for config in configs:
        lines = (train(replace(config, log_every=1)) / "log.jsonl").read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if "total" in entry]
        curves.append(torch.tensor([(entry["total"], entry["gradient_norm"]) for entry in entries]))
    assert len(curves[0]) == len(curves[1]) == 4
    torch.testing.assert_close(*curves, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("split", ["test", "testA", "val_unseen", "train"])
def test_no_test_split_can_select_the_weights(split, capsys):
    assert main(["train", "--data.root", "x", "--val_split", split]) == 2
    assert "val_split" in capsys.readouterr().err
    assert main(["train", "--data.root", "x", "--train_split", "testB"]) == 2
    for name in ("train_split", "val_split"):
        if name.startswith(split):
            continue
        with pytest.raises(InputError, match=rf"{name}: must be \w+ or \w+_seen, got {split}"):
            train(TrainConfig(data=DataConfig(Path("x")), **{name: split}))


def poisoned(monkeypatch, steps):
    """Make the loss of some steps infinite."""
    gradients, count = Learner.gradients, []

    def watched(learner, step, batches):
        report = gradients(learner, step, batches)
        count.append(1)
        infinite = report.losses._replace(total=report.losses.total * float("inf"))
        return report._replace(losses=infinite) if len(count) in steps else report

    monkeypatch.setattr(Learner, "gradients", watched)


def test_loss_that_is_not_finite_dumps_its_sentences(another, monkeypatch):
    poisoned(monkeypatch, {3})
    config = another()
    with pytest.raises(
        InputError, match=r"step 3: loss is inf on sentences \[\d+, .*nonfinite-step-00000003"
    ):
        train(config)
    dumped = json.loads((config.out / "nonfinite-step-00000003.json").read_text())
    assert dumped["step"] == 3 and len(dumped["sentences"]) == 4
    assert {"sent_id", "image_id", "expression"} <= dumped["sentences"][0].keys()


def test_steps_wait_for_the_device_only_where_a_line_is_logged(another, monkeypatch):
    """Whatever brings a number of the device to Python waits for all that the device has to do."""
    reading = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__"}
    reads, gradients, steps = [], Learner.gradients, []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            # Whole numbers here are counts and masks of the data, which are on the CPU in any case.
            if getattr(func, "__name__", "") in reading and args[0].is_floating_point() and steps:
                reads.append(steps[-1])
            return func(*args, **kwargs or {})

    def watched(learner, step, batches):
        steps.append(step)
        return gradients(learner, step, batches)

    monkeypatch.setattr(Learner, "gradients", watched)
    monkeypatch.setattr(Run, "evaluate", lambda run, log: None)
    monkeypatch.setattr(Run, "finish", lambda run: run.out)
    with Watch():
        train(another(steps=7, log_every=3, save_every=0))
    assert steps == [1, 2, 3, 4, 5, 6, 7] and set(reads) == {3, 6, 7}


def test_step_that_is_not_finite_changes_no_weight_though_it_is_seen_later(another, monkeypatch):
    poisoned(monkeypatch, {2})
    weights, update = [], Learner.update

    def watched(learner, report):
        update(learner, report)
        weights.append([p.detach().clone() for p in learner.parameters])

    monkeypatch.setattr(Learner, "update", watched)
    with pytest.raises(InputError, match="step 2: loss is inf"):
        train(another(steps=4, log_every=3))
    assert len(weights) == 3, "the next line of the log is where it is seen"
    assert all(a.equal(b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(a.equal(b) for a, b in zip(weights[1], weights[2], strict=True))


def test_loss_that_is_not_finite_is_skipped_up_to_the_limit(another, monkeypatch, held):
    undone, undo = [], Learner._undo
    monkeypatch.setattr(Learner, "_undo", lambda learner: (undone.append(1), undo(learner)))
    poisoned(monkeypatch, {2, 3})
    config = another(skip_nonfinite=2, steps=5)
    train(config)
    assert len(undone) == 2 and len(list(config.out.glob("nonfinite-step-*.json"))) == 2
    poisoned(monkeypatch, {2, 3})
    with pytest.raises(InputError, match=r"step 3: .* after 1 steps left out \(skip_nonfinite\)"):
        train(another(skip_nonfinite=1, out=config.out.parent / "other"))


def test_step_that_is_left_out_leaves_no_trace_in_batch_norm(another, small, monkeypatch):
    """The forward pass has written its statistics by then."""
    resnet = {"channels": [8, 12, 16, 24], "stem_width": 8, "output_stride": 16, "out_indices": [1, 2, 3, 4]}
    config = another(
        skip_nonfinite=1,
        steps=3,
        model=replace(small, image_encoder="resnet10t", image_encoder_options=resnet),
    )
    gradients, steps, norms = Learner.gradients, [], []

    def watched(learner, step, batches):
        steps.append(1)
        norms[:] = [part for part in learner.model.modules() if isinstance(part, torch.nn.BatchNorm2d)]
        if len(steps) != 2:
            return gradients(learner, step, batches)
        hook = norms[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] * float("nan"),))
        report = gradients(learner, step, batches)
        hook.remove()
        assert not norms[0].running_mean.isfinite().any()
        return report

    monkeypatch.setattr(Learner, "gradients", watched)
    train(config)
    assert len(steps) == 3 and all(norm.running_mean.isfinite().all() for norm in norms)
    assert norms[0].num_batches_tracked == 2


def test_fp16_goes_on_after_a_step_that_was_left_out(another, monkeypatch):
    """On the CPU by hand: accelerate gives a loss scale to GPUs alone."""
    config = another(skip_nonfinite=1, steps=3)
    start, scales = scale.start_processes, []

    def with_a_scale(config):
        accelerator = start(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.autocast = nullcontext
        return accelerator

    monkeypatch.setattr(scale, "start_processes", with_a_scale)
    undo = Learner._undo
    monkeypatch.setattr(
        Learner,
        "_undo",
        lambda self: (undo(self), scales.append(self.accelerator.scaler.get_scale())),
    )
    poisoned(monkeypatch, {2})
    train(config)
    assert scales == [1024.0]


def test_dry_run_builds_everything_and_writes_nothing(another, capsys):
    config = another(dry_run=True, json=True, steps=400)
    train(config)
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 400 and found["memory_MiB"] > 0 and found["state_MiB"] >= 0
    whole = 400 * found["seconds_a_step"] + found["evaluations"] * found["seconds_an_evaluation"]
    assert found["hours"] == pytest.approx(whole / 3600, abs=0.01)
    assert not config.out.exists()


def test_dry_run_leaves_a_finished_run_as_it_is(run, run_config, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    train(replace(run_config, dry_run=True))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_tracker_gets_what_the_log_does(another):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = another(tracker="tensorboard")
    train(config)
    events = EventAccumulator(str(config.out / "metris")).Reload()
    logged = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    for name, value in {**logged[0], **{f"val/{key}": x for key, x in logged[1]["val"].items()}}.items():
        if name not in ("step", "seconds"):
            (point,) = events.Scalars(name)
            assert (point.step, point.value) == (logged[0]["step"], pytest.approx(value))


def test_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(another):
    """With a finite loss: an overflow on the way back alone."""
    config = another(save_every=1)
    steps, clip = [], scale.clip_gradients

    def spoilt(parameters, most):
        steps.append(1)
        if len(steps) == 3:
            parameters[0].grad.fill_(float("nan"))
        return clip(parameters, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "clip_gradients", spoilt)
        with pytest.raises(InputError, match=r"step 3: gradient norm is nan on sentences .*another --out"):
            train(config)
    newest = state.load_state(state.newest_state(config.out))
    assert newest.facts["step"] == 2
    assert all(x.isfinite().all() for x in newest.tensors.values() if x.is_floating_point())


def test_learning_rate_that_is_told_is_the_one_that_was_given(another):
    run = train(another(image_encoder_lr=0.1, poly_power=0.0))
    assert json.loads((run / "log.jsonl").read_text().splitlines()[0])["learning_rate"] == 1e-3


def test_batch_norm_shared_by_gpus_keeps_its_activation():
    """timm's layers with both in one: what torch makes of them has the norm alone."""
    model = torch.nn.Sequential(BatchNormAct2d(4))
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"))
    scale.share_batch_norm(model, accelerator)
    (shared,) = [part for part in model.modules() if isinstance(part, torch.nn.SyncBatchNorm)]
    shared.eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(shared(x), BatchNormAct2d(4).eval()(x))
    assert (shared(x) >= 0).all()


def test_tracker_that_is_not_installed_is_refused(another, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tracker trackio: is not installed; pip install trackio"):
        train(another(tracker="trackio"))


def test_log_says_what_a_person_wants_to_see(run):
    entry = json.loads((run / "log.jsonl").read_text().splitlines()[0])
    assert entry["images_per_second"] > 0 and entry["memory_MiB"] > 50


def test_log_tells_the_share_of_time_that_was_spent_waiting_for_data(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now[0])

    def passing(seconds):
        now[0] += seconds

    def loader():
        for _ in range(4):
            passing(1.0)
            yield "batch"

    meter = journal.Meter(torch.device("cpu"))
    for _ in meter.waiting(loader()):
        passing(3.0)
        meter.count(6)
    found = meter.read()
    assert found["data_wait"] == 0.25 and found["step_seconds"] == 4.0 and found["images_per_second"] == 1.5
    passing(8.0)
    meter.count(2)
    assert meter.read()["data_wait"] == 0.0
