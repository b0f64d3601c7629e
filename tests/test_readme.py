"""The README's examples run as printed, and its commands exist."""

import re
from pathlib import Path

import pytest
from PIL import Image

from reference_model.cli import COMMANDS

README = (Path(__file__).parents[1] / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with what the examples name: a checkpoint in demo/run, and photo.jpg."""
    from reference_model import build, preset
    from reference_model.tokens import build_tokenizer

    folder = tmp_path_factory.mktemp("readme")
    tokenizer = build_tokenizer(["the red circle on the right"])
    model = build(preset("metris_tiny", vocab_size=len(tokenizer)), tokenizer=tokenizer)
    model.save_pretrained(folder / "demo" / "run")
    Image.new("RGB", (80, 60), "red").save(folder / "photo.jpg")
    return folder


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs_and_is_short(code, demo, monkeypatch):
    monkeypatch.chdir(demo)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})


def test_image_to_start_with_can_be_drawn(tmp_path, monkeypatch):
    (code,) = re.findall(r'^python -c "(.*?)"$', README, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("\\\n", ""), {})
    red, green, blue = Image.open("photo.jpg").getpixel((110, 130))
    assert red > 200 and green < 60 and blue < 60  # "the red circle" of the command below
    assert re.search(r'predict .*--image photo.jpg --expression "the red circle"', README)


def test_make_commands_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (Path(__file__).parents[1] / "Makefile").read_text(), re.MULTILINE)
    used = re.findall(r"^make ([a-z-]+)", README, re.MULTILINE)
    assert used and set(used) <= set(targets)


def test_every_metris_command_is_shown():
    assert set(re.findall(r"^metris (data \w+|\w+) ", README, re.MULTILINE)) == set(COMMANDS)
