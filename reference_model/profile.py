"""The command ``profile``: what the model costs, part by part, and beside its peers."""

import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reference_model.configs import build, preset_file, preset_names, read_yaml
from reference_model.cost import device_name, latencies, multiply_adds, peak_bytes
from reference_model.files import InputError
from reference_model.model.build import build_metris
from reference_model.model.config import ModelConfig, ProfileConfig
from reference_model.model.metris import METRIS
from reference_model.processes import pick_device

Rows = list[dict[str, Any]]
_filled = partial(textwrap.fill, width=110)

# Row -> where it is in METRIS, if it is. The parts add up; the plain image encoder lies within the first.
PARTS = {
    "image encoder": "image_encoder",
    "text encoder": "text_encoder",
    "language enhancer": "guidance.enhancer",
    "extractor": "guidance.extractor",
    "pixels": "guidance.pixels",
    "no-target head": "no_target",
    "decoder": "decoder",
}
ROWS = PARTS | {"whole model": "", "plain image encoder": "image_encoder.backbone"}

_PRINTED, _RERUN = "published: METRIS, Table 2", "its code, run before"
# Facts to stand beside: model, millions of parameters, GMACs, milliseconds, source.
ELSEWHERE = (
    ("METRIS", None, 432, None, _PRINTED),
    ("DMMI", None, 392, None, _PRINTED),
    ("CGFormer", None, 950, None, _PRINTED),
    ("LAVT Swin-B", 227.74, 198.99, 3000, _RERUN),
    ("ReLA Swin-B", 225.52, 131.30, 2530, _RERUN),
    ("MagNet Swin-B", 296.98, 163.87, 4910, _RERUN),
    ("DMMI Swin-B", 340.58, 416.42, 5110, _RERUN),
    ("CGFormer Swin-B", 253.71, 948.96, 9050, _RERUN),
    ("CRIS CLIP-RN101", 161.25, 104.85, 940, _RERUN),
    ("ETRIS CLIP-ViT-B/16", 173.43, 135.49, 1190, _RERUN),
    ("plain Swin-B", 86.88, 85.24, 1290, _RERUN),
)
_NOTES = """\
GMACs: 10^9 multiply-adds of matrix products, convolutions and attention. ms: median of the rounds. peak: what
the allocator holds at once beyond weights and inputs. plain image encoder: {} as its library has it, a share
of the first row."""
_ELSEWHERE_NOTES = """\
Run before: the peers' released code with random weights, 480 px, 20 tokens, batch 1, float32, torch 2.15, on
2 shared cores of an Intel Xeon, median of 5. These ms compare with each other, not with those above. 24 of
the GMACs of DMMI's code are a branch that inference does not use."""


def profile(config: ProfileConfig) -> dict[str, Any]:
    """Run the command ``profile`` and return what ``--json`` prints.

    Raises:
        InputError: A value is out of range, or the model cannot be built or does not fit on the device.
    """
    for name in ("batch_size", "sentences", "rounds", "threads"):
        if (value := getattr(config, name)) is not None and not 1 <= value <= 1024:
            raise InputError(f"{name}: must be in [1, 1024], got {value}")
    device = pick_device(config.device)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {config.device}: cannot be measured here; use cpu or cuda")
    network = replace(config.model, pretrained=False)
    size = network.image_size if config.image_size is None else config.image_size
    tokens = network.max_tokens if config.tokens is None else config.tokens
    sized = replace(network, image_size=size)
    model = build_metris(sized).eval()
    longest = model.text_encoder.longest
    if tokens < 3 or (longest is not None and tokens > longest):
        places = "at least 3" if longest is None else f"in [3, {longest}], what the text encoder can place"
        raise InputError(f"tokens: must be {places}; got {tokens}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    report = {
        "preset": _preset_of(network),
        "image_size": size,
        "tokens": tokens,
        "batch_size": config.batch_size,
        "rounds": config.rounds,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": "float32",
    }
    if not config.json:
        print(_filled(" · ".join(f"{key} {value}" for key, value in report.items())), flush=True)
    sentences = (max(config.batch_size, config.sentences), tokens)
    try:
        images = torch.randn(config.batch_size, 3, size, size, device=device)
        token_ids = torch.randint(model.text_encoder.vocab_size, sentences, device=device)
        report |= _measured(model.to(device), images, token_ids, config.sentences, config.rounds)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{device}: has too little memory; lower batch_size or sentences") from error
    columns = ("model", "parameters_M", "GMACs", "ms", "source")
    report["not_measured_here"] = [dict(zip(columns, row, strict=True)) for row in ELSEWHERE]
    report["model"] = asdict(sized)
    print(json.dumps(report, indent=2, default=str) if config.json else _text(report))
    return report


@torch.inference_mode()
def _measured(
    model: METRIS, images: Tensor, token_ids: Tensor, sentences: int, rounds: int
) -> dict[str, Rows]:
    """Measure each part at one sentence an image, and the whole at several sentences about one image."""
    b, mask, first = len(images), torch.ones_like(token_ids).bool(), torch.zeros_like(token_ids[:, 0])
    batch = (images, token_ids[:b], mask[:b])
    about_one = {k: (images[:1], token_ids[:k], mask[:k], first[:k]) for k in sorted({1, sentences})}
    paths = dict(model.named_modules()).keys()
    rows = {row: path for row, path in ROWS.items() if path in paths}
    calls = _calls(model, rows, *batch)
    in_turn = calls | {k: partial(model, *inputs) for k, inputs in about_one.items()}
    bar = tqdm(range(rounds + 1), desc="profile", unit="round", leave=False, disable=None)
    ms = latencies(in_turn, bar, images.device)
    macs = multiply_adds(model, *batch)
    parts = [
        {
            "part": row,
            "parameters_M": sum(p.numel() for p in model.get_submodule(path).parameters()) / 1e6,
            "GMACs": macs[path] / 1e9,
            "GMACs_%": 100 * macs[path] / macs[""],
            "ms": median(ms[row]),
            "least_ms": min(ms[row]),
            # Round by round: a machine that slows down slows both.
            "ms_%": median(100 * x / whole for x, whole in zip(ms[row], ms["whole model"])),
            "peak_MiB": peak_bytes(calls[row], images.device) / 2**20,
        }
        for row, path in rows.items()
    ]
    shared = [
        {
            "sentences": k,
            "GMACs": multiply_adds(model, *inputs)[""] / 1e9,
            "ms": median(ms[k]),
            "ms_a_sentence": median(ms[k]) / k,
        }
        for k, inputs in about_one.items()
    ]
    return {"parts": parts, "one_image_encoded_once": shared}


def _calls(model: METRIS, rows: dict[str, str], *inputs: Tensor) -> dict[Any, Callable[[], object]]:
    """Give each row as a call of its module with what that gets in a forward pass."""
    calls, hooks = dict.fromkeys(rows), []
    for row, path in rows.items():
        note = lambda module, args, kwargs, row=row: calls.update({row: partial(module, *args, **kwargs)})
        hooks.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
    model(*inputs)
    for hook in hooks:
        hook.remove()
    return calls


def _preset_of(network: ModelConfig) -> str | None:
    """Name the preset that is this very network; None where an option says otherwise."""
    for name in preset_names():
        values = read_yaml(preset_file(name), ModelConfig, section="model")
        if replace(build(ModelConfig, values, source=name), pretrained=False) == network:
            return name
    return None


def _text(report: dict[str, Any]) -> str:
    return f"""
{_table(report["parts"])}
{_filled(_NOTES.format(report["model"]["image_encoder"]))}

one image, encoded once for all its sentences
{_table(report["one_image_encoded_once"])}

published or run before, not measured here
{_table(report["not_measured_here"])}
{_filled(_ELSEWHERE_NOTES)}"""


def _table(rows: Rows) -> str:
    """Lay out rows of the same keys, which are the headings."""
    cells = [[key.replace("_", " ") for key in rows[0]], *([_shown(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    line = lambda row: [row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:]))]
    return "\n".join("  ".join(line(row)) for row in cells)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if value >= 10 else f"{value:.3g}"
    return "-" if value is None else str(value)
