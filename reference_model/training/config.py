"""Every choice of a training run; the defaults are the paper's setting, or say where it is silent."""

from dataclasses import dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt

from reference_model.configs import NotNegative, Positive, Seed
from reference_model.data.config import DataConfig
from reference_model.files import InputError
from reference_model.model.config import ModelConfig

RESOURCE = {"resource": True}
"""Marks an option that says where and with what a run is done and not what it computes: an interrupted run
may go on with another value of it."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning rate."""

    learning_rate: Positive = 3e-5
    """Where AdamW starts, > 0; the paper's 3e-5."""
    image_encoder_lr: NotNegative = 1.0
    """Multiplies the learning rate of the image encoder, >= 0; 0 freezes it, with its dropout and batch
    statistics. The paper names none (LAVT none, CRIS and ETRIS 0.1)."""
    text_encoder_lr: NotNegative = 1.0
    """The same for the text encoder."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero; the paper names none."""
    poly_power: NotNegative = 0.9
    """Power of the polynomial decay to zero, per step; the peers' 0.9, the paper prints none."""
    weight_decay: NotNegative = 0.01
    """AdamW's, on weights of two or more axes; the peers' 0.01, the paper prints none."""
    clip_norm: Positive | None = None
    """Largest gradient norm, > 0; None clips nothing. The paper names none."""
    ema_decay: OpenUnitInterval | None = None
    """Score and keep a moving average of the weights, which keeps this share of itself at each step, in
    (0, 1), such as 0.999. None: the weights themselves; the paper names no average."""


@dataclass(frozen=True)
class LossConfig:
    """Terms of the loss beside the mask's binary cross-entropy."""

    contrastive_weight: NotNegative = 0.1
    """Weight of Eq. 4, >= 0; the paper prints none."""
    contrastive_temperature: Positive = 0.07
    """Where the learnable τ of Eq. 4 starts, > 0; the paper prints none."""
    no_target_weight: NotNegative = 0.1
    """Weight of the no-target classifier's loss, where there is one, >= 0; ReLA's 0.1, the paper prints
    none."""


@dataclass(frozen=True)
class CheckpointingConfig:
    """What is saved when, and what happens to steps whose loss is not finite."""

    save_every: NonNegativeInt = field(default=500, metadata=RESOURCE)
    """Steps between two saved states, from which a killed run resumes; 0 saves at evaluations and SIGTERM
    alone."""
    keep_last: PositiveInt = field(default=2, metadata=RESOURCE)
    """Saved states to keep, the newest, 1 or more; all go when the run is finished."""
    keep_best: PositiveInt = 1
    """Best evaluations whose weights are kept, 1 or more: the best in the run itself, with 2 or more each in
    best/."""
    skip_nonfinite: NonNegativeInt = field(default=0, metadata=RESOURCE)
    """Steps of a run that may be left out because their loss is not finite; one more stops it."""


@dataclass(frozen=True)
class ParallelConfig:
    """Processes, memory and number formats."""

    accumulate: PositiveInt = field(default=1, metadata=RESOURCE)
    """Gradient accumulation: micro-batches per process and step, 1 or more. Batch norm sees one at a time.
    The paper names none."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the forward and backward pass; weights and their updates stay float32. fp16 needs a GPU. The paper
    prints none."""
    sharding: Literal["none", "fsdp2"] = field(default="none", metadata=RESOURCE)
    """With several processes: each has all weights (DDP), or each a share of them (FSDP2)."""
    checkpoint_activations: bool = field(default=False, metadata=RESOURCE)
    """Compute each layer a second time for the backward pass instead of keeping what it holds in memory; not
    layers with batch norm, such as metris_tiny's image encoder. The paper names none."""
    compile: bool = field(default=False, metadata=RESOURCE)
    """Compile the model with torch.compile; the first steps take minutes. The paper names none."""
    channels_last: bool = True
    """Lay out weights of convolutions so that the channels of a pixel are side by side; FSDP2 cannot. Of
    speed alone, the paper names none."""


@dataclass(frozen=True)
class LoggingConfig:
    """Where the course of a run can be followed."""

    log_every: PositiveInt = field(default=10, metadata=RESOURCE)
    """Steps between two lines of the log and of the bar, 1 or more."""
    tracker: Literal["none", "tensorboard", "trackio"] = field(default="none", metadata=RESOURCE)
    """Send the log there too, through accelerate; log.jsonl is written in any case."""


@dataclass(frozen=True)
class TrainConfig:
    """Train METRIS and keep the weights that score best on val."""

    data: DataConfig
    out: Path = field(default=Path("runs/metris"), metadata=RESOURCE)
    """Folder of the run: weights, config, tokenizer, log."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    epochs: PositiveInt = 40
    """Passes over the training sentences, 1 or more; the paper's 40. Given on the command line, it stands
    above the steps of a preset."""
    steps: PositiveInt | None = None
    """Optimiser steps, 1 or more, instead of epochs."""
    batch_size: PositiveInt = 16
    """Sentences per optimiser step, of all processes together, 1 or more; the paper's 16."""
    sentences_per_image: PositiveInt = 1
    """Sentences of one image that a batch holds together, 1 or more; their image is encoded once."""
    cache: bool = field(default=False, metadata=RESOURCE)
    """Decode and resize each image and mask once: a temporary file in TMPDIR, which all workers share, keeps
    them for the run, 3 and 1 bytes per pixel of image_size^2; each process of torchrun has its own."""
    evaluate_every: NonNegativeInt = 1
    """Epochs between two evaluations on val; 0 evaluates once, at the end."""
    train_split: Literal["train", "train_seen"] = "train"
    """Split to train on: all of it, or its seen classes (the paper's open-vocabulary setting)."""
    val_split: Literal["val", "val_seen"] = "val"
    """Split that selects the weights; no test split can."""
    seed: Seed = 0
    """Of weights, order and dropout, in [0, 2^31)."""
    device: str = field(default="auto", metadata=RESOURCE)
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one, under torchrun each process its own."""
    dry_run: bool = field(default=False, metadata=RESOURCE)
    """Build everything, do two steps, print memory and the time the whole run would take; write nothing."""
    json: bool = field(default=False, metadata=RESOURCE)
    """Print the result as JSON."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            InputError: A split could select by a test, or a tracker is not installed.
        """
        for name in ("train", "val"):
            split = getattr(self, f"{name}_split")
            if split not in (name, f"{name}_seen"):
                problem = f"must be {name} or {name}_seen, got {split}"
                raise InputError(f"{name}_split", problem, "tests select nothing")
        self.data.refuse_missing()
        tracker = self.logging.tracker
        if tracker != "none" and find_spec(tracker) is None:
            raise InputError(f"tracker {tracker}", "is not installed", f"pip install {tracker}")


def resources(config: Any, prefix: str = "") -> dict[str, Any]:
    """Give the options marked as resources, by dotted names, with their values."""
    found: dict[str, Any] = {}
    for one in fields(config):
        value = getattr(config, one.name)
        if is_dataclass(value):
            found |= resources(value, f"{prefix}{one.name}.")
        elif one.metadata.get("resource"):
            found[f"{prefix}{one.name}"] = value
    return found


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
    seeds: PositiveInt = 3
    """Runs of each row, 1 or more; their seeds count up from seed."""
    jobs: PositiveInt = 1
    """Runs at a time, 1 or more; the processor's cores are shared among them."""
    splits: str = "val"
    """Splits to score, separated by commas; the table shows the first."""
