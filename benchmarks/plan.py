"""Plan training past one machine: throughput, memory and communication of a step from 1 to 1,024 GPUs.

    metris profile --preset metris_swin_b --rounds 1 --json > profile.json
    python -m benchmarks.plan profile.json

Nothing here is measured on a cluster. Parameters and multiply-adds are those that `metris profile` counted,
what the backward pass keeps is counted on one sentence of a training step, and the rest are the constants
below, which the table prints. Rewrites the table of docs/scale.md.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference_model.configs import build
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig
from reference_model.model.loss import MetrisLoss
from reference_model.training.objective import Objective

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SENTENCES = 120_624
"""Of RefCOCO's training split."""
EPOCHS = 40
"""The paper's."""


class Assumptions(NamedTuple):
    """What the plan takes for granted; the vendor's numbers, or a guess that says so."""

    peak: float = 989e12
    """FLOP/s of one H100 SXM in bf16, dense (NVIDIA's data sheet)."""
    utilisation: float = 0.35
    """Share of it that a step reaches: a guess, `metris train --dry-run` replaces it."""
    backward: float = 2.0
    """Work of the backward pass, in forward passes."""
    batch: int = 16
    """Sentences a GPU takes in a step (weak scaling), each about its own image."""
    node: int = 8
    """GPUs that NVLink connects."""
    nvlink: float = 450e9
    """Bytes/s a GPU sends within its node (NVLink 4, one direction)."""
    network: float = 50e9
    """Bytes/s a GPU sends to another node (400 Gb/s InfiniBand a GPU)."""
    hop: float = 10e-6
    """Seconds that each of the ring's hops takes however little is sent: a guess."""


class Step(NamedTuple):
    """One row of the plan."""

    gpus: int
    sentences: int
    compute_ms: float
    sent_ddp_gb: float
    """10^9 bytes a GPU sends in a step."""
    sent_fsdp_gb: float
    exposed_ms: float
    """What DDP's communication adds where none of it hides behind the backward pass."""
    images_per_second: float
    efficiency: float
    memory_ddp: float
    """GiB a GPU."""
    memory_fsdp: float
    hours: float


def ring_bytes(gpus: int, size: float, passes: int) -> float:
    """Give the bytes each of ``gpus`` sends when a ring passes ``size`` bytes around ``passes`` times.

    An all-reduce is two passes (reduce-scatter, all-gather), each of (N - 1)/N of the data (Patarasuk and
    Yuan 2009).
    """
    return passes * size * (gpus - 1) / gpus


def ring_seconds(gpus: int, size: float, passes: int, given: Assumptions) -> float:
    """Give the time of that: the slowest link sets the pace, and every hop waits once."""
    link = given.nvlink if gpus <= given.node else given.network
    return ring_bytes(gpus, size, passes) / link + passes * (gpus - 1) * given.hop


def plan(parameters: int, macs: float, kept: float, given: Assumptions) -> list[Step]:
    """Lay out a step on each number of GPUs.

    Args:
        parameters: Of the model.
        macs: Multiply-adds of a forward pass of one sentence.
        kept: Bytes that the forward pass of one sentence keeps for the backward pass.
        given: All else.
    """
    work = 2 * macs * (1 + given.backward) * given.batch
    compute = work / (given.peak * given.utilisation)
    gradients = 4 * parameters  # float32
    states = 16 * parameters  # weights, gradients and two moments, float32
    steps = []
    for n in GPUS:
        exposed = ring_seconds(n, gradients, 2, given)
        rate = n * given.batch / (compute + exposed)
        steps.append(
            Step(
                gpus=n,
                sentences=n * given.batch,
                compute_ms=1e3 * compute,
                sent_ddp_gb=ring_bytes(n, gradients, 2) / 1e9,
                # Weights are gathered for the forward and for the backward pass, gradients scattered.
                sent_fsdp_gb=ring_bytes(n, gradients, 3) / 1e9,
                exposed_ms=1e3 * exposed,
                images_per_second=rate,
                efficiency=compute / (compute + exposed),
                memory_ddp=(states + given.batch * kept) / 2**30,
                memory_fsdp=(states / n + given.batch * kept) / 2**30,
                hours=EPOCHS * SENTENCES / rate / 3600,
            )
        )
    return steps


def kept_bytes(model: ModelConfig) -> int:
    """Count what a training step of one sentence keeps for its backward pass, weights aside; float32."""
    objective = Objective(build_metris(model), MetrisLoss(contrastive_weight=0.1, temperature=0.07)).train()
    weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
    # Held while they are counted, or a freed address would be counted for another tensor.
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    side, ids = model.image_size, torch.ones(1, model.max_tokens, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        objective(
            torch.zeros(1, 3, side, side),
            torch.zeros(1, dtype=torch.long),
            ids,
            ids.bool(),
            torch.zeros(1, side, side),
            torch.zeros(1, dtype=torch.bool),
        )
    return sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in weights)


def text(profile: dict[str, Any], kept: float, given: Assumptions) -> str:
    """Lay out the assumptions and the table."""
    whole = next(part for part in profile["parts"] if part["part"] == "whole model")
    parameters, macs = round(1e6 * whole["parameters_M"]), 1e9 * whole["GMACs"]
    lines = [
        f"Counted by `metris profile` ({profile['preset'] or profile['model']['image_encoder']}, "
        f"{profile['image_size']} px, {profile['tokens']} tokens): {whole['parameters_M']:.1f} M parameters, "
        f"{whole['GMACs']:.1f} GMACs a sentence. Counted on one training step: {kept / 2**20:.0f} MiB a "
        "sentence kept for the backward pass, in float32.",
        "",
        "| assumed | value |",
        "|---|---|",
        f"| peak of a GPU (H100 SXM, bf16, dense; data sheet) | {given.peak / 1e12:.0f} TFLOP/s |",
        f"| share of it that is reached (a guess) | {given.utilisation:.0%} |",
        f"| backward pass | {given.backward:g} forward passes |",
        f"| sentences a GPU and step, one an image | {given.batch} |",
        f"| GPUs a node | {given.node} |",
        f"| within a node (NVLink 4, one direction) | {given.nvlink / 1e9:.0f} GB/s a GPU |",
        f"| between nodes (InfiniBand) | {given.network / 1e9:.0f} GB/s a GPU |",
        f"| a hop of the ring (a guess) | {1e6 * given.hop:.0f} µs |",
        "| gradients and weights that travel | float32, by a ring; none hidden behind the backward pass |",
        f"| a run | {EPOCHS} epochs of {SENTENCES:,} sentences (RefCOCO) |",
        "",
        "| GPUs | sentences a step | compute (ms) | DDP sends (GB a GPU) | FSDP2 sends (GB a GPU) "
        "| all-reduce (ms) | images/s | efficiency | DDP (GiB a GPU) | FSDP2 (GiB a GPU) | hours a run |",
        "|" + "---:|" * 11,
    ]
    for row in plan(parameters, macs, kept, given):
        lines.append(
            f"| {row.gpus} | {row.sentences} | {row.compute_ms:.0f} | {row.sent_ddp_gb:.2f} "
            f"| {row.sent_fsdp_gb:.2f} | {row.exposed_ms:.1f} | {row.images_per_second:,.0f} "
            f"| {row.efficiency:.0%} | {row.memory_ddp:.1f} | {row.memory_fsdp:.1f} | {row.hours:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print the plan of a profile and write it into docs/scale.md."""
    if len(arguments) != 1:
        sys.exit("usage: python -m benchmarks.plan PROFILE.json, as `metris profile --json` printed it")
    profile = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    model = build(ModelConfig, profile["model"], source=arguments[0])
    found = text(profile, kept_bytes(replace(model, pretrained=False)), Assumptions())
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main(sys.argv[1:])
