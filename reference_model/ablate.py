"""The command ``ablate``: the paper's ablation tables, each row trained and scored over several seeds."""

import csv
import fcntl
import importlib.util
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from reference_model.checkpoints.checkpoint import CONFIG, WEIGHTS
from reference_model.configs import build, read_yaml, to_yaml
from reference_model.data.datasets import read
from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.training.config import AblateConfig, TrainConfig
from reference_model.training.run import differences
from reference_model.training.state import STATES
from reference_model.training.train import train

FULL = "full"
"""The row that all tables share and the others are compared with: the config as given."""
COLUMNS = ("mIoU", "oIoU", "P@0.5", "P@0.7", "P@0.9")
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131
)  # fmt: skip


class Table(NamedTuple):
    """An ablation table: what it asks, and each row's changes of the config."""

    title: str
    rows: dict[str, dict[str, Any]]


def _guided_by(guidance: str) -> dict[str, Any]:
    return {"model.guidance": guidance, "model.match_size": True}


def _alone(**changes: Any) -> dict[str, Any]:
    return _guided_by("ve") | changes


TABLES = {
    "5": Table(
        "Guidance set (METRIS Table 5)",
        {name: _guided_by(name) for name in ("pure_le", "enhanced_le", "ve", "enhanced_le+pixels")}
        | {FULL: {}},
    ),
    "6": Table(
        "Components of the extractor (METRIS Table 6)",
        {
            "no_step_1": {"model.ratio": 1.0},
            "no_step_2": {"model.refine": False, "model.match_size": True},
            "no_step_3": {"model.relate": False, "model.match_size": True},
            "no_local_cues": {"model.cues": "global"},
            "no_global_cue": {"model.cues": "local"},
            FULL: {},
        },
    ),
    "fig6": Table(
        "Share r of curated tokens (METRIS Fig. 6)",
        {f"ratio_{r / 10}": {"model.ratio": r / 10} for r in range(1, 9)},
    ),
    "8": Table(
        "Contrastive loss, and the dynamic mask in the softmax (METRIS Table 8)",
        {
            "no_contrastive_loss": {"loss.contrastive_weight": 0.0},
            "unmasked_softmax": {"model.mask_softmax": False},
            FULL: {},
        },
    ),
    "learning": Table(
        "What makes the visual expression learn: VE alone, beside enhanced LE (our own study)",
        {
            "enhanced_le": _guided_by("enhanced_le"),
            "ve": _guided_by("ve"),
            "ve_as_printed": _alone(
                **{
                    "model.aggregation_temperature": 1.0,
                    "model.divide_by_count": True,
                    "model.norm": "none",
                    "loss.contrastive_weight": 0.1,
                }
            ),
            "ve_divide_by_count": _alone(**{"model.divide_by_count": True}),
            "ve_temperature_1": _alone(**{"model.aggregation_temperature": 1.0}),
            "ve_temperature_0.02": _alone(**{"model.aggregation_temperature": 0.02}),
            "ve_contrastive_0.1": _alone(**{"loss.contrastive_weight": 0.1}),
            "ve_contrastive_3": _alone(**{"loss.contrastive_weight": 3.0}),
            "ve_tau_0.2": _alone(**{"loss.contrastive_temperature": 0.2}),
            "ve_norm_none": _alone(**{"model.norm": "none"}),
            FULL: {},
        },
    ),
    "lite": Table(
        "Decoder of metris_swin_b_lite, as narrow beside metris_tiny's as that beside metris_swin_b's",
        {
            "lite_decoder": {"model.decoder_dim": [28, 20, 12, 8]},
            "lite_decoder_of_one_width": {"model.decoder_dim": 12},  # as many multiply-adds at 480 px
            FULL: {},
        },
    ),
    "9": Table("Articles as cues (METRIS Table 9)", {"no_articles": {"model.articles": False}, FULL: {}}),
}


class Run(NamedTuple):
    """One row of a table with one seed."""

    row: str
    seed: int
    config: TrainConfig

    def beside(self, suffix: str) -> Path:
        """Name a file beside the run's folder: .yaml its settings, .json its scores, .log what it printed."""
        return self.config.out.with_suffix(suffix)

    def scores(self) -> dict[str, dict[str, float]]:
        """Give its finished scores by split; {} before."""
        if not self.beside(".json").exists():
            return {}
        found = json.loads(self.beside(".json").read_text(encoding="utf-8"))
        return {split: by_prediction["METRIS"] for split, by_prediction in found.items()}


def ablate(config: AblateConfig) -> list[dict[str, Any]]:
    """Run the command ``ablate`` and return the rows that it prints.

    Raises:
        InputError: The table or a row is unknown, a folder holds a run of other settings, or a run cannot be
            done.
    """
    if config.dry_run:
        raise InputError("dry_run: a table is not trained dry; use metris train --dry-run with its options")
    if config.table not in TABLES:
        raise InputError(f"table {config.table}: unknown; there are {', '.join(TABLES)}")
    table = TABLES[config.table]
    asked = list(table.rows) if config.rows is None else config.rows.split(",")
    for row in asked:
        if row not in table.rows:
            raise InputError(f"rows: table {config.table} has no {row}; there are {', '.join(table.rows)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("ablate: needs matplotlib for its picture; pip install 'metris-blocks[report]'")
    refuse_unwritable(config.out / f"table-{config.table}.csv")
    runs = [
        Run(row, seed, run_config(config, row, seed, table.rows[row]))
        for seed in range(config.seed, config.seed + config.seeds)
        for row in asked
    ]
    data = read(config.data)
    for split in config.splits.split(","):
        data.records(split)  # a mistyped one is refused now and not after the training
    failed = _run_all([run for run in runs if not _finished(run, config.splits)], config)
    # Other rows and seeds that an earlier call finished are part of the table too.
    seeds = range(config.seed, config.seed + 100)
    known = [Run(row, s, run_config(config, row, s, table.rows[row])) for row in table.rows for s in seeds]
    done = [run for run in known if run.beside(".json").exists() and _finished(run, "")]
    split = config.splits.split(",")[0]
    summary = summarise(done, split)
    if summary:
        _write(config, table, done, summary)
        shown = {"table": table.title, "split": split, "rows": summary}
        text = f"{table.title}, {split}\n\n{markdown(summary)}"
        print(json.dumps(shown, indent=2) if config.json else text)
    if failed:
        raise InputError(f"{len(failed)} runs failed, the others are in the table; first {failed[0]}")
    return summary


def run_config(config: AblateConfig, row: str, seed: int, changes: Mapping[str, Any]) -> TrainConfig:
    """Give the training config of one run."""
    given = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    given |= {"out": config.out / row / f"seed{seed}", "seed": seed, "json": False}
    return changed(TrainConfig(**given), changes)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Replace fields of nested dataclasses by dotted names."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        config = replace(config, **{first: changed(getattr(config, first), {rest: value}) if rest else value})
    return config


# ------------------------------------------------------------------------------------------------- the runs


def _finished(run: Run, splits: str) -> bool:
    """Tell whether a run needs nothing more; refuse a folder that holds another one."""
    path = run.beside(".yaml")
    if path.exists():
        # What is newer than the run had its default then.
        before = build(TrainConfig, read_yaml(path, TrainConfig), source=str(path))
        if differing := differences(before, run.config):
            raise InputError(
                f"{run.config.out}: holds a run with {', '.join(differing)}; choose another --out"
            )
    return {split for split in splits.split(",") if split} <= run.scores().keys()


def _run_all(runs: Sequence[Run], config: AblateConfig) -> list[str]:
    """Do the runs and give the failures, a line each."""
    failed: list[str] = []
    threads = max(1, torch.get_num_threads() // config.jobs)
    bar = tqdm(total=len(runs), desc=f"table {config.table}", unit="run", disable=None if runs else True)
    if config.jobs == 1:
        for run in runs:
            bar.set_postfix_str(f"{run.row} seed {run.seed}")
            try:
                _run(run, config.splits, threads)
            except InputError as error:
                failed.append(f"{run.row} seed {run.seed}: {error}")
            bar.update()
        return failed
    # Spawned rather than forked: this process holds the threads of torch. One run a process frees its memory.
    context = multiprocessing.get_context("spawn")
    options = {"mp_context": context, "max_tasks_per_child": 1, "initializer": _end_with_parent}
    with ProcessPoolExecutor(config.jobs, **options) as pool:
        try:
            waiting = {pool.submit(_run, run, config.splits, threads): run for run in runs}
            for done in as_completed(waiting):
                try:
                    done.result()
                except InputError as error:
                    failed.append(f"{waiting[done].row} seed {waiting[done].seed}: {error}")
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def _end_with_parent() -> None:
    """Leave no run behind that goes on writing when the command was killed."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run(run: Run, splits: str, threads: int) -> None:
    """Train, unless that is done, and score; what they print goes to a log beside the run's folder."""
    torch.set_num_threads(threads)
    folder = run.config.out
    folder.parent.mkdir(parents=True, exist_ok=True)
    with run.beside(".log").open("a") as log:
        try:
            # Tables share rows: another command may be at this very run.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: another metris ablate is training it; wait for that one") from error
        with redirect_stdout(log), redirect_stderr(log):
            before = run.scores()
            if not before:
                with written_whole(run.beside(".yaml")) as path:
                    path.write_text(to_yaml(run.config), encoding="utf-8")
                if (folder / STATES).is_dir() or not (folder / WEIGHTS).exists():
                    try:
                        train(run.config)  # or go on with it
                    except SystemExit as leaving:
                        raise InputError(f"{folder}: ended by SIGTERM; the same command goes on") from leaving
            splits = ",".join(dict.fromkeys([*before, *splits.split(",")]))  # one file has them all
            batch, scores = 2 * run.config.batch_size, run.beside(".json")
            device = run.config.device
            evaluate(
                EvaluateConfig(
                    run.config.data, folder, splits=splits, batch_size=batch, out=scores, device=device
                )
            )


# ---------------------------------------------------------------------------------------------- the results


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of the mean (Student's t); None for fewer than two values."""
    k = len(values)
    if k < 2:
        return None
    # Beyond the table, the first terms of the quantile's expansion: right to 0.001.
    t = _T[k - 2] if k - 2 < len(_T) else 1.96 + 2.372 / (k - 1) + 2.82 / (k - 1) ** 2
    return t * statistics.stdev(values) / math.sqrt(k)


def summarise(runs: Sequence[Run], split: str) -> list[dict[str, Any]]:
    """Give each row's mean and interval per metric, and its mIoU less the full model's, paired by seed."""
    by_row: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        if split in run.scores():
            by_row.setdefault(run.row, {})[run.seed] = run.scores()[split]
    summary = []
    for row, by_seed in by_row.items():
        found: dict[str, Any] = {"row": row, "seeds": len(by_seed)}
        found["parameters_M"] = _parameters(next(run for run in runs if run.row == row)) / 1e6
        for name in COLUMNS:
            values = [scores[name] for scores in by_seed.values()]
            found[name], found[f"{name}_95"] = statistics.mean(values), interval(values)
        both = by_seed.keys() & by_row.get(FULL, {}).keys() if row != FULL else ()
        differences = [by_seed[seed]["mIoU"] - by_row[FULL][seed]["mIoU"] for seed in sorted(both)]
        if differences:
            found["less_full"], found["less_full_95"] = statistics.mean(differences), interval(differences)
        summary.append(found)
    return summary


def _parameters(run: Run) -> int:
    path = run.config.out / CONFIG
    config = build(ModelConfig, read_yaml(path, ModelConfig, section="model"), source=str(path))
    with torch.device("meta"):
        model = build_metris(replace(config, pretrained=False, image_weights=None, text_weights=None))
    return sum(p.numel() for p in model.parameters())


def markdown(summary: Sequence[Mapping[str, Any]]) -> str:
    """Lay out a summary in per cent; ± is half the 95 % interval over the seeds."""
    lines = [
        f"| row | seeds | parameters (M) | {' | '.join(COLUMNS)} | mIoU less full |",
        f"|---|---|---|{'---|' * len(COLUMNS)}---|",
    ]
    for row in summary:
        cells = [_with_interval(row[name], row[f"{name}_95"]) for name in COLUMNS]
        less = _with_interval(row["less_full"], row["less_full_95"], "+") if "less_full" in row else ""
        head = f"| {row['row']} | {row['seeds']} | {row['parameters_M']:.3f} |"
        lines.append(f"{head} {' | '.join(cells)} | {less} |")
    return "\n".join(lines)


def _with_interval(mean: float, half: float | None, sign: str = "") -> str:
    shown = f"{100 * mean:{sign}.2f}"
    return shown if half is None else f"{shown} ± {100 * half:.2f}"


def _write(config: AblateConfig, table: Table, runs: Sequence[Run], summary: Sequence[Mapping]) -> None:
    split = config.splits.split(",")[0]
    stem = config.out / f"table-{config.table}"
    with written_whole(stem.with_suffix(".csv")) as path, path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "split", *COLUMNS, "count"])
        writer.writerows(_lines(runs))
    with written_whole(stem.with_suffix(".md")) as path:
        path.write_text(f"# {table.title}\n\n{split}, per cent.\n\n{markdown(summary)}\n", encoding="utf-8")
    with written_whole(stem.with_suffix(".png")) as path:
        draw(table.title, split, summary, path)
    print(f"table: {stem}.md   runs: {stem}.csv   picture: {stem}.png", file=sys.stderr)


def _lines(runs: Sequence[Run]) -> Iterator[list[object]]:
    for run in runs:
        for split, scores in run.scores().items():
            yield [run.row, run.seed, split, *(scores[name] for name in COLUMNS), scores["count"]]


def draw(title: str, split: str, summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw mIoU of each row with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 0.8 + 0.4 * len(summary)), layout="constrained")
    names = [row["row"] for row in summary]
    means = [100 * row["mIoU"] for row in summary]
    halves = [100 * (row["mIoU_95"] or 0) for row in summary]
    if all(found := [re.fullmatch(r"ratio_(\d\.\d)", name) for name in names]):
        axes.errorbar([float(match[1]) for match in found], means, halves, fmt="o-", capsize=3)
        axes.set(
            xlabel="r, share of visual tokens curated", ylabel=f"{split} mIoU (%), mean and 95 % interval"
        )
    else:
        axes.errorbar(means, names, xerr=halves, fmt="o", capsize=3)
        axes.invert_yaxis()
        axes.set(xlabel=f"{split} mIoU (%), mean and 95 % interval over seeds")
    axes.set_title(title)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
