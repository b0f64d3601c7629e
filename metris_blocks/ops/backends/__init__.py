"""One file per way to compute an op; each says why it cannot run (`reasons`) and none imports another."""

from typing import Literal

Backend = Literal["auto", "eager", "sdpa", "xformers", "triton"]
# Of the ops around attention: relevance, selection, aggregation.
CurationBackend = Literal["auto", "eager", "triton"]


def check_backend(op: str, backend: str, reasons: dict[str, list[str]]) -> None:
    """Refuse a backend that is unknown or cannot run; nothing falls back.

    Args:
        op: Who asks, for the message.
        backend: The name the caller gave.
        reasons: Backend name -> why it cannot run these inputs; empty where it can.

    Raises:
        ValueError: ``backend`` is not among the names.
        NotImplementedError: ``backend`` cannot run; the message lists every reason.
    """
    if backend not in reasons:
        raise ValueError(f"{op}: backend must be 'auto' or one of {', '.join(reasons)}, got {backend!r}")
    if why := reasons[backend]:
        raise NotImplementedError(
            f"{op}: backend '{backend}' cannot run: {'; '.join(why)}. Use backend='auto'"
        )
