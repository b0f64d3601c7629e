"""The API pages: every public name with its equation, shapes and example, and nothing asked of any server."""

import doctest
import html
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from torch import nn

import metris_blocks
from metris_blocks import ops
from tests.test_inventory import PUBLIC

ROOT = Path(__file__).parents[1]
# Every module that the inventory calls public and that has a forward of its own, and where it is.
BLOCKS = {
    name: room
    for room, names in PUBLIC.items()
    for name in names
    if f"{name}.forward" in names and issubclass(getattr(importlib.import_module(room), name), nn.Module)
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Build the pages as `make docs` does: file name -> HTML."""
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("pages")
    subprocess.run([sys.executable, "docs/build.py", folder], check=True, cwd=ROOT, capture_output=True)
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def section(page: str, name: str) -> str:
    """The text of one class or function of a page, tags taken out."""
    (found,) = re.findall(rf'<section id="{name}">(.*?)(?=<section id="[A-Za-z_]+">|\Z)', page, re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", found)).split())


def equations(public: object) -> list[str]:
    """What a docstring writes between double backticks and equates."""
    quoted = re.findall(r"``([^`]+)``", public.__doc__ or "")
    return [" ".join(text.split()) for text in quoted if re.search(r" [=-] |\bC\(|softmax\(", text)]


@pytest.mark.parametrize("name", BLOCKS)
def test_page_of_a_block_has_its_equation_shapes_and_example(name, pages):
    page = pages[BLOCKS[name].replace(".", "/") + ".html"]
    block, text = getattr(importlib.import_module(BLOCKS[name]), name), section(page, name)
    stated = equations(block)
    assert stated and all(equation in text for equation in stated)
    assert "Shapes" in text and ">>> import torch" in text
    table = re.search(r"<th>axes</th>.*?</table>", page.split(f'id="{name}"')[1], re.DOTALL)
    rows = re.findall(r"<tr>\s*<td>(.*?)</td>\s*<td>(.*?)</td>", table[0], re.DOTALL)
    given = {re.sub(r"<[^>]+>", "", argument): axes for argument, axes in rows}
    # What is a tensor by its annotation is a row; what is returned is one too.
    tensors = {key for key, kind in block.forward.__annotations__.items() if "Tensor" in str(kind)}
    assert tensors - {"return"} <= set(given)
    result = block.forward.__annotations__["return"]
    results = len(getattr(result, "_fields", get_args(result) or [result]))
    assert [argument for argument, _ in rows].count("returns") == results
    assert all(re.fullmatch(r"\(([a-z_]+(, (1 \+ )?[a-z_]+)*)?\)", axes) for axes in given.values())


@pytest.mark.parametrize("name", ops.__all__)
def test_page_of_an_op_has_its_equation(name, pages):
    text = section(pages["metris_blocks/ops.html"], name)
    stated = equations(getattr(ops, name))
    assert all(equation in text for equation in stated)
    assert stated or name in ("auto_backend", "explain_backends")


def test_first_page_shows_the_path_and_every_public_name(pages):
    page = pages["metris_blocks.html"]
    assert "<svg" in page and "VisualExpressionExtractor</text>" in page
    assert all(f'<section id="{name}">' in page for name in metris_blocks.__all__)
    assert '<section id="METRIS">' in pages["reference_model/model/metris.html"]


def test_pages_ask_nothing_of_any_server(pages):
    fetched = r"""<(?:script|img|iframe|source|image)\b[^>]*\b(?:src|href)\s*=\s*["']?(?:https?:)?//"""
    styles = (
        r"""<link\b[^>]*href\s*=\s*["']?(?:https?:)?//|@import|url\(["']?(?:https?:)?//|\bfetch\(["']http"""
    )
    for name, page in pages.items():
        assert not re.search(fetched, page), name
        assert not re.search(styles, page), name


@pytest.mark.parametrize("name", [*BLOCKS, "GuidanceSet"])
def test_example_of_a_block_prints_what_it_says(name):
    block = getattr(importlib.import_module(BLOCKS.get(name, "metris_blocks")), name)
    module = importlib.import_module(block.__module__)
    (test,) = doctest.DocTestFinder(recurse=False).find(block, name, globs=dict(vars(module)))
    assert test.examples, f"{name} has no example"
    output: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=output.append)
    assert not failed, "".join(output)
