"""Training: the order of samples, the learning rate, and a run from data to checkpoint."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reference_model.files import InputError
from reference_model.model.checkpoint import load_checkpoint
from reference_model.training.sampler import ImageGroupedSampler
from reference_model.training.schedule import adamw, polynomial_decay
from reference_model.training.train import train

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


def test_shared_temperature_is_one_parameter(another, monkeypatch):
    held = {}

    def watched(objective, **options):
        held["model"], held["loss"] = objective.model, objective.loss
        held["optimiser"] = adamw(objective, **options)
        return held["optimiser"]

    monkeypatch.setattr("reference_model.training.learner.adamw", watched)
    config = another(share_temperature=True)
    model = replace(config.model, learn_aggregation_temperature=True, aggregation_temperature=0.3)
    train(replace(config, model=model))
    temperature = held["model"].guidance.extractor.aggregation.log_temperature
    assert held["loss"].contrastive.log_temperature is temperature
    assert sum(p is temperature for group in held["optimiser"].param_groups for p in group["params"]) == 1
    assert temperature.exp().item() == pytest.approx(0.3, rel=0.05) and temperature.exp().item() != 0.3


def test_shared_temperature_needs_one_to_share(another):
    with pytest.raises(
        InputError, match=r"share_temperature: .* set model.learn_aggregation_temperature=true"
    ):
        train(another(share_temperature=True))


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
        ({"learning_rate": float("nan")}, "learning_rate: must be > 0"),
        ({"contrastive_weight": -1.0}, "contrastive_weight: must be >= 0, got -1"),
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
    with pytest.raises(InputError, match=r"step \d+: loss is (nan|inf).*lower learning_rate"):
        train(another(learning_rate=1e30, steps=20))
