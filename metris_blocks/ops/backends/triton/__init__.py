"""Triton kernels: score, select, aggregate, attend. Importing this package imports no triton.

One file per stem registers opaque custom ops, so that traced code sees one node with known shapes; what they
run lies in `kernels` and is imported, with triton, on the first call. ``TRITON_INTERPRET=1``, set before
metris_blocks is imported, runs the same kernels on the CPU, slowly: for tests.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from metris_blocks.ops.backends import check_backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INSTALLED = find_spec("triton") is not None
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (8, 0)


def runs(op: str, backend: str, *tensors: Tensor, longest_row: int | None = None) -> bool:
    """Tell whether ``backend``, "auto", "eager" or "triton", means these kernels; refuse it if it cannot run.

    Raises:
        ValueError, NotImplementedError: As `check_backend`.
    """
    if backend == "auto":
        return False
    check_backend(op, backend, {"eager": [], "triton": reasons(*tensors, longest_row=longest_row)})
    return backend == "triton"


def reasons(*tensors: Tensor | None, longest_row: int | None = None) -> list[str]:
    """Say why these kernels cannot run on tensors like the first (masks and None are passed over).

    Args:
        tensors: What they would run on.
        longest_row: The most elements that a row of the first may have. None: any number.
    """
    why = []
    given = [x for x in tensors if x is not None and x.dtype is not torch.bool]
    if not _INSTALLED:
        why.append("triton is not installed (pip install triton)")
    device = given[0].device
    if device.type != "cuda" and not INTERPRETED:
        why.append(f"device={device.type} (needs cuda, or TRITON_INTERPRET=1 in the environment)")
    elif device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        why.append(f"compute capability {capability[0]}.{capability[1]} (needs 8.0 or newer)")
    if wrong := {x.dtype for x in given} - set(_DTYPES):
        why.append(f"dtype={', '.join(map(str, wrong))} (needs float16, bfloat16 or float32)")
    if longest_row is not None and (n := given[0].shape[-1]) > longest_row:
        why.append(f"n={n} (at most {longest_row})")
    return why
