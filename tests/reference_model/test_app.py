"""The page of metris app, end to end in a headless browser, and what needs no browser."""

import json
import re
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model import app as command
from reference_model.cli import main, parse
from reference_model.data.images import open_image
from reference_model.data.synthetic.config import GenerateConfig
from reference_model.files import InputError
from reference_model.model.checkpoint import WEIGHTS, load_checkpoint
from reference_model.model.metris import METRIS
from reference_model.viewing import app as page_of
from reference_model.viewing.explain import explain
from reference_model.viewing.predict import predict_masks
from tests.reference_model.browser import opened

SENTENCES = ["the large red star", "lowest thing", "zeppelin"]


@pytest.fixture(scope="module")
def checkpoint(run):
    return load_checkpoint(run)


@pytest.fixture(scope="module")
def photos(scenes):
    return sorted((scenes / "images" / "train2014").glob("*.jpg"))


@pytest.fixture(scope="module")
def address(checkpoint, run):
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = page_of.blocks(checkpoint, run)
    yield page_of.serve(page, host="127.0.0.1", port=port, wait=False)
    page.close()


def ask(checkpoint, photo, lines, before=None, ratio=None):
    return page_of._answered(checkpoint, str(photo), lines, ratio, before or page_of.Session())


def test_an_image_is_encoded_once_for_many_sentences(checkpoint, photos, monkeypatch):
    calls, encode_image = [], METRIS.encode_image
    monkeypatch.setattr(METRIS, "encode_image", lambda *a: calls.append(1) or encode_image(*a))
    session = ask(checkpoint, photos[0], "\n".join(SENTENCES))
    assert len(session.found) == 3 and len(calls) == 1
    session = ask(checkpoint, photos[0], "another star", session)
    session = ask(checkpoint, photos[0], "another star", session, ratio=0.7)
    assert len(calls) == 1 and session.ratio == 0.7
    session = ask(checkpoint, photos[1], "another star", session)
    assert len(calls) == 2
    (fresh,) = explain(checkpoint, page_of.encode(checkpoint, open_image(photos[1])), ["another star"])
    assert session.found[0].logits.equal(fresh.logits)  # not those of the image before


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "no sentence yet"),
        (" \n\t\n", "no sentence yet"),
        ("a\n" * 8, "7 colours"),
        ("a" * 10_001, "longer"),
    ],
)
def test_sentences_that_cannot_be_asked_get_a_message(checkpoint, photos, lines, says):
    with pytest.raises(InputError, match=says):
        ask(checkpoint, photos[0], lines)
    with pytest.raises(InputError, match="no image yet"):
        page_of._answered(checkpoint, None, "star", None, page_of.Session())


def test_files_to_download_hold_the_masks_of_predict(checkpoint, photos):
    session = ask(checkpoint, photos[0], "\n".join(SENTENCES))
    image = open_image(photos[0])
    expected = predict_masks(checkpoint, image, SENTENCES, threshold=0.2)
    shown, legend, *buttons = page_of._masks(checkpoint, session, 0.2, 1.0)
    pictures, runs, plain = (Path(button.value["path"]) for button in buttons)
    with zipfile.ZipFile(pictures) as archive:
        for name, mask in zip(sorted(archive.namelist()), expected, strict=True):
            with archive.open(name) as file:
                assert (np.asarray(Image.open(file)) == 255 * mask).all()
    for run, mask in zip(json.loads(runs.read_text()), expected, strict=True):
        assert (coco_mask.decode(run) == mask).all()
    told = json.loads(plain.read_text())
    assert told["threshold"] == 0.2 and [a["sentence"] for a in told["answers"]] == SENTENCES
    for answer, one, mask in zip(told["answers"], session.found, expected, strict=True):
        inside = one.probability[one.probability > 0.2]
        assert answer["score"] == pytest.approx(float(inside.mean()) if len(inside) else 0, abs=1e-4)
        assert answer["area"] == pytest.approx(mask.mean(), abs=1e-6)
    # At full opacity the topmost mask has its very colour wherever it is.
    small = np.asarray(Image.fromarray(expected[-1]).resize(shown.size, Image.Resampling.NEAREST))
    assert (np.asarray(shown)[small] == page_of.PALETTE[2]).all() and legend.count("<b>") == 3


def test_sentences_are_text_and_never_markup():
    rows = [{"sentence": "<img src=http://x>", "score": 0.5, "area": 0.1, "no_target": None}]
    assert "<img" not in page_of._legend(rows) and "<img" not in page_of._notice("<img src=x>")


def test_page_end_to_end(address, photos, tmp_path, record_property):
    """Upload, type, click; masks, words, r, downloads, messages; nothing leaves this computer."""
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")  # 100 megapixels
    with opened(address, accept_downloads=True) as (page, seen):
        page.set_default_timeout(30_000)
        upload, sentences = page.locator("#source input[type=file]"), page.locator("#sentences textarea")
        find, message = page.locator("#find"), page.locator("#message")

        def put(photo):
            remove = page.locator("#source").get_by_label("Remove Image")
            if remove.count():
                remove.click()
            upload.set_input_files(str(photo))
            remove.wait_for()

        def says(words):
            find.click()
            message.filter(has_text=re.compile(words)).wait_for()

        says("no image yet")
        put(photos[0])
        says("no sentence yet")
        sentences.fill("\n".join(SENTENCES))
        find.click()
        page.locator("#legend b").nth(2).wait_for()
        assert page.locator("#legend b").all_inner_texts() == SENTENCES
        masks = page.locator("#masks img")
        masks.wait_for()
        message.filter(has_text="never learnt").filter(has_text="zeppelin").wait_for()

        begin = time.perf_counter()
        sentences.fill("smallest circle")
        find.click()
        page.wait_for_function("document.querySelectorAll('#legend b').length == 1")
        record_property("seconds of an answer after the first, page to page", time.perf_counter() - begin)
        page.screenshot(path=tmp_path / "masks.png")

        for slider, value in (("threshold", "0.01"), ("opacity", "0.9")):
            before = masks.get_attribute("src")
            page.locator(f"#{slider} input[type=number]").fill(value)
            page.locator(f"#{slider} input[type=number]").press("Enter")
            page.wait_for_function("old => document.querySelector('#masks img').src != old", arg=before)

        for number, kind in enumerate(page_of.MAPS):
            page.get_by_role("tab", name=kind).click()
            page.locator(f"#tiles_{number} img").first.wait_for()
            page.locator(f"#tiles_{number}").get_by_text(re.compile(r"^\[CLS\]: ")).first.wait_for()
        page.screenshot(path=tmp_path / "attention.png")
        page.get_by_role("tab", name="curated tokens").click()
        page.locator("#tiles_1").get_by_text("5 of 16").first.wait_for()  # r = 0.3 of a 4 x 4 grid
        page.locator("#ratio input[type=number]").fill("0.5")
        page.locator("#ratio input[type=number]").press("Enter")
        page.locator("#tiles_1").get_by_text("8 of 16").first.wait_for()
        page.screenshot(path=tmp_path / "curated.png")

        page.get_by_role("tab", name="masks").click()
        for button in ("png", "rle", "json"):
            with page.expect_download() as download:
                page.locator(f"#{button}").click()
            download.value.save_as(tmp_path / f"got.{button}")
        assert set(np.unique(np.asarray(Image.open(tmp_path / "got.png")))) <= {0, 255}
        assert json.loads((tmp_path / "got.json").read_text())["ratio"] == 0.5

        put(tmp_path / "text.png")
        says("not an image of a known kind")
        put(tmp_path / "huge.png")
        says("pixels exceed the limit")
        page.screenshot(path=tmp_path / "message.png")
        put(photos[1])
        find.click()
        page.wait_for_function("document.querySelector('#message').innerText.trim() == ''")

    hosts = {urlparse(url).hostname for url in seen.requests if urlparse(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}, f"asked for {hosts}"


def test_demo_without_a_checkpoint_is_trained_once(tmp_path, capsys):
    data = GenerateConfig(root=tmp_path, size=96, train=12, val=2, test=1)
    run = command.demo_run(tmp_path / "demo", data=data, steps=1)
    assert "training the demo's small model" in capsys.readouterr().err
    before = (run / WEIGHTS).stat().st_mtime_ns
    assert command.demo_run(tmp_path / "demo", data=data, steps=1) == run
    assert (run / WEIGHTS).stat().st_mtime_ns == before and capsys.readouterr().err == ""


def test_demo_of_the_app_is_that_of_make():
    recipe = (Path(__file__).parents[2] / "Makefile").read_text().replace("$(DEMO)", "demo")
    line = re.search(r"metris generate (--root demo/data .*)", recipe)[1]
    assert replace(parse("generate", line.split()), root=command.DEMO.root) == command.DEMO
    assert "metris train --preset metris_tiny --data.root demo/data --out demo/run" in recipe


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--port", "0"], "port: must be in [1, 65535], got 0"), (["--checkpoint", "nowhere"], "nowhere")],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert main(["app", *arguments, *(["--port", "17866"] if "--port" not in arguments else [])]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_taken_port_is_refused_before_anything_is_loaded(address, run, capsys):
    port = str(urlparse(address).port)
    assert main(["app", "--checkpoint", str(run), "--port", port]) == 2
    assert f"127.0.0.1:{port}: cannot be listened on" in capsys.readouterr().err
