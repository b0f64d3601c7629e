"""The notebook runs as it stands, and shows what is stored in it."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def shown(notebook):
    """Each code cell's outputs: text as it is, a picture as its kind and nothing more."""
    return [
        [
            output.get("text")
            or ("picture" if "image/png" in output.get("data", {}) else output["data"]["text/plain"])
            for output in cell.outputs
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebook_runs_and_shows_what_it_stores(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    fresh = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parents[1])}}
    NotebookClient(fresh, timeout=120, kernel_name="python3", resources=resources).execute()
    assert shown(fresh) == shown(stored)
    assert sum("picture" in outputs for outputs in shown(stored)) >= 2  # it is stored executed
    assert all(not any(line.startswith("Traceback") for line in map(str, o)) for o in shown(stored))
