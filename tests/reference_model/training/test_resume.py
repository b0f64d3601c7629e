"""A run that is killed, however and whenever, ends with the very weights of one that is not."""

import errno
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reference_model.checkpoints.checkpoint import load_weights, step_of_weights
from reference_model.data.config import ConvertConfig, DataConfig
from reference_model.data.convert import convert
from reference_model.files import InputError
from reference_model.scoring.evaluator import Evaluator
from reference_model.training import run as run_module
from reference_model.training import state, training_data
from reference_model.training.config import TrainConfig
from reference_model.training.learner import Learner
from reference_model.training.train import train
from tests.support.options import replace

STEPS = 14


@pytest.fixture(scope="module")
def long_config(run_config, tmp_path_factory) -> TrainConfig:
    """Dropout, an average, evaluations in the middle and two epochs: all that a state has to bring back."""
    return replace(
        run_config,
        out=tmp_path_factory.mktemp("resume") / "uninterrupted",
        steps=STEPS,
        warmup_steps=2,
        clip_norm=1.0,
        ema_decay=0.8,
        evaluate_every=1,
        batch_size=8,
        save_every=1,
        device="cpu",
    )


@pytest.fixture(scope="module")
def uninterrupted(long_config) -> Path:
    return train(long_config)


def in_child(task: Callable[[], object]) -> int:
    """Run a task in a process of its own and give its exit code, negative where a signal ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            task()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        except BaseException:  # noqa: BLE001  a forked test must not go on as if it were pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(event: int, config: TrainConfig) -> int:
    """Train, and kill the process with SIGKILL at its ``event``-th event.

    Events: before gradients, which are the first one, and after an update; a half-written safetensors file;
    before each flush and around each move of a file to its name.
    """
    left, begun = event, False

    def count() -> None:
        nonlocal left
        left -= begun
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function, *, before=False, after=False):
        def wrapper(*args, **kwargs):
            if before:
                count()
            result = function(*args, **kwargs)
            if after:
                count()
            return result

        return wrapper

    save_file = state.save_file

    def half(tensors, path, *args):
        save_file(tensors, path, *args)
        size, content = path.stat().st_size, path.read_bytes()
        path.write_bytes(content[: size // 2])
        count()
        path.write_bytes(content)

    def task():
        gradients = counted(Learner.gradients, before=True)

        def first(*args):
            nonlocal begun
            begun = True
            return gradients(*args)

        Learner.gradients = first
        Learner.update = counted(Learner.update, after=True)
        os.fsync = counted(os.fsync, before=True)
        os.replace = counted(os.replace, before=True, after=True)
        state.save_file = half
        train(config)

    return in_child(task)


def newest(run: Path) -> state.State | None:
    found = state.newest_state(run)
    return None if found is None else state.load_state(found)


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def scores(run: Path) -> list:
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "step_seconds", "data_wait", "memory_MiB")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries]


# ------------------------------------------------------------------------------------------ killed at random


@pytest.mark.slow
def test_run_killed_at_twenty_random_points_ends_with_the_same_weights(long_config, uninterrupted, tmp_path):
    config = replace(long_config, out=tmp_path / "killed")
    draw, kills, in_write = random.Random(7), 0, 0
    while kills < 20:
        assert killed_at(draw.randint(1, 20), config) == -signal.SIGKILL
        kills += 1
        in_write += any((config.out / "state").glob(".step-*"))
    assert in_write >= 3, "some kills must fall into the writing of a state"
    train(config)
    assert digest(config.out) == digest(uninterrupted)
    # The log has every step once, as if nothing had been.
    assert scores(config.out) == scores(uninterrupted)
    assert not (config.out / "state").exists() and not list(config.out.glob(".*"))


def test_kill_with_worker_processes_changes_nothing(long_config, uninterrupted, tmp_path):
    config = replace(long_config, out=tmp_path / "r", data=replace(long_config.data, workers=2), save_every=4)
    assert killed_at(36, config) == -signal.SIGKILL
    held = newest(config.out)
    assert held is not None and 0 < held.facts["step"] < STEPS
    train(replace(config, data=replace(config.data, workers=0)))
    assert digest(config.out) == digest(uninterrupted)


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_in_the_middle_of_an_epoch_of_shards_changes_nothing(long_config, scenes, tmp_path, workers):
    root = convert(ConvertConfig(DataConfig(scenes), tmp_path / "shards"))
    data = DataConfig(root, workers=workers)
    config = replace(long_config, data=data, out=tmp_path / "whole", save_every=3)
    train(config)
    killed = replace(config, out=tmp_path / "killed")
    assert killed_at(15, killed) == -signal.SIGKILL
    assert newest(killed.out).facts["position"] > 0
    train(killed)
    assert digest(killed.out) == digest(config.out)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_once_at_each_of_many_points(long_config, uninterrupted, tmp_path, workers):
    config = replace(long_config, save_every=5, data=replace(long_config.data, workers=workers))
    for event in random.Random(workers).sample(range(1, 58), 20):
        one = replace(config, out=tmp_path / f"{event}")
        assert killed_at(event, one) == -signal.SIGKILL
        train(one)
        assert digest(one.out) == digest(uninterrupted), event


# ------------------------------------------------------------------------------------- asked to end: SIGTERM


def test_sigterm_saves_and_exits_with_zero(long_config, uninterrupted, tmp_path, capfd):
    config = replace(long_config, out=tmp_path / "run", save_every=0, evaluate_every=0)

    def task():
        update, done = Learner.update, []

        def then_terminate(learner, report):
            update(learner, report)
            done.append(1)
            if len(done) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        Learner.update = then_terminate
        train(config)

    assert in_child(task) == 0
    says = r"SIGTERM: saved step (5|6) of 14; the same command goes on there"
    assert re.search(says, capfd.readouterr().err)
    assert newest(config.out).facts["step"] in (5, 6)
    assert not (config.out / "model.safetensors").exists()
    train(config)
    # Evaluated at the end alone, so the weights are the last ones.
    last = replace(config, out=tmp_path / "last")
    train(last)
    assert digest(config.out) == digest(last.out)


@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_to_the_whole_job_saves_too(long_config, tmp_path, workers):
    """Schedulers signal every process of a job, those that load data among them."""
    data = replace(long_config.data, workers=workers)
    config = replace(long_config, out=tmp_path / "run", save_every=0, evaluate_every=0, data=data, steps=60)

    def task():
        os.setpgrp()
        update, done = Learner.update, []

        def then_terminate(learner, report):
            update(learner, report)
            done.append(1)
            if len(done) == 3:
                os.killpg(0, signal.SIGTERM)

        Learner.update = then_terminate
        train(config)

    assert in_child(task) == 0
    assert newest(config.out).facts["step"] in (3, 4)


@pytest.mark.parametrize("moment", ["reading", "end of an epoch", "evaluation", "last step", "finish"])
def test_sigterm_at_odd_moments_loses_nothing(long_config, uninterrupted, tmp_path, capfd, moment):
    """It ends where a step ends, before an evaluation rather than after it, and the run goes on as if nothing
    had been."""
    config = replace(long_config, out=tmp_path / "run", save_every=0)
    terminate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    epoch = next(entry["step"] for entry in scores(uninterrupted) if "val" in entry)
    assert epoch < STEPS

    def before(owner, name, call=1):
        function, calls = getattr(owner, name), []

        def wrapper(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                terminate()
            return function(*args, **kwargs)

        setattr(owner, name, wrapper)

    def task():
        match moment:
            case "reading":
                before(training_data, "read")
            case "end of an epoch":
                before(Learner, "gradients", epoch)
            case "evaluation":
                before(Evaluator, "score")
            case "last step":
                before(Learner, "gradients", STEPS)
            case "finish":
                before(state, "finish")
        train(config)

    assert in_child(task) == 0
    said = capfd.readouterr().err
    evaluations = sum("val" in entry for entry in scores(config.out))
    if moment == "finish":
        assert "SIGTERM" not in said and evaluations == 2 and not (config.out / "state").exists()
    else:
        step, done = {
            "reading": (1, 0),
            "end of an epoch": (epoch, 0),
            "evaluation": (epoch, 1),
            "last step": (STEPS, 1),
        }[moment]
        assert f"saved step {step} of 14" in said and evaluations == done
        train(config)
    assert digest(config.out) == digest(uninterrupted)
    assert scores(config.out) == scores(uninterrupted)


def test_handler_of_sigterm_is_given_back(run_config, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(replace(run_config, out=tmp_path / "run", steps=1))
    assert signal.getsignal(signal.SIGTERM) is before


# --------------------------------------------------------------------------------- what can go wrong on disk


@pytest.fixture(scope="module")
def killed(long_config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("resume") / "killed"
    assert killed_at_step(8, replace(long_config, out=out)) == -signal.SIGKILL
    assert {path.name for path in (out / "state").iterdir()} == {"step-00000006", "step-00000007"}
    return out


@pytest.fixture
def interrupted(long_config, killed, tmp_path) -> TrainConfig:
    """A run with its states of steps 6 and 7."""
    return replace(long_config, out=shutil.copytree(killed, tmp_path / "interrupted"))


def killed_at_step(step: int, config: TrainConfig) -> int:
    def task():
        gradients, begun = Learner.gradients, []

        def kill(learner, number, batches):
            begun.append(1)
            if len(begun) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return gradients(learner, number, batches)

        Learner.gradients = kill
        train(config)

    return in_child(task)


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "rng-0000.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_state_is_left_aside_aloud(interrupted, capsys, name, damage):
    path = interrupted.out / "state/step-00000007" / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) * 2 // 3] ^= 1
        path.write_bytes(content)
    assert newest(interrupted.out).facts["step"] == 6
    said = capsys.readouterr().err
    assert "step-00000007" in said and "left aside for the one before" in said


def test_run_with_a_damaged_state_ends_with_the_same_weights(interrupted, uninterrupted):
    path = interrupted.out / "state/step-00000007/tensors.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    train(interrupted)
    assert digest(interrupted.out) == digest(uninterrupted)


def test_run_without_any_sound_state_begins_again(interrupted, uninterrupted, capsys):
    for path in (interrupted.out / "state").glob("*/manifest.json"):
        path.unlink()
    train(interrupted)
    assert "begins again" in capsys.readouterr().err
    assert digest(interrupted.out) == digest(uninterrupted)


def test_file_that_may_not_grow_leaves_the_state_before(interrupted, uninterrupted, capfd):
    """A limit of the system, not a stand-in: what safetensors raises is not an OSError."""
    size = (interrupted.out / "state/step-00000007/tensors.safetensors").stat().st_size

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
        with pytest.raises(InputError, match=r"state: cannot be written .*; make room there"):
            train(interrupted)

    assert in_child(limited) == 0
    assert newest(interrupted.out).facts["step"] == 7
    train(interrupted)
    assert digest(interrupted.out) == digest(uninterrupted)


@pytest.mark.parametrize("where", ["tensors", "flush"])
def test_full_disk_leaves_the_state_before(interrupted, uninterrupted, monkeypatch, where):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if where == "tensors":
            patch.setattr(state, "save_file", full)
        else:
            patch.setattr(os, "fsync", full_for_states(os.fsync, full))
        with pytest.raises(InputError, match=r"step-00000008: cannot be written \(No space left on device\)"):
            train(interrupted)
    held = newest(interrupted.out)
    assert held.facts["step"] == 7
    train(interrupted)
    assert digest(interrupted.out) == digest(uninterrupted)


def full_for_states(fsync, full):
    def flush(descriptor):
        if "/state/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            full()
        fsync(descriptor)

    return flush


def test_state_is_flushed_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    """What a machine that loses power keeps is the old state or the whole new one."""
    done = []
    fsync, move = os.fsync, os.replace
    place = lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(("flush", place(fd).name)), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("move", Path(b).name)), move(a, b))[1])
    state.save_state(tmp_path, {"w": torch.zeros(2)}, {"step": 3}, [state.random_state()], keep=2)
    moved = done.index(("move", "step-00000003"))
    before = {name for what, name in done[:moved] if what == "flush"}
    assert before == {
        *("step-00000003", "tensors.safetensors", "facts.json", "rng-0000.json", "manifest.json")
    }
    assert done[moved + 1 :] == [("flush", "state")]


def test_keep_last_states_and_none_after_the_end(long_config, tmp_path, monkeypatch):
    held = []
    save = state.save_state

    def watched(run, *args, **options):
        saved = save(run, *args, **options)
        held.append(sorted(int(path.name[-8:]) for path in (run / "state").iterdir()))
        return saved

    monkeypatch.setattr(run_module.state, "save_state", watched)
    config = replace(long_config, out=tmp_path / "run", steps=7, keep_last=3, save_every=2, evaluate_every=0)
    train(config)
    assert held == [[2], [2, 4], [2, 4, 6]]
    assert not (config.out / "state").exists()


def test_keep_best_keeps_the_weights_of_the_best_evaluations(run_config, tmp_path, monkeypatch):
    scored, seen = iter([0.3, 0.5, 0.1, 0.4]), {}

    def score(evaluator, predictor, records, *, title):
        value = next(scored)
        seen[value] = {name: tensor.clone() for name, tensor in predictor.model.state_dict().items()}
        return {"mIoU": value, "oIoU": 0.0}

    monkeypatch.setattr("reference_model.scoring.evaluator.Evaluator.score", score)
    config = replace(run_config, out=tmp_path / "run", batch_size=20, steps=None, epochs=4, evaluate_every=1)
    train(replace(config, keep_best=2))
    best = sorted(path.name for path in (config.out / "best").iterdir())
    assert len(best) == 2
    for folder, value in zip([config.out, *(config.out / "best" / name for name in best)], (0.5, 0.5, 0.4)):
        weights = load_weights(folder)
        assert all(weights[name].equal(tensor) for name, tensor in seen[value].items())


def test_kill_after_an_evaluation_keeps_the_best_ones_before(run_config, tmp_path, monkeypatch):
    """Scores .5 .6 .4; killed after the second, before a state knew of it."""
    config = replace(
        run_config, out=tmp_path / "run", batch_size=20, steps=None, epochs=3, evaluate_every=1, keep_best=2
    )
    per_epoch = {}

    def score(evaluator, predictor, records, *, title):
        tensors = sum(float(tensor.double().sum()) for tensor in predictor.model.state_dict().values())
        per_epoch.setdefault(tensors, [0.5, 0.6, 0.4][len(per_epoch) + len(before)])
        return {"mIoU": per_epoch[tensors], "oIoU": 0.0}

    monkeypatch.setattr("reference_model.scoring.evaluator.Evaluator.score", score)
    before: list[int] = []
    train(replace(config, out=tmp_path / "whole"))
    per_epoch.clear()

    def task():
        save, saved = state.save_state, []

        def kill(*args, **options):
            saved.append(1)
            if len(saved) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return save(*args, **options)

        state.save_state = kill
        train(config)

    assert in_child(task) == -signal.SIGKILL
    before.append(1)  # the child took the first
    train(config)
    files = lambda run: (
        {p.name: digest(p) for p in [run, *(run / "best").iterdir()] if p != run} | {"": digest(run)}
    )
    assert files(config.out) == files(tmp_path / "whole") and len(files(config.out)) == 3


# -------------------------------------------------------------------------------------------- what must agree


def test_unfinished_run_of_other_settings_is_refused_by_name(interrupted):
    other = replace(interrupted, learning_rate=1e-4, model=replace(interrupted.model, ratio=0.5))
    with pytest.raises(InputError, match=r"optim\.learning_rate=0.001 \(asked for 0.0001\)") as refusal:
        train(other)
    assert "model.ratio=0.3 (asked for 0.5)" in str(refusal.value)
    assert "ema_decay" not in str(refusal.value)


def test_unfinished_run_of_other_data_is_refused(interrupted, monkeypatch):
    from reference_model.data.readers.refer import Refer

    records = Refer.records
    cut = lambda data, split: records(data, split)[: -1 if split == "train" else None]
    monkeypatch.setattr(Refer, "records", cut)
    with pytest.raises(InputError, match=r"was trained on \d+ sentences, now there are \d+"):
        train(interrupted)


def test_finished_run_has_every_session_noted(interrupted):
    train(interrupted)
    sessions = json.loads((interrupted.out / "run.json").read_text())["sessions"]
    assert [session["step"] for session in sessions] == [0, 7]
    assert torch.__version__.startswith(sessions[0]["versions"]["torch"])
    assert sessions[0]["data"]["sentences"] > 0 and sessions[0]["processes"] == 1


def test_random_numbers_of_all_three_kinds_go_on():
    draw = lambda: (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())
    held = json.loads(json.dumps(state.random_state()))
    first = draw()
    assert draw() != first
    state.set_random_state(held)
    assert draw() == first


def test_weights_of_an_evaluation_that_no_state_knows_of_are_replaced(
    long_config, tmp_path, monkeypatch, capsys
):
    """Killed between them: the weights are of step 14, and the state knows of the best of step 7 alone."""
    config = replace(long_config, out=tmp_path / "run", save_every=0)
    assert killed_at_step(STEPS, config) == -signal.SIGKILL
    known = newest(config.out).facts["best"][0]
    assert step_of_weights(config.out) == known[1] < STEPS
    weights = load_weights(config.out)
    save_file(weights, config.out / "model.safetensors", {"step": str(STEPS)})
    monkeypatch.setattr(
        "reference_model.scoring.evaluator.Evaluator.score", lambda *_, **__: {"mIoU": -1.0, "oIoU": 0.0}
    )
    train(config)
    assert f"not those of step {known[1]}, the best; are replaced by" in capsys.readouterr().err
    assert step_of_weights(config.out) == STEPS and digest(config.out) is not None
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in load_weights(config.out).items())


def refused(config):
    with pytest.raises(InputError, match="another metris train is at it; wait for that one"):
        train(config)


def test_second_command_in_a_run_is_refused(long_config, tmp_path, monkeypatch):
    config = replace(long_config, out=tmp_path / "run")
    gradients, tried = Learner.gradients, []

    def meanwhile(learner, step, batches):
        if not tried:
            tried.append(1)
            # Twice: one that is refused leaves the lock of the other alone.
            assert in_child(lambda: refused(config)) == in_child(lambda: refused(config)) == 0
        return gradients(learner, step, batches)

    monkeypatch.setattr(Learner, "gradients", meanwhile)
    train(config)
    assert tried and not (config.out / ".lock").exists()


def test_other_sentences_of_the_same_number_are_refused(interrupted, scenes, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "other")
    path = next(root.glob("*/refs(unc).p"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"circle", b"cirkle"))
    assert path.read_bytes() != content
    with pytest.raises(InputError, match="was trained on other sentences than"):
        train(replace(interrupted, data=replace(interrupted.data, root=root)))


def test_best_score_survives_a_kill(long_config, tmp_path, monkeypatch):
    scored = iter([0.9, 0.2])
    stub = lambda *_, **__: {"mIoU": next(scored), "oIoU": 0.0}
    monkeypatch.setattr("reference_model.scoring.evaluator.Evaluator.score", stub)
    config = replace(long_config, out=tmp_path / "run", save_every=0)
    assert killed_at_step(STEPS, config) == -signal.SIGKILL  # after the evaluation at the end of the epoch
    next(scored)  # in the child it was taken
    best = digest(config.out)
    train(config)
    assert digest(config.out) == best
