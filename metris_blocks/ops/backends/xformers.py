"""Place of the xformers kernels; this version has none, and says so where they are asked for."""

from torch import Tensor


def reasons(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> list[str]:
    """Say why this backend cannot run these inputs."""
    return ["this version of metris_blocks has no xformers kernel"]
