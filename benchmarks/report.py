"""Draw what results/*.json hold, and rewrite the table of results in the README from them.

    python -m benchmarks.report

Writes docs/benchmarks-<device>.png: speed-up over the equations written out, time and memory against n, the
roofline. The table in the README comes from here alone.
"""

import json
import os
import re
import sys
from operator import itemgetter
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
# Rows of the table and bars of the picture, in the order the data meets them.
STEMS = (
    "relevance",
    "selection",
    "contrastive",
    "aggregation",
    "attention",
    "absorption",
    "enhancement",
    "refinement",
    "relationship",
    "extractor",
    "metris",
    "expressions",
    "training",
)
# Okabe and Ito's colours, told apart by the colour-blind too.
COLOURS = {
    "auto": "#0072B2",
    "literal": "#D55E00",
    "sdpa": "#009E73",
    "triton": "#CC79A7",
    "compiled": "#E69F00",
}


def load() -> dict[str, dict]:
    """Read the results of every device, by file name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def measured(result: dict, **where: object) -> list[dict]:
    """Give the rows that were measured and hold these values."""
    return [
        row
        for row in result["rows"]
        if "ms" in row and all(row[name] == value for name, value in where.items())
    ]


def dtype_of(result: dict) -> str:
    """Give the dtype to show: what a GPU would be used with, where it was measured."""
    return "bfloat16" if measured(result, dtype="bfloat16") else "float32"


def coarsest(result: dict, stem: str, **where: object) -> list[dict]:
    """Give a stem's rows at its fewest visual tokens (stage 4) and the largest batch measured there."""
    ours = measured(result, stem=stem, provider="auto")
    n, _, b = min(((row["n"], -row["b"], row["b"]) for row in ours), default=(0, 0, 0))
    return measured(result, stem=stem, n=n, b=b, **where)


def table(result: dict) -> str:
    """Write one device's rows at 480 px, stage 4: milliseconds, and time as a share of the alternatives'."""
    dtype = dtype_of(result)
    lines = [
        f"{result['device']}, {dtype}; 480 px stage 4 (n = 225, c = 1024), l = 21. Below 1 is faster.",
        f"The last three are {_model(result)}: one sentence, five about one image, and the loss of five.",
        "",
        "| what | b | mode | ms | / equations written out | / SDPA | peak MiB | written out, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stem in STEMS:
        for mode in ("forward", "forward+backward", "graph"):
            for row in coarsest(result, stem, provider="auto", mode=mode, dtype=dtype):
                literal = coarsest(result, stem, provider="literal", mode=mode, dtype=dtype)
                lines.append(
                    f"| {stem} | {row['b']} | {mode} | {milliseconds(row):.3g} "
                    f"| {share(ratio(row, 'literal'))} | {share(ratio(row, 'sdpa'))} | {row['peak_mib']:.3g} "
                    f"| {share(literal[0]['peak_mib'] if literal else None, '.3g')} |"
                )
    return "\n".join(lines)


def _model(result: dict) -> str:
    return next((row["stage"] for row in measured(result, stem="metris")), "not measured")


def milliseconds(row: dict) -> float:
    """Give a row's time: between CUDA events, with a cold cache, where there are some."""
    return row.get("event_ms", row["ms"])


def ratio(row: dict, reference: str) -> float | None:
    """Give a row's time as a share of a reference's; None where that was not timed beside it."""
    return row.get(f"event_ratio_to_{reference}", row.get(f"ratio_to_{reference}"))


def share(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f"{value:{form}}"


def draw(name: str, result: dict) -> Path:
    """Draw one device's pictures side by side and give the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _speed_ups(axes[0, 0], result)
    _growth(axes[0, 1], result, milliseconds, "time of the extractor's forward (ms)")
    _growth(axes[1, 1], result, itemgetter("peak_mib"), "peak memory of the extractor's forward (MiB)")
    _roofline(axes[1, 0], result)
    figure.suptitle(result["device"])
    path = ROOT / "docs" / f"benchmarks-{name}.png"
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def _speed_ups(axes, result):
    """One line a stem, one dot a provider; right of 1 is faster than the equations written out."""
    for provider, colour in COLOURS.items():
        times = {
            stem: 1 / ratio(row, "literal")
            for stem in STEMS
            for row in coarsest(result, stem, provider=provider, mode="forward", dtype=dtype_of(result))
            if ratio(row, "literal")
        }
        if times:
            axes.plot(list(times.values()), list(times), "o", color=colour, label=provider)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_yticks(range(len(STEMS)), STEMS)
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the equations written out (forward)", title="Speed-up")
    axes.legend()


def _growth(axes, result, value, label):
    from matplotlib.ticker import LogLocator

    sizes = set()
    for provider, colour in COLOURS.items():
        rows = measured(result, stem="extractor", provider=provider, mode="forward", b=1)
        rows = sorted((row for row in rows if row["dtype"] == "float32"), key=lambda row: row["n"])
        if len(rows) > 1:
            sizes.update(row["n"] for row in rows)
            axes.loglog(
                [row["n"] for row in rows], [value(row) for row in rows], "o-", color=colour, label=provider
            )
    axes.set_xticks(sorted(sizes), sorted(sizes))
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(
        xlabel="visual tokens n (c halves where n quadruples)", ylabel=label, title="Growth with n, b = 1"
    )
    axes.legend()


def _roofline(axes, result):
    peak = result["roofline"].get("float32") or next(iter(result["roofline"].values()))
    low, high = 0.1, 1000
    intensities = [low * (high / low) ** (i / 100) for i in range(101)]
    bound = [min(peak["flop_per_s"], x * peak["bytes_per_s"]) / 1e9 for x in intensities]
    axes.loglog(intensities, bound, color="black", label="measured bound; fewer operations may pass it")
    for provider in ("auto", "literal"):
        rows = [
            row for row in measured(result, provider=provider, mode="forward") if row["stem"] != "selection"
        ]
        axes.loglog(
            [row["gflop"] * 1000 / row["mbytes"] for row in rows],
            [1000 * row["gflop"] / milliseconds(row) for row in rows],
            "o",
            color=COLOURS[provider],
            label=provider,
            alpha=0.7,
        )
    axes.set(
        xlabel="FLOP of the equations per byte that must move",
        ylabel="GFLOP of the equations per second",
        title="Roofline",
    )
    axes.legend(loc="lower right", fontsize="small")


def rewrite(readme: str, results: dict[str, dict]) -> str:
    """Put the tables between the marks of the README.

    Raises:
        ValueError: A mark is missing.
    """
    parts = []
    for name, result in results.items():
        parts += [table(result), "", f"![benchmarks](docs/benchmarks-{name}.png)", ""]
    return between(readme, "\n".join(parts), BEGIN, END)


def between(readme: str, text: str, begin: str, end: str) -> str:
    """Put text between two marks.

    Raises:
        ValueError: They are not there.
    """
    if begin not in readme or end not in readme:
        raise ValueError(
            f"README.md: no '{begin}' and '{end}' to write between; put them where the table goes"
        )
    return re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text.rstrip()}\n{end}", readme, flags=re.DOTALL)


def main() -> int:
    results = load()
    if not results:
        print("benchmarks/results holds no .json; run `make bench` first", file=sys.stderr)
        return 2
    for name, result in results.items():
        print(draw(name, result).relative_to(ROOT))
    readme = ROOT / "README.md"
    part = readme.with_suffix(".part")
    part.write_text(rewrite(readme.read_text(), results))
    os.replace(part, readme)
    print("README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
