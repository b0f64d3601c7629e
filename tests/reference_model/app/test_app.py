"""The page of metris app, end to end in a headless browser, and what needs no browser."""

import inspect
import json
import math
import re
import shutil
import socket
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.app import command
from reference_model.app import page as web_page
from reference_model.app import session as web_session
from reference_model.checkpoints.checkpoint import WEIGHTS, load_checkpoint
from reference_model.cli import main, parse
from reference_model.data.images import open_image
from reference_model.files import InputError
from reference_model.model.metris import METRIS
from reference_model.synthetic.config import GenerateConfig
from reference_model.viewing.explain import Explanation, encode, explain
from tests.support.browser import opened, screenshot

SENTENCES = ["the large red star", "lowest thing", "zeppelin"]


@pytest.fixture(scope="module")
def checkpoint(run):
    return load_checkpoint(run)


@pytest.fixture(scope="module")
def photos(scenes):
    return sorted((scenes / "images" / "train2014").glob("*.jpg"))


@pytest.fixture(scope="module")
def blocks(checkpoint, run):
    return web_page.blocks(checkpoint, run)


@pytest.fixture(scope="module")
def address(blocks):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield web_page.serve(blocks, host="127.0.0.1", port=port, wait=False).rstrip("/")
    blocks.close()


def ask(checkpoint, photo, lines, before=None, ratio=None):
    return web_session.asked(checkpoint, str(photo), lines, ratio, before or web_session.Session())


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
    (fresh,) = explain(checkpoint, encode(checkpoint, open_image(photos[1])), ["another star"])
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
        web_session.asked(checkpoint, None, "star", None, web_session.Session())


def test_files_to_download_hold_the_masks_of_predict(checkpoint, photos):
    session = ask(checkpoint, photos[0], "\n".join(SENTENCES))
    image = open_image(photos[0])
    expected = checkpoint.predict(image, SENTENCES, threshold=0.2)
    cut = web_session.cut_at(session, 0.2)
    shown, legend = web_session.painted(cut, 1.0), web_session.legend(cut.rows)
    pictures, runs, plain = map(Path, cut.files)
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
    assert (np.asarray(shown)[small] == web_session.PALETTE[2]).all() and legend.count("<b>") == 3


def test_sentences_are_text_and_never_markup():
    rows = [{"sentence": "<img src=http://x>", "score": 0.5, "area": 0.1, "no_target": None}]
    assert "<img" not in web_session.legend(rows) and "<img" not in web_page._notice("<img src=x>")


def uploaded(page, photo):
    """Drop a photo on the page, instead of what is there."""
    remove = page.locator("#source").get_by_label("Remove Image")
    if remove.count():
        remove.click()
    page.locator("#source input[type=file]").set_input_files(str(photo))
    remove.wait_for()


def moved(page, slider, value):
    """Type a value beside a slider."""
    number = page.locator(f"#{slider} input[type=number]")
    number.fill(value)
    number.press("Enter")


def test_page_end_to_end(address, photos, tmp_path, record_property):
    """Upload, type, click; masks, words, r, downloads, messages; nothing leaves this computer."""
    (tmp_path / "text.png").write_text("no image")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")  # 100 megapixels
    with opened(address, accept_downloads=True) as (page, seen):
        page.set_default_timeout(30_000)
        put = partial(uploaded, page)
        sentences, find, message = (
            page.locator("#sentences textarea"),
            page.locator("#find"),
            page.locator("#message"),
        )

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
        screenshot(page, "app-masks")

        for slider, value in (("threshold", "0.01"), ("opacity", "0.9")):
            before = masks.get_attribute("src")
            moved(page, slider, value)
            page.wait_for_function("old => document.querySelector('#masks img').src != old", arg=before)

        for number, kind in enumerate(web_session.MAPS):
            page.get_by_role("tab", name=kind).click()
            page.locator(f"#tiles_{number} img").first.wait_for()
            page.locator(f"#tiles_{number}").get_by_text(re.compile(r"^\[CLS\]: ")).first.wait_for()
        screenshot(page, "app-attention")
        page.get_by_role("tab", name="curated tokens").click()
        page.locator("#tiles_1").get_by_text("5 of 16").first.wait_for()  # r = 0.3 of a 4 x 4 grid
        moved(page, "ratio", "0.5")
        page.locator("#tiles_1").get_by_text("8 of 16").first.wait_for()
        screenshot(page, "app-curated")

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
        screenshot(page, "app-message")
        put(photos[1])
        find.click()
        page.wait_for_function("document.querySelector('#message').innerText.trim() == ''")

    hosts = {urlparse(url).hostname for url in seen.requests if urlparse(url).scheme not in ("data", "blob")}
    assert hosts == {"127.0.0.1"}, f"asked for {hosts}"
    assert seen.errors == []


def test_page_left_alone_keeps_its_image_or_says_that_it_is_gone(address, blocks, photos):
    (key,) = [
        n for n, b in blocks.blocks.items() if isinstance(getattr(b, "value", None), web_session.Session)
    ]
    with opened(address) as (page, seen):
        page.set_default_timeout(30_000)
        names, message = page.locator("#legend b"), page.locator("#message")
        uploaded(page, photos[0])
        page.locator("#sentences textarea").fill("star")
        page.locator("#find").click()
        names.first.wait_for()
        sessions = [s for s in blocks.app.state_holder.session_data.values() if key in s.state_data]
        (held,) = [s for s in sessions if s.state_data[key].sentences == ["star"]]
        # A day later gradio has removed the upload: the session holds the image.
        for folder in {Path(file).parent for file in blocks.upload_file_set}:
            shutil.rmtree(folder, ignore_errors=True)
        page.locator("#sentences textarea").fill("circle\nstar")
        page.locator("#find").click()
        names.nth(1).wait_for()
        assert names.all_inner_texts() == ["circle", "star"]
        # A computer that slept for long has let go of its session: the page says so, and what to do.
        del held.state_data[key]
        before = page.locator("#masks img").get_attribute("src")
        moved(page, "threshold", "0.3")
        message.filter(has_text="press Find").wait_for()
        assert page.locator("#masks img").get_attribute("src") == before
        screenshot(page, "app-left-alone")
        page.locator("#find").click()
        message.filter(has_text="drop it again").wait_for()
        uploaded(page, photos[0])
        page.locator("#find").click()
        page.wait_for_function("document.querySelector('#message').innerText.trim() == ''")
    assert seen.errors == []


def test_session_lives_as_long_as_its_page(blocks):
    (state,) = [
        b for b in blocks.blocks.values() if isinstance(getattr(b, "value", None), web_session.Session)
    ]
    assert math.isinf(state.time_to_live)


@pytest.mark.parametrize("name", ["recut", "repaint", "recurate", "retell"])
def test_every_control_says_that_an_image_is_gone_but_not_before_there_was_one(name, blocks):
    (control,) = {fn.fn for fn in blocks.fns.values() if fn.name == name}
    given = {"cut": 0.5, "share": 0.5, "r": 0.3, "kind": "relevance", "state": web_session.Session()}
    told = lambda sentence: [
        control(
            **{key: (given | {"sentence": sentence})[key] for key in inspect.signature(control).parameters}
        )
    ][0][0]
    assert "press Find" in told(0) and told(None) == gr.skip()


def test_opacity_writes_no_files_and_makes_no_mask(blocks, checkpoint, photos, monkeypatch):
    (repaint,) = {fn.fn for fn in blocks.fns.values() if fn.name == "repaint"}
    session = ask(checkpoint, photos[0], "star")
    cut = web_session.cut_at(session, 0.3)
    monkeypatch.setattr(web_session, "_written", None)
    monkeypatch.setattr(Explanation, "mask", None)
    (_, clear), (_, full) = (repaint(share, 0, session) for share in (0.0, 1.0))
    assert (np.asarray(clear) == cut.shown).all()
    assert (np.asarray(full)[cut.masks[0]] == web_session.PALETTE[0]).all() and cut.masks[0].any()


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"guidance": "enhanced_le"}, {"relevance", "curated tokens", "attention to VE"}),
        ({"guidance": "enhanced_le+pixels"}, {"relevance", "curated tokens", "attention to VE"}),
        ({"guidance": "ve", "no_target": True}, {"attention to LE"}),
        ({"cues": "local"}, set()),
    ],
)
def test_page_of_another_network_shows_what_it_has_and_says_what_it_lacks(changes, lacks, variant, photos):
    """Without any server: what the page's own functions give."""
    other = load_checkpoint(variant("app", **changes))
    page = web_page.blocks(other, Path("run"))
    fns = {fn.name: fn.fn for fn in page.fns.values()}
    found = fns["find"](str(photos[0]), "star\nthe circle", 0.5, 0.6, 0.3, "relevance", web_session.Session())
    session = found[1]
    assert session.sentences == ["star", "the circle"] and len(session.cut.rows) == 2
    for row, one, mask in zip(session.cut.rows, session.found, session.cut.masks, strict=True):
        assert (row["no_target"] is None) == ("no_target" not in changes)
        assert mask.any() <= (one.no_target is None or one.no_target <= 0.5)
    words = session.found[1]
    for kind in web_session.MAPS:
        said, tiles = web_session.tiles(session.encoded, words, kind)
        assert (not tiles and "This model has no" in said) == (kind in lacks)
        if tiles:
            expected = words.visual_tokens if kind == "attention to VE" else words.tokens
            assert [label.rsplit(":", 1)[0] for _, label in tiles] == expected
    if changes.get("cues") == "local":
        assert "[CLS]" not in words.visual_tokens and len(words.visual_tokens) == len(words.tokens) - 1
    said, _ = web_session.tiles(session.encoded, words, "attention to LE")
    share = np.mean(words.to_language[-1].sum(axis=0)) if words.to_language else 0
    if changes.get("guidance") == "enhanced_le+pixels":
        assert f"LE get {share:.0%} of it, visual tokens the rest" in said and share < 0.999
    recurated = fns["recurate"](0.5, 0.6, 0.9, 0, "relevance", session)
    curates = "curated tokens" not in lacks
    assert (recurated[1] == gr.skip()) == (not curates) and session.ratio == (0.9 if curates else None)


# ------------------------------------------------------------------------- what a visitor may not ask for

FAR = "https://example.com/secret.png"
META = {"_type": "gradio.FileData"}


@pytest.fixture
def fetched(monkeypatch):
    """Every address that gradio would ask for."""
    from gradio import processing_utils, route_utils

    found = []

    async def ask(address, *_, **__):
        found.append(address)
        raise ConnectionError

    monkeypatch.setattr(processing_utils.sh, "get", ask)
    monkeypatch.setattr(route_utils.safehttpx, "async_validate_url", ask)
    return found


def answer(address, blocks, values):
    """Ask `find` as a browser does, and give the last message of the queue."""
    (number,) = [number for number, fn in blocks.fns.items() if fn.name == "find"]
    body = {"fn_index": number, "session_hash": "visitor", "data": values}
    with httpx.Client(base_url=f"{address}/gradio_api", timeout=30) as client:
        client.post("/queue/join", json=body).raise_for_status()
        with client.stream("GET", "/queue/data", params={"session_hash": "visitor"}) as stream:
            for line in stream.iter_lines():
                told = json.loads(line.removeprefix("data: ") or "{}")
                if told.get("msg") == "process_completed":
                    return told


@pytest.mark.parametrize(
    ("image", "threshold"),
    [
        ({"path": FAR, "meta": META}, 0.5),
        ({"path": FAR, "url": FAR, "meta": META}, 0.5),
        ({"path": "OWN", "url": FAR, "meta": META}, 0.5),
        ({"path": "OWN", "url": f"{FAR}?/gradio_api/file=OWN", "meta": META}, 0.5),
        ({"path": "OWN", "inside": [{"path": FAR, "meta": META}]}, 0.5),
        ({"path": "OWN", "meta": META}, {"path": FAR, "meta": META}),
        # Files of the server: gradio asks no questions where a dict does not say that it is a file.
        ({"path": "HERE"}, 0.5),
        ({"path": "HERE", "meta": {"_type": "another"}}, 0.5),
        ({"path": "HERE", "meta": META}, 0.5),
        ({"path": "OWN/../../../../../../..HERE"}, 0.5),
    ],
)
def test_addresses_instead_of_files_are_refused_and_not_fetched(
    image, threshold, address, blocks, photos, fetched
):
    with photos[0].open("rb") as file:
        (own,) = httpx.post(f"{address}/gradio_api/upload", files={"files": file}).json()
    image = json.loads(json.dumps(image).replace("OWN", own).replace("HERE", str(photos[0])))
    told = answer(address, blocks, [image, "star", threshold, 0.6, 0.3, None, None])
    assert fetched == [] and not told["success"] and "reads no addresses" in told["output"]["error"]
    own = {"path": own, "url": f"{address}/gradio_api/file={own}", "meta": META}
    assert answer(address, blocks, [own, "star", 0.5, 0.6, 0.3, None, None])["success"]


@pytest.mark.parametrize(
    "route", ["file=", "file/", "proxy=", "file=%20", "file/%20", "run-history/connect?"]
)
def test_routes_that_fetch_are_closed(route, address, fetched):
    found = httpx.get(f"{address}/gradio_api/{route}{FAR}")
    assert fetched == [] and found.status_code == 403


def test_demo_without_a_checkpoint_is_trained_once(tmp_path, capsys):
    data = GenerateConfig(root=tmp_path, size=96, train=12, val=2, test=1)
    run = command.demo_run(tmp_path / "demo", data=data, steps=1)
    assert "training the demo's small model" in capsys.readouterr().err
    before = (run / WEIGHTS).stat().st_mtime_ns
    assert command.demo_run(tmp_path / "demo", data=data, steps=1) == run
    assert (run / WEIGHTS).stat().st_mtime_ns == before and capsys.readouterr().err == ""


def test_demo_of_the_app_is_that_of_make():
    recipe = (Path(__file__).parents[3] / "Makefile").read_text().replace("$(DEMO)", "demo")
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
