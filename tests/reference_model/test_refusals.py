"""Mistakes are answered at once: before torch and the encoders, which take seconds, are imported."""

import subprocess
import sys

import pytest

from reference_model.cli import main

HEAVY = {"torch", "timm", "transformers", "torchvision", "gradio", "matplotlib"}
MISTAKES = [
    "predict --checkpoint nowhere --image a.png",
    "predict --checkpoint nowhere --image a.png --expression star",
    "evaluate --checkpoint nowhere --data.root .",
    "evaluate --data.root .",
    "evaluate --predictions nowhere.jsonl --data.root .",
    "train --data.root nowhere",
    "train --data.root . --batch_size 0",
    "train --data.root . --train_split test",
    "ablate --data.root nowhere",
    "export --checkpoint nowhere --out a.onnx",
    "export --checkpoint nowhere --out a.txt",
    "push --checkpoint nowhere --repo a/b",
    "figures --checkpoint nowhere",
    "report nowhere",
    "plot nowhere",
    "app --checkpoint nowhere",
    "app --port 0",
    "convert nowhere --out a.jsonl",
    "compare a.jsonl b.jsonl",
    "data check nowhere",
    "data show nowhere",
    "generate --root new --size 3",
    "profile --preset none",
]


def test_no_refusal_imports_torch_or_encoders(tmp_path):
    """In one process, one mistake after the other: what one had imported would show in all that follow."""
    code = (
        "import sys\nfrom reference_model.cli import main\n"
        f"for line in {MISTAKES!r}:\n"
        "    code = main(line.split())\n"
        f"    print(code, sorted({HEAVY!r} & set(sys.modules)), line)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"2 [] {line}" for line in MISTAKES]
    assert len(done.stderr.splitlines()) == len(MISTAKES) and list(tmp_path.iterdir()) == []


def test_errors_of_the_program_itself_keep_their_traceback(monkeypatch):
    from reference_model.model import build

    monkeypatch.setattr(build, "MaskDecoder", lambda one: None)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        main(["profile", "--preset", "metris_tiny", "--rounds", "1"])


@pytest.mark.parametrize("how", ["option", "variable"])
def test_traceback_of_any_error_can_be_seen(how, monkeypatch):
    from reference_model.files import InputError

    if how == "variable":
        monkeypatch.setenv("METRIS_TRACEBACK", "1")
    with pytest.raises(InputError) as refused:
        main([*["--traceback"] * (how == "option"), "evaluate", "--data.root", "."])
    assert refused.value.thing == "evaluate" and "--checkpoint" in refused.value.problem
