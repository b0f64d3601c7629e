"""xformers' memory-efficient attention, with the dynamic mask as a tensor bias, on NVIDIA GPUs."""

import ctypes
import functools
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from metris_blocks.ops.backends.opaque import opaque_attention
from metris_blocks.ops.masks import aligned_bias

# Width of a head must fill whole vectors of the kernel.
_HEAD_MULTIPLE = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}
_OLDEST, _NEWEST = (5, 0), (9, 0)


def reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    """Say why this backend cannot run these inputs."""
    why = []
    if query.device.type != "cuda":
        why.append(f"device={query.device.type} (needs cuda)")
    elif not _OLDEST <= (capability := torch.cuda.get_device_capability(query.device)) <= _NEWEST:
        why.append(f"compute capability {capability[0]}.{capability[1]} (a tensor bias needs 5.0 to 9.0)")
    width = query.shape[-1]
    if query.dtype not in _HEAD_MULTIPLE:
        why.append(f"dtype={query.dtype} (needs float16, bfloat16 or float32)")
    elif width % _HEAD_MULTIPLE[query.dtype]:
        why.append(f"head_dim={width} is not a multiple of {_HEAD_MULTIPLE[query.dtype]}")
    # Traced code cannot look for a package; the op itself does when it first runs.
    if not torch.compiler.is_compiling() and (missing := _missing(query.device.type == "cuda")):
        why.append(missing)
    return why


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, l, heads, e), (b, n, heads, e), (b, n, heads, e), (b, l, n) bool -> (b, l, heads, e)."""
    out: Tensor = _attend(query, key, value, mask, scale)[0]
    return out


@functools.cache
def _missing(load: bool) -> str:
    """Name what keeps xformers from running, or "" where nothing does; load its kernels only if asked."""
    if find_spec("xformers") is None:
        return "xformers is not installed (pip install 'metris-blocks[xformers]')"
    if not load:
        return ""
    try:
        common = _fmha().common
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"xformers cannot be imported ({' '.join(str(error).split())})"
    if not common._built_with_cuda:
        return (
            "the CUDA library of xformers cannot be loaded (its wheel needs libcudart.so.12: "
            "pip install nvidia-cuda-runtime-cu12)"
        )
    return ""


@functools.cache
def _fmha() -> ModuleType:
    """Import xformers' kernels, after the CUDA 12 runtime that its wheel is linked to.

    torch 2.11 and later ship CUDA 13, so nothing else brings libcudart.so.12 into the process, and without it
    xformers refuses every operator.
    """
    spec = find_spec("nvidia.cuda_runtime") if find_spec("nvidia") is not None else None
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        library = Path(folder) / "lib" / "libcudart.so.12"
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return import_module("xformers.ops.fmha")


def _bias(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else aligned_bias(mask, query.shape[2], query.dtype)


def _forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    fmha = _fmha()
    out, logsumexp = fmha.memory_efficient_attention_forward_requires_grad(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        attn_bias=_bias(mask, query),
        scale=scale,
        # Named, so that training and inference run one kernel.
        op=fmha.cutlass.FwOp,
    )
    return out.contiguous(), logsumexp[..., : query.shape[1]].contiguous()


def _backward(
    grad: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    fmha = _fmha()
    grads = fmha.memory_efficient_attention_backward(
        grad.contiguous(),
        out,
        logsumexp,
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        attn_bias=_bias(mask, query),
        scale=scale,
        op=fmha.cutlass.BwOp,
    )
    query_grad, key_grad, value_grad = (x.contiguous() for x in grads)
    return query_grad, key_grad, value_grad


# Opaque: traced, xformers' own autograd mixes devices, and its check of the type of a bias refuses the
# tensors that torch.export traces with.
_attend = opaque_attention("xformers_attention", _forward, _backward)
