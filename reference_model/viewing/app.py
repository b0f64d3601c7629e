"""The page of ``metris app``: drop an image, write sentences, see masks and what each word sees."""

import html
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported

import gradio as gr
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from reference_model.data.images import open_image
from reference_model.data.reader import LONGEST_SENTENCE
from reference_model.figures import COLOURS, TRUTH, dimmed, heated, spread, tinted
from reference_model.files import InputError
from reference_model.model.checkpoint import Checkpoint
from reference_model.viewing.explain import Encoded, Explanation, encode, explain, unknown_words
from reference_model.viewing.runs import data_config, data_of, picture, spaced_images

PALETTE = (*COLOURS, TRUTH)
LEAST, SIDE, TILE = 480, 768, 256
"""Longest side of the picture with masks, at least and at most, and of a tile, pixels."""
MAPS = ("relevance", "curated tokens", "attention to LE", "attention to VE")
BUTTONS = ["download", "fullscreen"]
"""Of a picture; gradio's others include one that uploads it to a hub."""


@dataclass
class Session:
    """What one visitor has open."""

    file: bytes | None = None
    encoded: Encoded | None = None
    """Of the file; sentences and r may change without another look at it."""
    sentences: list[str] = field(default_factory=list)
    found: list[Explanation] = field(default_factory=list)
    ratio: float | None = None
    folder: str | None = None
    """Where the files to download are."""


def blocks(checkpoint: Checkpoint, run: Path) -> gr.Blocks:
    """Build the page of a model."""
    curates = checkpoint.model.guidance.extractor is not None
    with gr.Blocks(title="METRIS", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(Session(), time_to_live=3600, delete_callback=_forget)
        gr.Markdown(f"## METRIS: what a sentence means in an image\nModel: `{run}`")
        with gr.Row():
            with gr.Column(scale=2):
                source = gr.Image(
                    label="image: drop, pick or paste one",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=["fullscreen"],
                    height=260,
                    elem_id="source",
                )
                # The file as it came: gradio's own opening fails without a word where it is no image.
                source.preprocess = lambda payload: None if payload is None else payload.path
                text = gr.Textbox(
                    label="sentences, one a line",
                    lines=3,
                    placeholder="the red circle\nbiggest star",
                    elem_id="sentences",
                )
                go = gr.Button("Find", variant="primary", elem_id="find")
                message = gr.HTML(elem_id="message")
                threshold = gr.Slider(
                    0.01, 0.99, 0.5, step=0.01, label="threshold (probability)", elem_id="threshold"
                )
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="opacity of the colours", elem_id="opacity")
                ratio = gr.Slider(
                    0.01,
                    1,
                    checkpoint.config.ratio,
                    step=0.01,
                    label="r, share of visual tokens that each word curates",
                    elem_id="ratio",
                    visible=curates,
                )
                _examples(run, source, text)
            with gr.Column(scale=3):
                which = gr.Radio([], label="sentence whose words are shown", elem_id="which")
                tabs, galleries = {}, []
                with gr.Tabs():
                    with gr.Tab("masks") as tabs["masks"]:
                        masks = gr.Image(
                            label="masks", format="png", interactive=False, buttons=BUTTONS, elem_id="masks"
                        )
                        legend = gr.HTML(elem_id="legend")
                        with gr.Row():
                            png = gr.DownloadButton("PNG", interactive=False, elem_id="png")
                            rle = gr.DownloadButton("RLE (COCO)", interactive=False, elem_id="rle")
                            plain = gr.DownloadButton("JSON", interactive=False, elem_id="json")
                    for number, kind in enumerate(MAPS):
                        with gr.Tab(kind) as tabs[kind]:
                            galleries += [gr.HTML(elem_id=f"about_{number}")]
                            galleries += [
                                gr.Gallery(
                                    label=f"{kind}, one picture a word",
                                    show_label=False,
                                    columns=4,
                                    format="png",
                                    buttons=BUTTONS,
                                    object_fit="contain",
                                    elem_id=f"tiles_{number}",
                                )
                            ]
        tab = gr.State("masks")
        drawn = [masks, legend, png, rle, plain]

        def draw(state: Session, cut: float, share: float) -> list[Any]:
            if state.encoded is None or not state.found:
                return [gr.skip()] * len(drawn)
            return _masks(checkpoint, state, cut, share)

        def tell(state: Session, sentence: int | None, kind: str) -> list[Any]:
            """Draw the map of the tab that is open; the others are drawn when they are."""
            out: list[Any] = [gr.skip()] * len(galleries)
            if kind in MAPS and sentence is not None and sentence < len(state.found):
                at = 2 * MAPS.index(kind)
                out[at : at + 2] = _words(state.encoded, state.found[sentence], kind)
            return out

        def find(
            path: str | None, lines: str, cut: float, share: float, r: float, kind: str, state: Session
        ) -> list[Any]:
            try:
                state = _answered(checkpoint, path, lines, r if curates else None, state)
            except InputError as error:
                return [_notice(str(error)), *[gr.skip()] * (2 + len(drawn + galleries))]
            choices = gr.Radio(choices=[(s, i) for i, s in enumerate(state.sentences)], value=0)
            notes = _notes(checkpoint, state.sentences)
            return [_notice(notes), state, choices, *draw(state, cut, share), *tell(state, 0, kind)]

        def recurate(
            cut: float, share: float, r: float, sentence: int | None, kind: str, state: Session
        ) -> list[Any]:
            if state.encoded is None or not state.sentences or r == state.ratio:
                return [gr.skip()] * (1 + len(drawn + galleries))
            state.found = explain(checkpoint, state.encoded, state.sentences, ratio=r)
            state.ratio = r
            return [state, *draw(state, cut, share), *tell(state, sentence, kind)]

        live = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
        go.click(
            find,
            [source, text, threshold, opacity, ratio, tab, session],
            [message, session, which, *drawn, *galleries],
        )
        gr.on([threshold.change, opacity.change], draw, [session, threshold, opacity], drawn, **live)
        which.change(tell, [session, which, tab], galleries, **live)
        for kind, one in tabs.items():
            select = lambda state, sentence, kind=kind: [kind, *tell(state, sentence, kind)]
            one.select(select, [session, which], [tab, *galleries], **live)
        inputs = [threshold, opacity, ratio, which, tab, session]
        ratio.change(recurate, inputs, [session, *drawn, *galleries], **live)
    return page


def serve(page: gr.Blocks, *, host: str, port: int, wait: bool = True) -> str:
    """Serve a page and give its address; nothing but ``host`` is spoken to."""
    # Named fonts would be fetched from Google.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.queue(api_open=False).launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        theme=gr.themes.Base(**fonts),
        footer_links=[],
        max_file_size="200mb",
    )
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return str(address)


def _forget(state: Session) -> None:
    if state.folder is not None:
        shutil.rmtree(state.folder, ignore_errors=True)


def _answered(
    checkpoint: Checkpoint, path: str | None, lines: str, ratio: float | None, before: Session
) -> Session:
    """Refer to the image; it is encoded only if it is another one than before."""
    sentences = [line.strip() for line in (lines or "").splitlines() if line.strip()]
    if path is None:
        raise InputError("There is no image yet: drop one above, or pick an example.")
    if not sentences:
        raise InputError("There is no sentence yet: write what to look for, one sentence a line.")
    if len(sentences) > len(PALETTE):
        raise InputError(f"{len(sentences)} sentences, but there are {len(PALETTE)} colours: leave some out.")
    if max(map(len, sentences)) > LONGEST_SENTENCE:
        raise InputError(f"A sentence is longer than {LONGEST_SENTENCE} characters: shorten it.")
    file = Path(path).read_bytes()
    encoded = before.encoded
    if encoded is None or file != before.file:
        encoded = encode(checkpoint, open_image(file, name=Path(path).name))
    found = explain(checkpoint, encoded, sentences, ratio=ratio)
    folder = before.folder or tempfile.mkdtemp(prefix="metris-app-")
    return Session(file, encoded, sentences, found, ratio, folder)


def _masks(checkpoint: Checkpoint, state: Session, cut: float, share: float) -> list[Any]:
    """Draw the masks and their legend, and write the files to download."""
    image = state.encoded.image
    whole = [_mask(found, image.height, image.width, cut) for found in state.found]
    shown = _at_least(picture(image, side=SIDE), LEAST)
    for mask, colour in zip(whole, PALETTE):
        small = np.asarray(Image.fromarray(mask).resize(shown.shape[1::-1], Image.Resampling.NEAREST))
        shown = tinted(shown, small, colour, opacity=share)
    rows = [
        {
            "sentence": found.expression,
            "score": round(found.confidence(threshold=cut), 4) if mask.any() else 0.0,
            "area": round(float(mask.mean()), 6),
            "no_target": None if found.no_target is None else round(found.no_target, 4),
        }
        for found, mask in zip(state.found, whole)
    ]
    files = _written(Path(state.folder), whole, rows, {"threshold": cut, "ratio": state.ratio})
    return [
        Image.fromarray(shown),
        _legend(rows),
        *(gr.DownloadButton(value=f, interactive=True) for f in files),
    ]


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    """Enlarge (h, w, 3) uint8 whose longest side is below ``side`` pixels: a small one can then be seen."""
    scale = side / max(image.shape[:2])
    if scale <= 1:
        return image
    h, w = (max(1, round(length * scale)) for length in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST))


def _mask(found: Explanation, height: int, width: int, cut: float) -> np.ndarray:
    mask = found.mask(height, width, threshold=cut)
    return np.zeros_like(mask) if found.no_target is not None and found.no_target > 0.5 else mask


def _legend(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row, (red, green, blue) in zip(rows, PALETTE):
        chip = f'<span style="background:rgb({red},{green},{blue});padding:0 .7em;margin-right:.6em"></span>'
        absent = "" if row["no_target"] is None else f", no target {row['no_target']:.2f}"
        said = f"score {row['score']:.2f}, {row['area']:.1%} of the image" if row["area"] else "nothing found"
        lines.append(f"<div>{chip}<b>{html.escape(row['sentence'])}</b> · {said}{absent}</div>")
    note = "Score: mean probability of the pixels inside the mask."
    return "".join(lines) + f"<small>{note}</small>"


def _written(
    folder: Path, masks: Sequence[np.ndarray], rows: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> list[str]:
    """Write masks as PNG (a zip of several), as COCO's RLE, and as JSON with the scores."""
    names = [f"mask_{number}.png" for number in range(1, len(masks) + 1)]
    for name, mask in zip(names, masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / name)
    pictures = folder / names[0]
    if len(names) > 1:
        pictures = folder / "masks.zip"
        with zipfile.ZipFile(pictures, "w") as archive:
            for name in names:
                archive.write(folder / name, name)
    coded = [coco_mask.encode(np.asfortranarray(mask.view(np.uint8))) for mask in masks]
    runs = [{"size": list(x["size"]), "counts": x["counts"].decode("ascii")} for x in coded]
    (folder / "masks_rle.json").write_text(json.dumps(runs), encoding="utf-8")
    answers = [row | {"mask": name, "rle": run} for row, name, run in zip(rows, names, runs)]
    plain = json.dumps(settings | {"answers": answers}, indent=2, ensure_ascii=False)
    (folder / "answers.json").write_text(plain, encoding="utf-8")
    return [str(pictures), str(folder / "masks_rle.json"), str(folder / "answers.json")]


def _words(encoded: Encoded, found: Explanation, kind: str) -> list[Any]:
    """Draw one map of a sentence, a tile for each word."""
    image = _at_least(picture(encoded.image, side=TILE), TILE)
    if kind == "curated tokens":
        if found.curated is None:
            return ["This model has no visual expression: it curates nothing.", []]
        tiles = [dimmed(image, spread(row, *image.shape[:2])) for row in found.curated]
        labels = [f"{t}: {int(row.sum())} of {row.size}" for t, row in zip(found.tokens, found.curated)]
        said = "Bright: the visual tokens that the word curates, the r with the highest relevance (Eq. 3)."
    else:
        maps = {
            "relevance": found.scores,
            "attention to LE": None if found.to_language is None else found.to_language[-1],
            "attention to VE": None if found.to_visual is None else found.to_visual[-1],
        }[kind]
        if maps is None:
            return [f"This model has no {kind}.", []]
        low, high = float(maps.min()), float(maps.max())
        tiles = [heated(image, row, low, high) for row in maps]
        labels = [f"{t}: {row.min():.2f} to {row.max():.2f}" for t, row in zip(found.tokens, maps)]
        said = f"Dark blue is {low:.2f}, yellow {high:.2f}: " + (
            "cosine of each visual token with the word (Eq. 2)."
            if kind == "relevance"
            else "share of a pixel's attention in the finest decoder stage; LE and VE add up to 1."
        )
    return [said, [(Image.fromarray(tile), label) for tile, label in zip(tiles, labels)]]


def _notes(checkpoint: Checkpoint, sentences: Sequence[str]) -> str:
    unknown = list(dict.fromkeys(w for sentence in sentences for w in unknown_words(checkpoint, sentence)))
    if not unknown:
        return ""
    return f"Words that this model never learnt, and does not read: {', '.join(unknown)}."


def _notice(said: str) -> str:
    style = "border-left:4px solid #d55e00;padding:.4em .8em"
    return f'<div role="alert" style="{style}">{html.escape(said)}</div>' if said else ""


def _examples(run: Path, source: gr.Image, text: gr.Textbox) -> None:
    """Offer images of the run's data set with a sentence each, where that is still there."""
    try:
        if str(data_config(run).root).startswith("http"):
            return  # the page speaks to no other computer
        reader = data_of(run, None)
        groups = [] if reader.streamed else spaced_images(reader, "val", 4)
    except InputError:
        return
    rows = [[str(g[0].image), g[0].expression] for g in groups if isinstance(g[0].image, Path)]
    if rows:
        gr.Examples(rows, [source, text], cache_examples=False, label="images of its data set")
