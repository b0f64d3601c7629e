"""The report: complete in itself, its figures those of evaluate, its galleries in order."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import urlparse

import numpy as np
import pytest
import torch

from reference_model import figures as draw
from reference_model.checkpoints.checkpoint import load_checkpoint, save_weights
from reference_model.cli import main
from reference_model.data.config import DataConfig
from reference_model.data.datasets import read
from reference_model.scoring.config import EvaluateConfig
from reference_model.scoring.evaluate import evaluate
from reference_model.synthetic.config import GenerateConfig
from reference_model.synthetic.generate import generate
from reference_model.viewing.report import FAILED, Sample, _gallery
from reference_model.viewing.runs import data_of, spaced_images
from tests.support.browser import opened, screenshot


@pytest.fixture(scope="module")
def scored(bold_run, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    config = EvaluateConfig(DataConfig(root=scenes), bold_run, intervals=True, breakdowns=True, json=True)
    rows = folder / "rows.jsonl"
    return evaluate(replace(config, out=folder / "m.json", results=rows))["val"]["METRIS"], [
        json.loads(line) for line in rows.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    rows = "| row | seeds | mIoU |\n|---|---|---|\n| ve<b> | 3 | 64.41 ± 1.75 |"
    (folder / "table-5.md").write_text(f"# Guidance set\n\nval, per cent.\n\n{rows}\n")
    return folder


@pytest.fixture(scope="module")
def file(bold_run, tables, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(bold_run), "--out", str(out), "--ablations", str(tables), "--count", "3"]) == 0
    return out


class _Outward(HTMLParser):
    """Collects what a page would fetch, and scripts."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [tag] * (tag in ("script", "iframe", "object", "embed"))
        self.found += [v for k, v in attrs if k in ("src", "href", "srcset") and not v.startswith("data:")]


def test_report_in_the_browser_asks_for_nothing_and_has_every_part(file, scored):
    scores, rows = scored
    with opened(file.as_uri()) as (page, seen):
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        headings = page.locator("h2").all_inner_texts()
        text = page.locator("body").inner_text()
        galleries = {
            name: [
                float(x)
                for x in page.locator(f"#{name} figure").evaluate_all("f => f.map(x => x.dataset.iou)")
            ]
            for name in ("best", "worst", "failures")
        }
        page.locator("summary").click()
        config = page.locator("pre").inner_text()
        screenshot(page, "report", full_page=True)
    assert {urlparse(url).scheme for url in seen.requests} <= {"file", "data"} and seen.errors == []
    assert sum(url.startswith("file") for url in seen.requests) == 1
    for wanted in (
        "Scores",
        "Curves",
        "Best samples",
        "Worst samples",
        "Failures",
        "Data",
        "Ablations",
        "Config",
    ):
        assert wanted in headings
    assert "image_encoder: convnext_atto" in config and "ve<b>" in text and "64.41 ± 1.75" in text
    ious = sorted(row["iou"] for row in rows)
    assert len(set(ious)) > 10  # else no order could be seen
    assert galleries["worst"] == pytest.approx(ious[:3], abs=1e-6)
    assert galleries["best"] == pytest.approx(ious[:-4:-1], abs=1e-6)
    failures = [iou for iou in ious if iou < FAILED]
    assert galleries["failures"] == sorted(galleries["failures"])
    assert len(galleries["failures"]) == min(12, len(failures)) and max(galleries["failures"]) < FAILED
    assert f"{len(failures)} of {len(rows)} sentences have an IoU below 0.5" in text
    low, high = scores["intervals"]["mIoU"]
    assert f"mIoU\t{100 * scores['mIoU']:.2f}\t{100 * low:.2f} to {100 * high:.2f}" in text
    assert f"AUC-PR\t{100 * scores['AUC-PR']:.2f}" in text
    for name, of in (scores["by category"] | scores["by length"]).items():
        assert re.search(rf"{name}\t{of['count']}\t{100 * of['mIoU']:.2f}\t", text)


def test_report_is_one_file_without_scripts(file):
    outward = _Outward()
    outward.feed(file.read_text())
    assert outward.found == [] and "@import" not in file.read_text() and "url(" not in file.read_text()
    assert file.stat().st_size < 5 * 2**20


def test_counts_are_those_of_the_data(file, run):
    reader = data_of(run, None)
    for split in reader.splits:
        records = reader.records(split)
        cells = [split, len({r.image_id for r in records}), len({r.ref_id for r in records}), len(records), 0]
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in file.read_text()


def test_gallery_draws_the_mask_that_was_scored_and_no_markup(run, tmp_path):
    import base64
    import io

    from PIL import Image
    from pycocotools import mask as coco_mask

    record = replace(spaced_images(data_of(run, None), "val", 1)[0][0], expression="<img src=http://x/y>")
    mask = np.zeros((record.height, record.width), np.uint8)
    mask[: record.height // 2] = 1
    shown = _gallery(draw, "worst", [Sample(record, 0.25, coco_mask.encode(np.asfortranarray(mask)))])
    assert "http://x" in shown and "<img src=http" not in shown and "IoU 0.25" in shown
    last = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', shown)[-1]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(last)))).astype(int)
    tint = drawn[..., 2] - drawn[..., 0]  # the colour of predictions is blue, the rest grey
    middle = len(drawn) // 2
    assert tint[: middle - 8].min() > 60 and np.abs(tint[middle + 8 :]).max() < 40


@pytest.mark.parametrize("changes", [{"guidance": "enhanced_le"}, {"guidance": "enhanced_le+pixels"}])
def test_report_of_a_network_without_ve_scores_it_as_evaluate_does(changes, variant, scenes, tmp_path):
    folder, out = variant("other", **changes), tmp_path / "r.html"
    assert main(["report", str(folder), "--out", str(out), "--count", "1"]) == 0
    config = EvaluateConfig(DataConfig(root=scenes), folder, out=tmp_path / "m.json", json=True)
    scores = evaluate(config)["val"]["METRIS"]
    assert f"<td>mIoU</td><td>{100 * scores['mIoU']:.2f}</td>" in out.read_text()
    assert f"guidance: {changes['guidance']}\n" in out.read_text()


def test_report_of_sentences_without_a_target_tells_who_was_found_absent(variant, tmp_path):
    """A classifier whose last bias says "nothing": right about each absent one, wrong about the others."""
    root = generate(
        GenerateConfig(root=tmp_path / "data", targets="any", size=64, train=4, val=6, test=1, seed=1)
    )
    reader = read(DataConfig(root, dataset="grefcoco"))
    absent = [record.no_target for record in reader.stream("val")]
    assert any(absent) and not all(absent)
    folder = variant("silent", no_target=True)
    checkpoint = load_checkpoint(folder)
    with torch.no_grad():
        checkpoint.model.no_target.mlp[-1].weight.zero_()
        checkpoint.model.no_target.mlp[-1].bias.fill_(9.0)
    save_weights(folder, checkpoint.model)
    out = tmp_path / "r.html"
    given = ["--data.root", str(root), "--data.dataset", "grefcoco", "--out", str(out), "--count", "2"]
    assert main(["report", str(folder), *given]) == 0
    text = out.read_text()
    assert "<td>N-acc</td><td>100.00</td>" in text and "<td>T-acc</td><td>0.00</td>" in text
    assert f"{absent.count(False)} of {len(absent)} sentences have an IoU below 0.5" in text
    best = text.split('id="best"')[1].split("</div>")[0]
    assert best.count("(no target)") == 2 and best.count("IoU 1.00") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--count", "0"], "count: must be in [1, 48], got 0"),
        (["--limit", "0"], "limit: must be >= 1, got 0"),
        (["--out", "report.pdf"], "must name an HTML file"),
        (["--split", "vall"], "did you mean 'val'?"),
        (["--ablations", "nowhere"], "has no table-*.md"),
        (["--data.root", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(arguments, says, run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", "r.html"]
    assert main(["report", str(run), *out, *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_data_that_moved_away_are_asked_for(run, tmp_path, capsys):
    import shutil

    moved = shutil.copytree(run, tmp_path / "run")
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(re.sub(r"root: .*", "root: /gone/away", text, count=1))
    assert main(["report", str(moved)]) == 2
    err = capsys.readouterr().err
    assert "/gone/away" in err and "or give --data.root" in err and err.count("\n") == 1
