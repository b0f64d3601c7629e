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
    """Sentences per optimiser step, of all processes together; the paper's 16."""
    accumulate: int = 1
    """Pieces of its share of a step's sentences that a process takes one after the other, each in less
    memory. Batch norm sees one piece at a time. The paper names none."""
    sentences_per_image: int = 1
    """Sentences of one image that a batch holds together; their image is encoded once."""
    learning_rate: float = 3e-5
    """Where AdamW starts; the paper's 3e-5."""
    image_encoder_lr: float = 1.0
    """Multiplies the learning rate of the image encoder; 0 freezes it, with its dropout and batch statistics.
    The paper names none (LAVT none, CRIS and ETRIS 0.1)."""
    text_encoder_lr: float = 1.0
    """The same for the text encoder."""
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
    no_target_weight: float = 0.1
    """Weight of the no-target classifier's loss, where there is one; ReLA's 0.1, the paper prints none."""
    cache: bool = False
    """Decode and resize each image and mask once: a temporary file in TMPDIR, which all workers share, keeps
    them for the run, 3 and 1 bytes per pixel of image_size^2; each process of torchrun has its own."""
    evaluate_every: int = 1
    """Epochs between two evaluations on val; 0 evaluates once, at the end."""
    ema_decay: float | None = None
    """Score and keep a moving average of the weights, which forgets this little a step, in (0, 1), such as
    0.999. None: the weights themselves; the paper names no average."""
    train_split: Literal["train", "train_seen"] = "train"
    """Split to train on: all of it, or its seen classes (the paper's open-vocabulary setting)."""
    val_split: Literal["val", "val_seen"] = "val"
    """Split that selects the weights; no test split can."""
    skip_nonfinite: int = 0
    """Steps of a run that may be left out because their loss is not finite; one more stops it."""
    log_every: int = 10
    """Steps between two lines of the log and of the bar."""
    save_every: int = 500
    """Steps between two saved states, which a killed run goes on from; 0 saves at evaluations and SIGTERM
    alone."""
    keep_last: int = 2
    """Saved states to keep, the newest; all go when the run is finished."""
    keep_best: int = 1
    """Best evaluations whose weights are kept: the best in the run itself, with 2 or more each in best/."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the forward and backward pass; weights and their updates stay float32. fp16 needs a GPU. The paper
    prints none."""
    sharding: Literal["none", "fsdp2"] = "none"
    """With several processes: each has all weights (DDP), or each a share of them (FSDP2)."""
    checkpoint_activations: bool = False
    """Compute each layer a second time for the backward pass instead of keeping what it holds in memory; not
    layers with batch norm, such as metris_tiny's image encoder. The paper names none."""
    compile: bool = False
    """Compile the model with torch.compile; the first steps take minutes. The paper names none."""
    channels_last: bool = True
    """Lay out weights of convolutions so that the channels of a pixel are side by side; FSDP2 cannot. Of
    speed alone, the paper names none."""
    tracker: Literal["none", "tensorboard", "trackio"] = "none"
    """Send the log there too, through accelerate; log.jsonl is written in any case."""
    dry_run: bool = False
    """Build everything, do two steps, print memory and the time the whole run would take; write nothing."""
    seed: int = 0
    """Of weights, order and dropout."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, under torchrun each process its own."""
    json: bool = False
    """Print the result as JSON."""


RESOURCES = (
    *("out", "device", "json", "dry_run", "cache", "tracker", "log_every", "save_every", "keep_last"),
    *("accumulate", "sharding", "checkpoint_activations", "compile", "skip_nonfinite"),
)
"""Fields that say where and with what a run is done and not what it computes: it may go on with others."""


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
