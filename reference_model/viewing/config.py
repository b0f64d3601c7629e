"""What to predict, and where the pictures go; torch-free."""

from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse.typing import OpenUnitInterval

from reference_model.checkpoints.config import refuse_incomplete
from reference_model.data.config import DataConfig
from reference_model.files import InputError, refuse_unwritable


@dataclass(frozen=True)
class ShowConfig:
    """Draw a page of samples of a data set: ``metris data show PATH``."""

    data: DataConfig
    split: str = "train"
    """Split of the samples."""
    count: int = 12
    """Number of samples, evenly spaced over the split, in [1, 200]."""
    out: Path = Path("samples.png")
    """Picture to write, as PNG."""
    json: bool = False
    """Print JSON instead of a line."""


@dataclass(frozen=True)
class PredictConfig:
    """Predict masks: of one image and its sentences, or of a few samples of a data set beside the truth."""

    checkpoint: Path
    """Folder that train wrote, or file that export wrote."""
    image: Path | None = None
    """Photo, JPEG or PNG of any size; a folder of photos; or a .jsonl of lines such as
    {"image": "cats/1.jpg", "expression": "left cat"}, the path from the folder of that file."""
    expression: list[str] | None = None
    """What to look for in the image; may be given several times."""
    out: Path | None = None
    """Mask to write, as PNG (255 inside) of the image's own size, with an overlay NAME_overlay.png beside it.
    Several sentences number the names. With a folder, a .jsonl or data: the folder of the pictures.
    None: mask.png, or masks for a folder."""
    data: DataConfig | None = None
    """Data set to take samples from, instead of image and expression: --data.root FOLDER and what else
    --data.help lists."""
    split: str = "val"
    """Split of the samples."""
    count: int = 6
    """Number of samples, evenly spaced over the split."""
    threshold: OpenUnitInterval = 0.5
    """Probability above which a pixel belongs to the mask, in (0, 1)."""
    no_target_threshold: OpenUnitInterval = 0.5
    """Probability of "no target", where a model tells it, above which a mask is empty, in (0, 1)."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON instead of a table."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported.

        Raises:
            InputError: An option is missing or contradicts another one, or a file is not there or not ours to
                write.
        """
        brings_sentences = self.image is not None and self.image.suffix.lower() == ".jsonl"
        if self.data is None and (self.image is None or not (self.expression or brings_sentences)):
            step = 'give --image and --expression "the red boat", or --data.root and --split'
            raise InputError("predict", "does not say what to look for, and where", step)
        if self.data is not None and self.image is not None:
            raise InputError("predict", "got --image and --data, expected one of them", "leave one out")
        if self.checkpoint.suffix not in (".onnx", ".pt2") or not self.checkpoint.is_file():
            refuse_incomplete(self.checkpoint)
        if self.data is not None:
            self.data.refuse_missing()
        elif not self.image.exists():
            raise InputError(str(self.image), "no such file", "give an image, a folder of images or a .jsonl")
        elif not (self.image.is_dir() or brings_sentences):
            out = Path("mask.png") if self.out is None else self.out
            if not out.name or out.name == ".." or out.suffix.lower() not in ("", ".png"):
                raise InputError(f"out {out}", "must name a PNG file", "such as mask.png")
            if self.image.resolve() == out.with_suffix(".png").resolve():
                raise InputError(f"out {out}", "is the image itself", "choose another name")
            refuse_unwritable(out.with_suffix(".png"))


@dataclass(frozen=True)
class FiguresConfig:
    """Draw the paper's figures from a run, as PNG and PDF: masks, attention, t-SNE, curves."""

    checkpoint: Path
    """Folder that train wrote."""
    data: DataConfig | None = None
    """Data set to draw from: --data.root FOLDER and what else --data.help lists. None: what the run was
    trained on."""
    against: str | None = None
    """Other runs, separated by commas, that stand beside it in the figures that compare."""
    split: str = "val"
    """Split of the samples."""
    limit: int = 100
    """Images, evenly spaced over the split, behind curves and means, 1 or more; all if it has no more."""
    count: int = 4
    """Rows of a grid of pictures, in [1, 12]."""
    ratios: str = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8"
    """Shares r of curated tokens that the run is scored with, each in (0, 1], separated by commas."""
    ablation: Path | None = None
    """A table-fig6.csv of ``metris ablate --table fig6``: models trained with each r, drawn beside that."""
    out: Path | None = None
    """Folder of the figures. None: figures, in the run."""
    seed: int = 0
    """Of t-SNE and of the pixels it shows, 0 or more."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON instead of a table."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        for run in (self.checkpoint, *(Path(run.strip()) for run in (self.against or "").split(",") if run)):
            refuse_incomplete(run)
        if self.data is not None:
            self.data.refuse_missing()


@dataclass(frozen=True)
class ReportConfig:
    """Write one HTML file about a run, for a person: ``metris report RUN``.

    Config, data, losses, scores with intervals and breakdowns, best, worst and failed samples, ablation
    tables. The file asks nothing of any network.
    """

    run: Path
    """Folder that train wrote."""
    data: DataConfig | None = None
    """Data set to score on: --data.root FOLDER and what else --data.help lists. None: what the run was
    trained on."""
    split: str = "val"
    """Split that is scored, and whose samples are shown."""
    limit: int | None = None
    """Images, evenly spaced over the split, that are scored, 1 or more. None: all."""
    count: int = 6
    """Samples of the best and of the worst, in [1, 48]; four times as many failures."""
    ablations: Path | None = None
    """Folder of tables that ``metris ablate`` wrote. None: those in the folder of the run or beside it."""
    out: Path | None = None
    """HTML file to write. None: report.html in the run."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto takes a GPU where there is one."""
    json: bool = False
    """Print JSON instead of lines."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        refuse_incomplete(self.run)
        if self.data is not None:
            self.data.refuse_missing()


@dataclass(frozen=True)
class PlotConfig:
    """Draw what runs logged, one or several: losses, learning rate and val scores by step."""

    runs: list[Path] = field(default_factory=list)
    """Folders of runs, finished or not; may be given without the option's name."""
    out: Path | None = None
    """The picture, as PNG. None: log.png in the first run."""
    json: bool = False
    """Print JSON instead of a line."""

    def check(self) -> None:
        """Refuse what can be refused before torch is imported."""
        if not self.runs:
            raise InputError("plot", "got no run", "give the folders of runs, as in metris plot RUN RUN")
        for run in self.runs:
            if not (run / "log.jsonl").is_file():
                problem = "cannot be read (No such file or directory)"
                raise InputError(str(run / "log.jsonl"), problem, "give the folder of a run")


@dataclass(frozen=True)
class InfoConfig:
    """Print versions, devices, and which kernels can run here, or why not."""

    json: bool = False
    """Print JSON instead of tables."""
