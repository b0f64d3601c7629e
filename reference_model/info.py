"""The command ``info``: versions, devices, and which kernels can run here, or why not."""

import json
import platform
from importlib import metadata
from typing import Any

import torch

from metris_blocks.ops import auto_backend, explain_backends, masked_softmax_aggregation, top_r_mask
from reference_model.scoring.table import aligned
from reference_model.viewing.config import InfoConfig

# package -> the extra that brings it; "" for those of the library itself
PACKAGES = {
    "metris-blocks": "",
    "torch": "",
    "einops": "",
    "triton": "",
    "xformers": "xformers",
    "timm": "reference",
    "transformers": "reference",
    "safetensors": "reference",
    "pycocotools": "reference",
    "pillow": "reference",
    "numpy": "reference",
    "pyarrow": "data",
    "webdataset": "data",
    "gradio": "app",
    "matplotlib": "report",
    "scikit-learn": "report",
    "onnxruntime": "export",
}


def info(config: InfoConfig) -> dict[str, Any]:
    """Run the command ``info`` and return what ``--json`` prints."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "backends": [row for device, dtype in _places() for row in backends(device, dtype)],
    }
    print(json.dumps(found, indent=2) if config.json else _text(found))
    return found


def backends(device: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Ask each op, at the sizes of stage 4 (n = 225, l = 21, 8 heads of 96), which backends can run.

    Returns:
        One row an op and backend: op, device, dtype, backend, ``why_not`` (empty where it runs), and
        ``auto``: whether "auto" takes it (attention alone; the others take "eager").
    """
    query = torch.zeros(1, 21, 8, 96, device=device, dtype=dtype)
    key = torch.zeros(1, 225, 8, 96, device=device, dtype=dtype)
    mask = torch.ones(1, 21, 225, dtype=torch.bool, device=device)
    chosen = auto_backend(query, key, key, mask)
    rows = [
        {"op": "masked_attention", "backend": name, "auto": name == chosen, "why_not": why}
        for name, why in explain_backends(query, key, key, mask).items()
    ]
    scores, visual = (torch.zeros(1, k, m, device=device, dtype=dtype) for k, m in ((21, 225), (225, 1024)))
    ops = {
        "top_r_mask": lambda name: top_r_mask(scores, 0.3, backend=name),
        "masked_softmax_aggregation": lambda name: masked_softmax_aggregation(
            scores, mask, visual, backend=name
        ),
    }
    for op, call in ops.items():
        for name in ("eager", "triton"):
            why = []
            try:
                call(name)
            except NotImplementedError as error:
                why = [str(error).split("cannot run: ")[-1].removesuffix(". Use backend='auto'")]
            rows.append({"op": op, "backend": name, "auto": name == "eager", "why_not": why})
    return [{"device": device, "dtype": str(dtype).removeprefix("torch.")} | row for row in rows]


def _places() -> list[tuple[str, torch.dtype]]:
    places = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        places += [("cuda", torch.float32), ("cuda", torch.bfloat16)]
    return places


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu, {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found.append(f"cuda:{number}, {card.name}, compute capability {card.major}.{card.minor}, {memory}")
    return found


def _text(found: dict[str, Any]) -> str:
    packages = [
        [name, version or "not installed" + f"; pip install 'metris-blocks[{extra}]'" * bool(extra)]
        for (name, version), extra in zip(found["packages"].items(), PACKAGES.values())
    ]
    rows = [["op", "device", "dtype", "backend", "runs"]]
    for row in found["backends"]:
        runs = "no: " + "; ".join(row["why_not"]) if row["why_not"] else "yes" + ", auto" * row["auto"]
        rows.append([row[key] for key in ("op", "device", "dtype", "backend")] + [runs])
    devices = found["devices"] + ["no CUDA device: torch sees none"] * (len(found["devices"]) == 1)
    return "\n".join(
        [
            f"python {found['python']}, {found['system']}",
            aligned(packages, left=2),
            "",
            *devices,
            "",
            aligned(rows, left=5),
        ]
    )
