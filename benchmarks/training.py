"""What does a step of `metris train` cost: seconds, images a second, waiting for data, memory, and the gains?

    python -m benchmarks.training             # a table in Markdown
    python -m benchmarks.training --write     # keep it too: benchmarks/results/training/, the README's table

Each row is the command itself, run for a few steps in a process of its own, its numbers read from the log;
the variants of a preset take turns, and the first steps of each, which compile and fill caches, are left out.
On a GPU the paper's setting: batch 16, 480 px. On a CPU Swin-B takes many seconds a sentence: batch 1.
Pictures are procedural JPEGs, larger than the model's side as photographs are; the demo's for metris_tiny.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure import ratio, roofline
from benchmarks.report import between
from reference_model.cost import device_name
from reference_model.files import written_whole
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.training.journal import commit

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- training benchmarks: begin -->", "<!-- training benchmarks: end -->")
CUDA = torch.cuda.is_available()

# preset -> side of its pictures, batch, steps of a run on a GPU or a CPU
PRESETS = {
    "metris_tiny": (96, 32, 40),
    "metris_swin_b_lite": (640, 16 if CUDA else 1, 30 if CUDA else 4),
    "metris_swin_b": (640, 16 if CUDA else 1, 30 if CUDA else 4),
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "bf16": ("--parallel.precision", "bf16"),
    "bf16, compiled": ("--parallel.precision", "bf16", "--parallel.compile"),
    "checkpointed activations": ("--parallel.checkpoint_activations",),
}
LEFT_OUT_ON_CPU = {
    "bf16": "on a CPU, where bf16 gains nothing for metris_tiny either",
    "bf16, compiled": "on a CPU, where compiling takes far longer than the steps",
}
"""What is not run there, and why: bf16 at Swin-B's size, compiled at any."""
MOST_WAITING = 0.05
"""Of a step, for data."""
NUMBERS = ("step_seconds", "images_per_second", "data_wait", "memory_MiB")


def run(preset: str, variant: str, data: Path, out: Path) -> dict[str, float]:
    """Train a few steps and give medians over the later ones.

    Raises:
        subprocess.CalledProcessError: The command failed; what it said is on stderr.
    """
    _, batch, steps = PRESETS[preset]
    command = [
        sys.executable,
        "-m",
        "reference_model",
        "train",
        "--preset",
        preset,
        "--model.pretrained=false",
    ]
    command += [
        f"--data.root={data}",
        "--data.workers=2",
        f"--out={out}",
        f"--steps={steps}",
        "--cache=false",
    ]
    command += [f"--batch_size={batch}", "--sentences_per_image=1"]
    command += ["--evaluate_every=0", "--checkpointing.save_every=0", "--logging.log_every=1"]
    subprocess.run([*command, *VARIANTS[variant]], check=True, stdout=sys.stderr)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steady = [entry for entry in log if "total" in entry][steps // 4 + 1 :]
    values = {name: [entry[name] for entry in steady] for name in NUMBERS}
    return {name: max(found) if name == "memory_MiB" else median(found) for name, found in values.items()}


def measured(rounds: int) -> list[dict[str, Any]]:
    """Run every variant of every preset in turns: one row each, with what it is beside float32."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for preset, (side, _, _) in PRESETS.items():
            data = Path(folder) / f"{side}"
            if not data.exists():
                generate(GenerateConfig(root=data, scenes="easy", size=side, train=256, val=1, test=0))
            slow = not CUDA and preset != "metris_tiny"
            left_out = (
                {} if CUDA else {n: why for n, why in LEFT_OUT_ON_CPU.items() if slow or "compiled" in n}
            )
            names = [name for name in VARIANTS if name not in left_out]
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for turn in range(1 if slow else rounds):
                for name in names:
                    out = Path(folder) / f"{preset} {name} {turn}"
                    turns[name].append(run(preset, name, data, out))
                    shutil.rmtree(out)
            for name, found in turns.items():
                row = {key: median([each[key] for each in found]) for key in NUMBERS}
                beside = [each["step_seconds"] for each in turns["float32"]]
                row["ratio"] = ratio([each["step_seconds"] for each in found], beside)
                rows.append({"preset": preset, "variant": name, "batch": PRESETS[preset][1], **row})
            if CUDA:
                _add_utilisation([row for row in rows if row["preset"] == preset])
            rows += [{"preset": preset, "variant": name, "why": why} for name, why in left_out.items()]
    return rows


def _add_utilisation(rows: list[dict[str, Any]]) -> None:
    """Add what a step's work is of this GPU's best matrix products; backward counts twice forward."""
    command = f"{sys.executable} -m reference_model profile --preset {rows[0]['preset']} --rounds 1 --json"
    done = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    macs = {part["part"]: 1e9 * part["GMACs"] for part in json.loads(done.stdout)["parts"]}
    image = macs["image encoder"]
    for row in rows:
        peak, _ = roofline("cuda", torch.bfloat16 if "bf16" in row["variant"] else torch.float32)
        # A batch may hold an image twice: it is encoded once.
        images = row["images_per_second"] * row["step_seconds"]
        work = images * image + row["batch"] * (macs["whole model"] - image)
        row["utilisation"] = 6 * work / row["step_seconds"] / peak


def table(device: str, rows: list[dict[str, Any]]) -> str:
    """Lay the rows out in Markdown."""
    lines = [
        f"{device}; a step of `metris train`, data read by 2 workers. waits: share of the step without data, "
        f"at most {MOST_WAITING:.0%} but where it says so. of peak: the model's operations beside what the "
        "best matrix product measured here does in that time.",
        "",
        "| preset | batch | variant | s a step | / float32 | images/s | waits | peak MiB | of peak |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "why" in row:
            lines.append(f"| `{row['preset']}` | | {row['variant']} | not run: {row['why']} | | | | | |")
            continue
        waits = f"{row['data_wait']:.1%}" + f", above {MOST_WAITING:.0%}" * (row["data_wait"] > MOST_WAITING)
        share = f"{row['utilisation']:.0%}" if "utilisation" in row else "-"
        lines.append(
            f"| `{row['preset']}` | {row['batch']} | {row['variant']} | {row['step_seconds']:.3g} "
            f"| {row['ratio']:.2f} | {row['images_per_second']:.3g} | {waits} "
            f"| {row['memory_MiB']:,.0f} | {share} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant; 1 for Swin-B on a CPU")
    parser.add_argument("--write", action="store_true", help="write the results, and the README's table")
    options = parser.parse_args()
    name = device_name(torch.device("cuda" if CUDA else "cpu"))
    rows = measured(options.rounds)
    text = table(name, rows)
    print(text)
    if options.write:
        versions = {"torch": torch.__version__, "commit": commit()}
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        result = ROOT / f"benchmarks/results/training/{slug}.json"
        with written_whole(result) as path:
            path.write_text(json.dumps({"device": name, **versions, "rows": rows}, indent=1) + "\n")
        with written_whole(ROOT / "README.md") as path:
            path.write_text(between((ROOT / "README.md").read_text(), text, *MARKS))
