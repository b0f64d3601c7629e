"""METRIS as a program: one file, ONNX or PyTorch's .pt2, that runs without the code that made it.

Inputs: ``image`` (u, 3, s, s) float32, ``token_ids`` (b, l) int64, ``language_mask`` (b, l) bool,
``image_index`` (b) int64, the image of each sentence. Outputs: ``logits`` (b, s, s), and where the model has
them ``scores`` and ``dynamic_mask`` (b, l, n) and ``no_target`` (b). u, b and l are open, s is fixed. What
turns a photo and a sentence into inputs lies in the file as JSON, under "metris" (in .pt2: metris.json).
"""

import json
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

from metris_blocks.ops import top_r_mask
from reference_model.checkpoints.checkpoint import Checkpoint, load_checkpoint
from reference_model.checkpoints.config import ExportConfig
from reference_model.configs import build, renamed
from reference_model.files import InputError, one_line, written_whole
from reference_model.model.config import ModelConfig
from reference_model.model.metris import IMAGENET_MEAN, IMAGENET_STD, METRIS, ImageFeatures, MetrisOutput
from reference_model.processes import pick_device
from reference_model.tokens import load_tokenizer

Format = Literal["onnx", "pt2"]
Run = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

_TOKENIZER_FILE = re.compile(r"\w+\.(json|txt)")
INPUTS = ("image", "token_ids", "language_mask", "image_index")
OUTPUTS = ("logits", "scores", "dynamic_mask", "no_target")
TOLERANCE = 1e-4
"""How far the numbers of a program may be from the model's, relative to the largest or to 1."""

_KEY = "metris"
# [CLS], a word, [SEP].
_SHORTEST = 3
# Protobuf's limit is 2 GiB, for weights and graph.
_ONNX_BYTES = 2**31 - 2**26
_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    ImportError,
    EOFError,
    pickle.UnpicklingError,
)

RECIPE = {
    "image": "RGB / 255 less mean, by std; resized to a square of image_size, bilinearly and antialiased",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "mask": "sigmoid of the logits, resized bilinearly to the photo, above threshold",
    "threshold": 0.5,
    "no_target_threshold": 0.5,
}
"""How a photo becomes an ``image`` and logits a mask; written into each file."""


class Agreement(NamedTuple):
    """How a program and its model answer the same sentences."""

    differences: dict[str, float]
    """The largest of each output that is a number; of logits among sentences with the same curated tokens."""
    sentences: int
    """How many were asked."""
    turned: int
    """How many of them have other curated tokens, by scores that rounding put in another order."""


def export_program(model: METRIS) -> torch.export.ExportedProgram:
    """Trace a model in evaluation, with batch and words open.

    Raises:
        InputError: A part of the model cannot be traced.
    """
    config = model.config
    if config.backend in ("xformers", "triton"):
        raise InputError(
            f"model.backend is {config.backend}, kernels that no exported program can hold; set backend: "
            "auto in the config.yaml of the checkpoint, the weights are the same"
        )
    example = _example(config, images=2, sentences=5, words=min(7, config.max_tokens))
    images, sentences = torch.export.Dim("images", max=2**16), torch.export.Dim("sentences", max=2**20)
    words: Any = config.max_tokens
    if words > _SHORTEST:
        words = torch.export.Dim("words", min=_SHORTEST, max=config.max_tokens)
    shapes = ({0: images}, {0: sentences, 1: words}, {0: sentences, 1: words}, {0: sentences})
    try:
        with _evaluating(model), torch.no_grad():
            # Not strict: Python runs as it is, and what transformers' code does between tensors is no matter.
            return torch.export.export(
                _Flat(model), tuple(example.values()), dynamic_shapes=shapes, strict=False
            )
    except _REFUSALS as error:
        names = f"image encoder {config.image_encoder}, text encoder {config.text_encoder}"
        raise InputError(f"{names}: cannot be exported ({one_line(error)})") from error


def save_exported(checkpoint: Checkpoint, file: Path, *, format: Format) -> Agreement:
    """Export a model with its tokenizer, hold the file against the model, and put it in place if they agree.

    Args:
        checkpoint: Of a network on the CPU.
        file: Where to write, whole or not at all.
        format: "onnx" or "pt2".

    Returns:
        How the file agrees with the model in evaluation.

    Raises:
        InputError: The model cannot be exported, a package is missing, or the file differs from the model: by
            more than `TOLERANCE` in a number, or in its selection by more than a near tie.
    """
    model = checkpoint.model
    weights = sum(x.nbytes for x in model.state_dict().values())
    if format == "onnx" and weights > _ONNX_BYTES:
        size = f"{weights / 2**30:.1f} GiB of weights, and one ONNX file holds less than 2 GiB"
        raise InputError(f"{file}: the model has {size}; use --format pt2")
    with _written_out(model) if format == "onnx" else nullcontext():
        program = export_program(model)
    with _evaluating(model), written_whole(file) as fresh:
        about = json.dumps(_about(checkpoint), ensure_ascii=False)
        if format == "onnx":
            _save_onnx(program, fresh, about)
        else:
            torch.export.save(program, fresh, extra_files={f"{_KEY}.json": about})
        return agreement(model, load_exported(fresh, format=format), file)


def load(source: Path, *, device: str = "cpu") -> Checkpoint:
    """Load a checkpoint folder, or the file that `save_exported` made of one.

    Args:
        source: Folder or file.
        device: As in `pick_device`; "auto" is the CPU for ONNX.

    Raises:
        InputError: It is neither, or cannot be used there.
    """
    if not source.is_file():
        return load_checkpoint(source, device=pick_device(device))
    if source.suffix not in (".onnx", ".pt2"):
        raise InputError(f"{source}: is neither a checkpoint folder nor an .onnx or .pt2 file")
    if source.suffix == ".onnx" and device == "auto":
        device = "cpu"
    return load_exported(source, device=pick_device(device))


def load_exported(
    file: Path, *, device: torch.device | str = "cpu", format: Format | None = None
) -> Checkpoint:
    """Load an exported model, ready to use like a checkpoint.

    PyTorch unpickles parts of a .pt2 file: load none whose maker you do not trust. ONNX holds no code.

    Args:
        file: Of `save_exported`.
        device: Where a .pt2 runs; ONNX runs on the CPU.
        format: None: the file's suffix.

    Raises:
        InputError: The file cannot be read, is not METRIS's, or cannot run there.
    """
    onnx = file.suffix == ".onnx" if format is None else format == "onnx"
    run, found = _open_onnx(file, device) if onnx else _open_pt2(file, device)
    try:
        about = json.loads(found)
        source = f"{file}, model"
        config = build(ModelConfig, renamed(about["model"], ModelConfig, source, refuse=False), source=source)
        with tempfile.TemporaryDirectory() as folder:
            for name, text in about["tokenizer"].items():
                if not _TOKENIZER_FILE.fullmatch(name):
                    raise InputError(f"{file}: holds {name!r} among its tokenizer's files; export it again")
                (Path(folder) / name).write_text(text, encoding="utf-8")
            tokenizer = load_tokenizer(Path(folder))
        model = ExportedMetris(
            run,
            tuple(about["grid"]),
            tuple(about["extent"]),
            torch.device(device),
            about.get("mean", IMAGENET_MEAN),  # a recipe of one's own could leave them out
            about.get("std", IMAGENET_STD),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{file}: does not say how to use it ({one_line(error)}); export it again"
        ) from error
    return Checkpoint(model, tokenizer, config)


def agreement(model: METRIS, exported: Checkpoint, file: Path) -> Agreement:
    """Hold a program against its model, on other sizes than it was traced with.

    Scores differ by rounding, and where two are as near as that, the last token kept and the first one left
    may change places; what follows from it is no error of the program. Any other selection is one: index by
    index it must be the top r of the program's scores, and these must be the model's.

    Args:
        model: In evaluation, on the CPU.
        exported: What it became.
        file: Its name, for the message.

    Raises:
        InputError: An output is missing, differs by more than `TOLERANCE`, or selects otherwise.
    """
    config = model.config
    inputs = _example(config, images=1, sentences=3, words=min(9, config.max_tokens))
    with torch.no_grad():
        mine, theirs = model(*inputs.values()), exported.model(*inputs.values())
    for name in ("scores", "dynamic_mask", "logits", "no_target"):
        if (getattr(mine, name) is None) != (getattr(theirs, name) is None):
            raise InputError(f"{file}: not written, only one of it and the model has {name}")
    same = torch.ones(len(mine.logits), dtype=torch.bool)
    if mine.dynamic_mask is not None:
        cues = mine.dynamic_mask.any(dim=-1, keepdim=True)
        if not theirs.dynamic_mask.equal(top_r_mask(theirs.scores, config.ratio) & cues):
            raise InputError(f"{file}: not written, what it selects is not the top r of its own scores")
        same = (mine.dynamic_mask == theirs.dynamic_mask).flatten(1).all(dim=1)
        if not same.any():
            raise InputError(
                f"{file}: not written, near ties in every sentence asked leave nothing to compare"
            )
    found: dict[str, float] = {}
    for name in ("scores", "logits", "no_target"):
        one, other = getattr(mine, name), getattr(theirs, name)
        if one is None:
            continue
        kept = slice(None) if name == "scores" else same
        found[name] = (one - other)[kept].abs().max().item()
        if not found[name] <= TOLERANCE * max(1.0, one.abs().max().item()):
            raise InputError(f"{file}: not written, its {name} differ from the model's by {found[name]:.2g}")
    return Agreement(found, len(same), int((~same).sum()))


class ExportedMetris:
    """An exported program, called as `METRIS` is.

    Args:
        run: Named inputs -> named outputs.
        grid: Rows and columns of the visual tokens.
        extent: Height and width that they cover, pixels.
        device: Where it runs.
        mean, std: Of the three channels, by which images are normalised.
    """

    def __init__(
        self,
        run: Run,
        grid: tuple[int, int],
        extent: tuple[int, int],
        device: torch.device,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.run, self.grid, self.extent, self.device = run, grid, extent, device
        self.mean, self.std = (torch.tensor(values, device=device).reshape(3, 1, 1) for values in (mean, std))

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """Keep (u, 3, s, s) uint8 images, normalised: the program encodes them each time that it refers."""
        pixels = image.to(torch.float32, copy=True).div_(255).sub_(self.mean).div_(self.std)
        return ImageFeatures([pixels], (image.shape[-2], image.shape[-1]))

    def refer(
        self, features: ImageFeatures, token_ids: Tensor, language_mask: Tensor, image_index: Tensor
    ) -> MetrisOutput:
        """Give what the model gives, but for its attention maps."""
        return self(features.maps[0], token_ids, language_mask, image_index)

    def __call__(
        self, image: Tensor, token_ids: Tensor, language_mask: Tensor, image_index: Tensor | None = None
    ) -> MetrisOutput:
        """Give what the model gives, but for its attention maps."""
        if image_index is None:
            image_index = torch.arange(len(token_ids), device=token_ids.device)
        out = self.run(dict(zip(INPUTS, (image, token_ids, language_mask, image_index), strict=True)))
        logits, scores, dynamic_mask, no_target = (out.get(name) for name in OUTPUTS)
        return MetrisOutput(logits, scores, dynamic_mask, self.grid, self.extent, no_target, None)


class _Flat(nn.Module):
    """Tensors in, named tensors out: what a program can have of `MetrisOutput`."""

    def __init__(self, model: METRIS) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, image: Tensor, token_ids: Tensor, language_mask: Tensor, image_index: Tensor
    ) -> dict[str, Tensor]:
        output = self.model(image, token_ids, language_mask, image_index)._asdict()
        return {name: output[name] for name in OUTPUTS if output[name] is not None}


def _example(config: ModelConfig, *, images: int, sentences: int, words: int) -> dict[str, Tensor]:
    """Make inputs with sentences of several lengths, all images in use."""
    generator = torch.Generator().manual_seed(0)
    size, rows = config.image_size, torch.arange(sentences)
    lengths = (words - rows % words).clamp_min(min(_SHORTEST, words))
    image = torch.randn(images, 3, size, size, generator=generator)
    ids = torch.randint(config.vocab_size, (sentences, words), generator=generator)
    values = image, ids, torch.arange(words) < lengths[:, None], rows % images
    return dict(zip(INPUTS, values, strict=True))


def _about(checkpoint: Checkpoint) -> dict[str, Any]:
    model = checkpoint.model
    with torch.no_grad():
        output = model(*_example(model.config, images=1, sentences=1, words=_SHORTEST).values())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.tokenizer.save_pretrained(folder)
        # Chat templates, which instruct models bring, are no part of it.
        files = [path for path in sorted(Path(folder).iterdir()) if _TOKENIZER_FILE.fullmatch(path.name)]
        tokenizer = {path.name: path.read_text(encoding="utf-8") for path in files}
    plain = {key: str(x) if isinstance(x, Path) else x for key, x in vars(model.config).items()}
    network = {"pretrained": False, "image_weights": None, "text_weights": None}
    return {
        **RECIPE,
        "image_size": model.config.image_size,
        "max_tokens": model.config.max_tokens,
        "grid": output.grid,
        "extent": output.extent,
        "torch": torch.__version__,
        "model": plain | network,
        "tokenizer": tokenizer,
    }


@contextmanager
def _evaluating(model: METRIS) -> Iterator[None]:
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, was in training.items():
            part.training = was


@contextmanager
def _written_out(model: METRIS) -> Iterator[None]:
    """Write attention out in transformers' models: what Swin's fused kernel becomes, ONNX Runtime refuses,
    and T5's has no form there."""
    parts = (model.image_encoder.backbone, model.text_encoder.bert)
    own = [part for part in parts if hasattr(part, "set_attn_implementation")]  # timm's have none
    usual = {part: part.config._attn_implementation for part in own}
    try:
        for part in usual:
            part.set_attn_implementation("eager")
        yield
    finally:
        for part, implementation in usual.items():
            part.set_attn_implementation(implementation)


def _save_onnx(program: torch.export.ExportedProgram, file: Path, about: str) -> None:
    try:
        from onnxscript import optimizer

        options: dict[str, Any] = {
            "input_names": INPUTS,
            "output_names": list(program.call_spec.out_spec.context),
            # Its search for patterns takes most of the time, and runtimes have their own.
            "optimize": False,
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter to its own developers
            made = torch.onnx.export(program, dynamo=True, verbose=False, **options)
            optimizer.fold_constants(made.model)
            optimizer.remove_unused_nodes(made.model)
        made.model.metadata_props[_KEY] = about
        made.save(file, external_data=False)
    except ModuleNotFoundError as error:
        raise _missing("ONNX", error) from error
    except _REFUSALS as error:
        raise InputError(f"model: has no form in ONNX ({one_line(error)}); use --format pt2") from error


def _open_onnx(file: Path, device: torch.device | str) -> tuple[Run, str]:
    if torch.device(device).type != "cpu":
        raise InputError(f"{file}: an ONNX file runs on the CPU here, but the device is {device}; use cpu")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise _missing(str(file), error) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    # The errors of ONNX Runtime have no class of their own in common but this.
    except Exception as error:
        raise InputError(
            f"{file}: is no ONNX file that can run ({one_line(error)}); export it again"
        ) from error
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = session.run(names, {name: x.numpy() for name, x in inputs.items()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    return run, session.get_modelmeta().custom_metadata_map.get(_KEY, "{}")


def _open_pt2(file: Path, device: torch.device | str) -> tuple[Run, str]:
    extra = {f"{_KEY}.json": ""}
    try:
        program = torch.export.load(file, extra_files=extra)
    except (OSError, BadZipFile, *_REFUSALS) as error:
        step = f"export it again with PyTorch {torch.__version__}"
        raise InputError(f"{file}: is no .pt2 file that can run ({one_line(error)}); {step}") from error
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    module = program.module()
    return lambda inputs: module(*inputs.values()), extra[f"{_KEY}.json"] or "{}"


def _missing(what: str, error: ModuleNotFoundError) -> InputError:
    return InputError(f"{what}: needs {error.name}; pip install 'metris-blocks[export]'")


def export(config: ExportConfig) -> None:
    """Run the command ``export``.

    Raises:
        InputError: The checkpoint cannot be used or exported, or the place not written.
    """
    config.check()
    found = save_exported(load_checkpoint(config.checkpoint), config.out, format=config.format)
    size = config.out.stat().st_size
    if config.json:
        print(json.dumps({"out": str(config.out), "bytes": size, **found._asdict()}))
    else:
        within = ", ".join(f"{name} within {value:.1g}" for name, value in found.differences.items())
        print(f"{config.out}: {size / 2**20:.1f} MiB, {within} of PyTorch's; {selection(found)}")


def selection(found: Agreement) -> str:
    """Say how the selections of a program and its model compare."""
    if "scores" not in found.differences:
        return "it selects nothing"
    if not found.turned:
        return f"the same tokens selected for all {found.sentences} sentences"
    return f"near ties turned, and logits not compared, in {found.turned} of {found.sentences} sentences"
