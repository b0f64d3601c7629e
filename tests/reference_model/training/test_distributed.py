"""Two processes of half a batch do what one does with all of it; FSDP2 too; runs may change between them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from reference_model.checkpoints.checkpoint import load_checkpoint, load_weights
from reference_model.files import InputError
from reference_model.training import distributed as scale
from reference_model.training import state
from reference_model.training import train as loop
from reference_model.training.config import TrainConfig
from reference_model.training.learner import Learner, StepReport
from reference_model.training.train import train
from tests.reference_model.training.test_resume import in_child
from tests.support.options import replace

STEPS = 20
# 1.2e-7 · about fifty roundings of a step, that twenty steps of Adam carry on.
LOSS = 1e-5
# Two processes of FSDP2 on gloo have lost their connection now and then, why was not found; never again since
# tests run a backward pass before they fork. A run that ends so is tried once more; wrong results are not.
RESETS = pytest.mark.flaky(reruns=1, only_rerun="a process ended early")


@pytest.fixture(scope="module")
def plain(run_config) -> TrainConfig:
    """No dropout and no batch norm, of which each process would have its own; everything else, on."""
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options = {**run_config.model.text_encoder_options, **without}
    return replace(
        run_config,
        model=replace(run_config.model, text_encoder_options=options, no_target=True),
        steps=STEPS,
        batch_size=16,
        clip_norm=0.5,
        contrastive_weight=1.0,
        ema_decay=0.9,
        device="cpu",
    )


def on_processes(world: int, task: Callable[[int], object]) -> list[int]:
    """Run a task in processes that find what torchrun would tell them; give their exit codes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]

    def one(rank: int) -> None:
        os.environ.update(
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            OMP_NUM_THREADS="1",
        )
        task(rank)

    def all_of_them() -> None:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(in_child(lambda rank=rank: one(rank)) & 0xFF)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os._exit(next((abs(code) for code in codes if code), 0))  # a signal's is negative

    return [in_child(all_of_them)]


def recorded(config: TrainConfig, *, world: int = 1, kill_at: int | None = None) -> Mapping[str, Any]:
    """Train on ``world`` processes and give each step's losses, gradient norms and sentences by process."""
    notes = config.out.parent / f"{config.out.name}-notes"
    notes.mkdir(exist_ok=True)

    def task(rank: int) -> None:
        found: dict[str, list] = {"losses": [], "norms": [], "sentences": []}
        clip, gradients = scale.clip_gradients, Learner.gradients

        def watched_clip(parameters, most):
            norms = [state.whole(p.grad).norm() for p in parameters if p.grad is not None]
            found["norms"].append(torch.stack(norms).norm().item())
            told = clip(parameters, most)
            assert told.item() == pytest.approx(found["norms"][-1], rel=1e-3, abs=1e-5)
            return told

        def watched_gradients(learner, step, batches):
            if kill_at is not None and len(found["sentences"]) == kill_at:
                # All together, when none has anything left to send: a process whose peer is gone aborts.
                (notes / f"{rank}.here").touch()
                while len(list(notes.glob("*.here"))) < world:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            found["sentences"].append([[r.sent_id for r in batch.records] for batch in batches])
            (notes / f"{rank}.json").write_text(json.dumps(found))
            report = gradients(learner, step, batches)
            found["losses"].append(torch.stack([*report.losses]).tolist())
            return report

        scale.clip_gradients = watched_clip
        Learner.gradients = watched_gradients
        train(config)
        (notes / f"{rank}.json").write_text(json.dumps(found))

    codes = on_processes(world, task) if world > 1 else [in_child(lambda: task(0))]
    assert kill_at is not None or codes == [0], f"a process ended early: {codes}"
    by_rank = [json.loads((notes / f"{rank}.json").read_text()) for rank in range(world)]
    in_turn = [
        [i for pieces in zip(*step, strict=True) for piece in pieces for i in piece]
        for step in zip(*(found["sentences"] for found in by_rank), strict=True)
    ]
    return {**by_rank[0], "sentences": in_turn}


@pytest.fixture(scope="module")
def alone(plain, tmp_path_factory) -> tuple[Mapping[str, Any], Path]:
    config = replace(plain, out=tmp_path_factory.mktemp("distributed") / "alone")
    return recorded(config), config.out


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        pytest.param(2, {}, id="two processes"),
        pytest.param(1, {"accumulate": 2}, id="accumulation"),
        pytest.param(2, {"accumulate": 2}, id="two processes and accumulation"),
        pytest.param(2, {"sharding": "fsdp2"}, id="fsdp2", marks=RESETS),
        pytest.param(
            2,
            {"sharding": "fsdp2", "accumulate": 2},
            id="fsdp2 and accumulation",
            marks=[pytest.mark.slow, RESETS],
        ),
    ],
)
def test_batch_cut_into_pieces_gives_the_same_losses_norms_and_weights(
    plain, alone, tmp_path, world, changes
):
    expected, whole = alone
    found = recorded(replace(plain, out=tmp_path / "run", **changes), world=world)
    assert found["sentences"] == expected["sentences"]
    assert len(expected["losses"]) == len(expected["norms"]) == STEPS
    for name in ("losses", "norms"):
        actual, wanted = (torch.tensor(values[name]) for values in (found, expected))
        torch.testing.assert_close(actual, wanted, rtol=LOSS, atol=LOSS)
    weights, others = load_weights(tmp_path / "run"), load_weights(whole)
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    # Each process scored a share of val, and every sentence was scored once.
    scores = [
        json.loads((out / "log.jsonl").read_text().splitlines()[-1]) for out in (tmp_path / "run", whole)
    ]
    assert scores[0]["val"] == pytest.approx(scores[1]["val"], abs=0.02)
    assert scores[0]["val"]["count"] == scores[1]["val"]["count"] > 0
    load_checkpoint(tmp_path / "run")


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("sharding", ["none", pytest.param("fsdp2", marks=[pytest.mark.slow, RESETS])])
def test_run_goes_on_with_another_number_of_processes_and_the_same_sentences(
    plain, alone, tmp_path, worlds, sharding
):
    config = replace(plain, out=tmp_path / "run", save_every=6, sharding=sharding)
    before = recorded(config, world=worlds[0], kill_at=8)
    assert before["sentences"] == alone[0]["sentences"][:8]
    after = recorded(config, world=worlds[1])
    assert after["sentences"] == alone[0]["sentences"][6:]
    actual, wanted = torch.tensor(after["losses"]), torch.tensor(alone[0]["losses"][6:])
    torch.testing.assert_close(actual, wanted, rtol=LOSS, atol=LOSS)


def test_dropout_of_two_processes_goes_on_after_a_kill(run_config, tmp_path):
    """Of one process the other tests see to it; here each has its own random numbers to bring back."""
    config = replace(run_config, steps=8, batch_size=8, save_every=3, device="cpu")
    whole = recorded(replace(config, out=tmp_path / "whole"), world=2)
    recorded(replace(config, out=tmp_path / "killed"), world=2, kill_at=5)
    after = recorded(replace(config, out=tmp_path / "killed"), world=2)
    assert after["losses"] == whole["losses"][3:]
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_batch_that_two_processes_cannot_share_is_refused(plain, tmp_path):
    def task(rank: int) -> None:
        with pytest.raises(InputError, match="15 sentences cannot be cut into 2 processes x 1"):
            train(replace(plain, out=tmp_path / "run", batch_size=15))

    assert on_processes(2, task) == [0]


def test_error_of_the_first_process_reaches_the_other(plain, tmp_path):
    """None waits for one that is gone."""

    def task(rank: int) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise InputError("state: cannot be written; make room there")

        state.save_state = full
        with pytest.raises(InputError, match="make room there"):
            train(replace(plain, out=tmp_path / "run", save_every=2))

    assert on_processes(2, task) == [0]


def test_gradient_that_is_not_finite_on_one_process_leaves_the_step_out_on_both(plain, tmp_path):
    config = replace(plain, out=tmp_path / "run", steps=4, skip_nonfinite=1)

    def task(rank: int) -> None:
        gradients, steps = Learner.gradients, []

        def poisoned(learner: Learner, step: int, batches: Any) -> StepReport:
            steps.append(1)
            if rank == 1 and len(steps) == 2:
                hook = learner.parameters[0].register_hook(lambda grad: grad * float("nan"))
                report = gradients(learner, step, batches)
                hook.remove()
                return report
            return gradients(learner, step, batches)

        Learner.gradients = poisoned
        train(config)

    assert on_processes(2, task) == [0]
    assert [path.name for path in config.out.glob("nonfinite*")] == ["nonfinite-step-00000002.json"]
    assert all(tensor.isfinite().all() for tensor in load_weights(config.out).values())


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_runs_the_command(plain, scenes, tmp_path, nodes):
    from reference_model.configs import to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(replace(plain, out=tmp_path / "run", steps=3)))
    command = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")]
    command += ["-m", "reference_model", "train", "--config", str(tmp_path / "config.yaml")]
    root = Path(loop.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    if nodes == 1:
        subprocess.run([sys.executable, *command], check=True, cwd=tmp_path, env=environment)
    else:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            meet = f"localhost:{probe.getsockname()[1]}"
        node = [*command[:2], "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        node += ["--rdzv-endpoint", meet, *command[5:]]
        agents = [subprocess.Popen([sys.executable, *node], cwd=tmp_path, env=environment) for _ in "12"]
        assert [agent.wait() for agent in agents] == [0, 0]
    note = json.loads((tmp_path / "run/run.json").read_text())["sessions"][0]
    assert note["processes"] == 2
    load_checkpoint(tmp_path / "run")
