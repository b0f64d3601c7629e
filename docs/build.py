"""Build the API pages from the docstrings: python docs/build.py FOLDER. They ask nothing of any server."""

import inspect
import re
import sys
from pathlib import Path

import pdoc
from torch import nn

import metris_blocks
from metris_blocks import layers

PICTURE = Path(__file__).with_name("path.svg")
MODULES = (
    "metris_blocks",
    "metris_blocks.ops",
    "metris_blocks.layers",
    # The reference model: how it is built, loaded, called, exported, asked.
    "reference_model.model.config",
    "reference_model.model.build",
    "reference_model.model.metris",
    "reference_model.checkpoints.checkpoint",
    "reference_model.checkpoints.export",
    "reference_model.viewing.predict",
)
_ARGUMENT = re.compile(r"^    (\w+): (\([a-z_, ]*\))( bool)?,?(.*)$", re.MULTILINE)
_RESULT = re.compile(r"\(([a-z_1+, ]*)\)( bool)? ?([^,.;(]*)")


def shape_table(block: type[nn.Module]) -> str:
    """Make a table of axes from the docstring of a block's ``forward``."""
    said = inspect.getdoc(block.forward) or ""
    arguments, _, returns = said.partition("Returns:")
    rows = [
        (f"`{name}`", axes, "bool" if boolean else "float", rest.strip(" ;,").split(";")[0].split(".")[0])
        for name, axes, boolean, rest in _ARGUMENT.findall(arguments)
    ]
    for axes, boolean, rest in _RESULT.findall(returns.split("Raises:")[0]):
        what = rest.strip().removesuffix(" and")
        rows.append(("returns", f"({axes})", "bool" if boolean else "float", what))
    lines = ["| `forward` | axes | dtype | what |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def build(folder: Path) -> None:
    """Write the pages."""
    blocks = [getattr(metris_blocks, name) for name in metris_blocks.__all__]
    for public in [*blocks, layers.MultiHeadAttention, layers.AttentionLayer]:
        if issubclass(public, nn.Module):
            # Of this process alone: the docstring in the source says every shape once, in forward.
            public.__doc__ = f"{inspect.cleandoc(public.__doc__)}\n\n**Shapes**\n\n{shape_table(public)}\n"
    metris_blocks.__doc__ = f"{metris_blocks.__doc__}\n\n{PICTURE.read_text(encoding='utf-8')}\n"
    pdoc.render.configure(docformat="google", search=True, math=False, show_source=False)
    # A module brings its submodules along; the list above says which are public.
    pdoc.pdoc(*MODULES, "!metris_blocks.ops.backends", output_directory=folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/build.py FOLDER")
    build(Path(sys.argv[1]))
    print(f"{sys.argv[1]}/index.html")
