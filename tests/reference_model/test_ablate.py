"""`metris ablate`: which runs it makes, that it goes on where it was, and what it makes of their scores."""

import csv
import fcntl
import json
import math
import statistics

import pytest

from reference_model import ablate as command
from reference_model.ablate import FULL, TABLES, Run, changed, interval, run_config, summarise
from reference_model.cli import main, parse
from reference_model.configs import preset_file, read_yaml
from reference_model.data.config import DataConfig
from reference_model.files import InputError
from reference_model.training.config import AblateConfig, OptimConfig, TrainConfig
from tests.support.options import replace


@pytest.fixture
def config(scenes, small, tmp_path) -> AblateConfig:
    return AblateConfig(
        data=DataConfig(root=scenes),
        model=small,
        out=tmp_path / "tables",
        table="8",
        seeds=2,
        steps=2,
        batch_size=4,
        optim=OptimConfig(learning_rate=1e-3),
        evaluate_every=0,
        device="cpu",
    )


def scored(folder, value):
    """Pretend that a run has finished."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = {name: value for name in command.COLUMNS} | {"count": 3}
    folder.with_suffix(".json").write_text(json.dumps({"val": {"METRIS": scores}}))


# ------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("table", TABLES)
def test_rows_change_what_they_name_and_nothing_else(table, config):
    for row, changes in TABLES[table].rows.items():
        plain, made = (run_config(config, row, 5, given) for given in ({}, changes))
        assert made.seed == 5 and made.out == config.out / row / "seed5"
        restored = changed(made, {name: _at(plain, name) for name in changes})
        assert restored == plain
        assert all(_at(made, name) == value for name, value in changes.items())


def _at(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def test_one_row_is_one_thing_in_every_table():
    rows = {}
    for table in TABLES.values():
        for row, changes in table.rows.items():
            assert rows.setdefault(row, changes) == changes, row


# --------------------------------------------------------------------------------------------------- the runs


def test_table_is_trained_scored_and_written(config, capsys):
    command.ablate(config)
    shown = capsys.readouterr().out
    runs = list(csv.DictReader((config.out / "table-8.csv").open()))
    assert {(run["row"], run["seed"]) for run in runs} == {(row, s) for row in TABLES["8"].rows for s in "01"}
    for run in runs:
        folder = config.out / run["row"] / f"seed{run['seed']}"
        found = json.loads(folder.with_suffix(".json").read_text())["val"]["METRIS"]
        assert float(run["mIoU"]) == found["mIoU"]
    for row in TABLES["8"].rows:
        assert f"| {row} | 2 |" in shown and f"| {row} | 2 |" in (config.out / "table-8.md").read_text()
    assert (config.out / "table-8.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_skipped_and_interrupted_ones_go_on(config, monkeypatch):
    begun = []

    def interrupted(run, splits, threads):
        begun.append((run.row, run.seed))
        if len(begun) == 3:
            run.config.out.mkdir(parents=True)
            (run.config.out / "half").touch()
            raise KeyboardInterrupt
        scored(run.config.out, 0.5)

    monkeypatch.setattr(command, "_run", interrupted)
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    with pytest.raises(KeyboardInterrupt):
        command.ablate(config)
    assert begun[0] == (next(iter(TABLES["8"].rows)), 0)
    done, third = begun[:2], begun[2]
    monkeypatch.undo()
    trained = []
    monkeypatch.setattr(command, "train", lambda run: trained.append(run.out) or run.out.mkdir(exist_ok=True))
    monkeypatch.setattr(command, "evaluate", lambda given: scored(given.checkpoint, 0.5))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    command.ablate(config)
    names = [(folder.parent.name, int(folder.name[4:])) for folder in trained]
    assert names[0] == third and not set(done) & set(names) and len(names) == 4
    assert (trained[0] / "half").exists()  # for train to go on from


def test_run_that_is_trained_is_only_scored_and_one_that_sigterm_ended_is_named(config, monkeypatch):
    one = replace(config, rows=FULL, seeds=1)
    run = Run(FULL, 0, run_config(one, FULL, 0, {}))
    monkeypatch.setattr(command, "evaluate", lambda given: scored(given.checkpoint, 0.5))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)

    def ended(_):
        raise SystemExit(0)

    monkeypatch.setattr(command, "train", ended)
    with pytest.raises(InputError, match="ended by SIGTERM; the same command goes on"):
        command.ablate(one)
    run.config.out.mkdir(parents=True)
    (run.config.out / "model.safetensors").touch()
    (run.config.out / "state").mkdir()
    with pytest.raises(InputError, match="ended by SIGTERM"):  # weights of an evaluation in its middle
        command.ablate(one)
    (run.config.out / "state").rmdir()
    command.ablate(one)
    assert run.scores()


def test_table_is_not_trained_dry(config):
    with pytest.raises(InputError, match="dry_run: a table is not trained dry"):
        command.ablate(replace(config, dry_run=True))


def test_other_splits_are_scored_without_training(config, monkeypatch):
    config = replace(config, rows=FULL, seeds=1)
    run = Run(FULL, 0, run_config(config, FULL, 0, {}))
    scored(run.config.out, 0.5)
    evaluated = []
    monkeypatch.setattr(command, "train", lambda _: pytest.fail("was trained already"))
    monkeypatch.setattr(command, "evaluate", lambda given: evaluated.append((given.splits, given.out)))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    command.ablate(replace(config, splits="val,testA"))
    assert evaluated == [("val,testA", run.beside(".json"))]


def test_run_of_other_settings_is_refused(config, monkeypatch):
    monkeypatch.setattr(command, "train", lambda run: run.out.mkdir())
    monkeypatch.setattr(command, "evaluate", lambda given: scored(given.checkpoint, 0.5))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    command.ablate(config)
    monkeypatch.setattr(command, "train", lambda _: pytest.fail("was trained already"))
    elsewhere = replace(config.data, root=config.data.root.parent / "data", workers=1)
    command.ablate(replace(config, data=elsewhere, cache=True, jobs=1))
    with pytest.raises(InputError, match=r"with optim\.learning_rate=0\.001 \(asked for 0\.002\)"):
        command.ablate(replace(config, learning_rate=2e-3))
    with pytest.raises(InputError, match=r"holds a run with model\.joint_dim=12 \(asked for 13\)"):
        command.ablate(replace(config, model=replace(config.model, joint_dim=13)))
    # A run from before an option was there had its default.
    for path in config.out.glob("*/*.yaml"):
        path.write_text(path.read_text().replace("  no_target_weight: 0.1\n", ""))
    command.ablate(config)
    with pytest.raises(InputError, match=r"no_target_weight=0\.1 \(asked for 0\.3\)"):
        command.ablate(replace(config, no_target_weight=0.3))


def test_failed_run_is_named_and_the_others_are_in_the_table(config, monkeypatch, capsys):
    def fail(run):
        if run.loss.contrastive_weight == 0:
            raise InputError("step 3: loss is nan")
        run.out.mkdir()

    monkeypatch.setattr(command, "train", fail)
    monkeypatch.setattr(command, "evaluate", lambda given: scored(given.checkpoint, 0.5))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    with pytest.raises(InputError, match=r"2 runs failed, .* no_contrastive_loss seed 0: step 3"):
        command.ablate(config)
    assert "| full | 2 |" in capsys.readouterr().out
    assert "no_contrastive_loss" not in (config.out / "table-8.md").read_text()


def test_part_of_a_table_does_not_make_it_smaller(config, monkeypatch):
    monkeypatch.setattr(command, "train", lambda run: run.out.mkdir())
    monkeypatch.setattr(command, "evaluate", lambda given: scored(given.checkpoint, 0.5))
    monkeypatch.setattr(command, "_parameters", lambda run: 1)
    whole = command.ablate(config)
    assert command.ablate(replace(config, rows=FULL, seeds=1)) == whole


def test_run_that_another_command_is_at_is_refused(config):
    run = Run(FULL, 0, run_config(config, FULL, 0, {}))
    run.config.out.mkdir(parents=True)
    with run.beside(".log").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"1 runs failed, .* another metris ablate is training it"):
            command.ablate(replace(config, rows=FULL, seeds=1))


@pytest.mark.slow
def test_jobs_share_the_runs_and_give_the_same_scores(config):
    config = replace(config, seeds=1, rows="no_contrastive_loss,full")
    alone = command.ablate(config)
    shared = command.ablate(replace(config, out=config.out.with_name("shared"), jobs=2))
    assert [row["row"] for row in shared] == [row["row"] for row in alone] == ["no_contrastive_loss", "full"]
    for one, other in zip(alone, shared, strict=True):
        assert math.isclose(one["mIoU"], other["mIoU"], abs_tol=1e-3)


# ------------------------------------------------------------------------------------------------ the numbers


def test_interval_is_students():
    # Student's own: for the values 1, 2, 3 the mean is 2 ± 4.303 / √3.
    assert math.isclose(interval([1.0, 2.0, 3.0]), 4.303 / math.sqrt(3))
    assert interval([1.0]) is None
    # From tables of t: 2.042 for 30 degrees of freedom, 1.984 for 100.
    for freedom, t in ((30, 2.042), (100, 1.984)):
        values = [float(i % 2) for i in range(freedom + 1)]
        half = t * statistics.stdev(values) / math.sqrt(freedom + 1)
        assert math.isclose(interval(values), half, rel_tol=1e-3)
    assert interval([2.0, 2.0]) == 0


def test_summary_pairs_seeds(config, monkeypatch):
    monkeypatch.setattr(command, "_parameters", lambda run: 10**6)
    runs = []
    for row, values in {"no_contrastive_loss": {0: 0.1, 1: 0.4, 2: 0.2}, FULL: {0: 0.2, 1: 0.5}}.items():
        for seed, value in values.items():
            runs.append(Run(row, seed, run_config(config, row, seed, {})))
            scored(runs[-1].config.out, value)
    other, full = summarise(runs, "val")
    assert math.isclose(other["mIoU"], 0.7 / 3) and other["seeds"] == 3
    assert math.isclose(other["less_full"], -0.1) and math.isclose(other["less_full_95"], 0, abs_tol=1e-12)
    assert "less_full" not in full and full["seeds"] == 2


# ------------------------------------------------------------------------------------------------ the command


def test_preset_and_options_reach_every_run():
    words = ["--preset", "metris_tiny", "--data.root", "D", "--table", "5", "--seeds", "3", "--steps", "7"]
    config = parse("ablate", words)
    preset = read_yaml(preset_file("metris_tiny"), TrainConfig)
    assert (config.table, config.seeds, config.steps) == ("5", 3, 7)
    assert config.optim.learning_rate == preset["optim"]["learning_rate"] and config.model.guidance_dim == 128


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--table", "7"], "table 7: unknown; there are 5, 6, fig6, 8,"),
        (["--rows", "nothing"], "rows: table 5 has no nothing; there are pure_le, enhanced_le"),
        (["--splits", "val,tset"], "tset"),
        (["--seeds", "0"], "seeds: must be > 0, got 0"),
        (["--jobs", "0"], "jobs: must be > 0, got 0"),
        (["--out", "/proc/none"], "/proc/none"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, says, scenes, tmp_path, capsys):
    base = ["ablate", "--preset", "metris_tiny", "--data.root", str(scenes), "--out", str(tmp_path)]
    assert main([*base, *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and says in err
