"""Every choice of a training run; the defaults are the paper's setting, or say where it is silent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reference_model.data.config import DataConfig
from reference_model.model.config import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Train METRIS and keep the weights that score best on val."""

    data: DataConfig
    out: Path = Path("runs/metris")
    """Folder of the run: weights, config, tokenizer, log."""
    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: int = 40
    """Passes over the training sentences; the paper's 40."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: int = 16
    """Sentences per step; the paper's 16."""
    sentences_per_image: int = 1
    """Sentences of one image that a batch holds together; their image is encoded once."""
    learning_rate: float = 3e-5
    """Where AdamW starts; the paper's 3e-5."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero; the paper names none."""
    poly_power: float = 0.9
    """Power of the polynomial decay to zero, per step; the peers' 0.9, the paper prints none."""
    weight_decay: float = 0.01
    """AdamW's, on weights of two or more axes; the peers' 0.01, the paper prints none."""
    clip_norm: float | None = None
    """Largest gradient norm; None clips nothing. The paper names none."""
    contrastive_weight: float = 0.1
    """Weight of Eq. 4; the paper prints none."""
    contrastive_temperature: float = 0.07
    """Where the learnable τ of Eq. 4 starts, > 0; the paper prints none."""
    contrastive_rows: Literal["global", "all"] = "global"
    """Scores that Eq. 4 supervises: the global cue's, as the paper, or every real word's."""
    share_temperature: bool = False
    """One learned temperature for Eq. 4 and the softmax of Eq. 5, from model.aggregation_temperature on."""
    no_target_weight: float = 0.1
    """Weight of the no-target classifier's loss, where there is one; ReLA's 0.1, the paper prints none."""
    cache: bool = False
    """Keep resized images and masks in memory, 3 and 1 bytes per pixel of image_size^2."""
    evaluate_every: int = 1
    """Epochs between two evaluations on val; 0 evaluates once, at the end."""
    seed: int = 0
    """Of weights, order and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class AblateConfig(TrainConfig):
    """Train and score every row of one of the paper's ablation tables, over several seeds.

    Finished runs are skipped, so that an interrupted table goes on where it was.
    """

    out: Path = Path("runs/ablate")
    """Folder of the tables: one folder a run, and each table as .csv, .md and .png."""
    table: str = "5"
    """Table of the paper (5, 6, 8, 9) or figure (fig6), or a study of our own (learning, lite)."""
    rows: str | None = None
    """Rows to run, separated by commas. None: all of the table."""
    seeds: int = 3
    """Runs of each row, in [1, 100]; their seeds count up from seed."""
    jobs: int = 1
    """Runs at a time, in [1, 256]; the processor's cores are shared among them."""
    splits: str = "val"
    """Splits to score, separated by commas; the table shows the first."""
