"""The command ``plot``: what runs logged, as one picture."""

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reference_model.files import InputError, refuse_unwritable, written_whole
from reference_model.viewing.config import PlotConfig
from reference_model.viewing.runs import LOG, log_of

_LOSSES = {"total": "-", "mask": "--", "contrastive": ":", "no_target": "-."}
_SCORES = {"mIoU": "-", "oIoU": "--", "gIoU": ":"}


def plot(config: PlotConfig) -> Path:
    """Run the command ``plot`` and return the picture's path.

    Raises:
        InputError: A run has no log to draw, the picture cannot be written, or matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plot: needs matplotlib for its picture; pip install 'metris-blocks[report]'")
    config.check()
    logs = {run: entries(run) for run in config.runs}
    out = config.out or config.runs[0] / "log.png"
    refuse_unwritable(out)
    with written_whole(out) as path:
        _draw(logs, path)
    print(json.dumps({"plot": str(out)}) if config.json else f"plot: {out}")
    return out


def entries(run: Path) -> list[dict[str, Any]]:
    """Read the log of a run, be it finished, training or killed in the middle of a line.

    Raises:
        InputError: There is none, or nothing in it yet.
    """
    if not (run / LOG).is_file():
        raise InputError(f"{run / LOG}: cannot be read (No such file or directory); give the folder of a run")
    found = log_of(run)
    if not found:
        raise InputError(f"{run / LOG}: logs no step yet; wait for the first line")
    return found


def curve(log: Iterable[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Give the steps and values of one number of a log; of a val score by ``val/NAME``."""
    part, _, key = name.rpartition("/")
    held = ((entry["step"], entry.get(part, {}) if part else entry) for entry in log)
    points = [(step, values[key]) for step, values in held if key in values]
    return [step for step, _ in points], [value for _, value in points]


def _draw(logs: dict[Path, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (losses, rate, scores) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    for number, (run, log) in enumerate(logs.items()):
        colour = f"C{number}"
        alike = [other for other in logs if other.name == run.name]
        prefix = "" if len(logs) == 1 else f"{run.name if len(alike) == 1 else run} "
        for axes, styles, place in ((losses, _LOSSES, ""), (scores, _SCORES, "val/")):
            for name, style in styles.items():
                steps, values = curve(log, f"{place}{name}")
                if any(values) or (place and values):  # a part of the loss that is not there is 0
                    marker = "o" if place else None
                    axes.plot(steps, values, style, color=colour, marker=marker, label=f"{prefix}{name}")
        rate.plot(*curve(log, "learning_rate"), color=colour, label=prefix.strip() or None)
    losses.set(ylabel="loss", yscale="log", title=", ".join(run.name for run in logs))
    rate.set(ylabel="learning rate")
    scores.set(ylabel="val score", ylim=(0, 1), xlabel="step")
    for axes in (losses, scores):
        if axes.has_data():
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=130, format="png", metadata={"Software": None})
    plt.close(figure)
