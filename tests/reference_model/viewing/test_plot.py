"""`metris plot`: every number that was logged, at its step."""

import json

import pytest
from PIL import Image

from reference_model.cli import main
from reference_model.files import InputError
from reference_model.viewing.plot import curve, entries


@pytest.fixture
def logged(tmp_path):
    lines = [
        {"step": 10, "learning_rate": 0.1, "total": 3.0, "mask": 2.0},
        {"step": 20, "learning_rate": 0.05, "total": 1.5, "mask": 1.0},
        {"step": 20, "val": {"mIoU": 0.25, "count": 3}},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 30, "tot')  # killed in the middle of a line
    return tmp_path


def test_curves_have_each_number_at_its_step(logged):
    log = entries(logged)
    assert curve(log, "total") == ([10, 20], [3.0, 1.5])
    assert curve(log, "learning_rate") == ([10, 20], [0.1, 0.05])
    assert curve(log, "val/mIoU") == ([20], [0.25])
    assert curve(log, "val/gIoU") == ([], [])


def test_runs_are_drawn_on_one_picture(run, logged, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "both.png"
    assert main(["plot", str(run), str(logged), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"plot": str(out)}
    assert Image.open(out).size[0] > 500
    assert main(["plot", str(logged)]) == 0
    assert (logged / "log.png").is_file()


def test_place_without_a_log_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"log.jsonl: cannot be read \(No such file"):
        entries(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(InputError, match="logs no step yet"):
        entries(tmp_path)
