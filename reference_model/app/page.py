"""The page of ``metris app``: drop an image, write sentences, see masks and what each word sees."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads these when it is imported and launched
os.environ["GRADIO_RUN_HISTORY"] = "False"  # it offers to keep what visitors ask for on a hub

import gradio as gr

from reference_model.app.security import ClosedRoutes, refuse_foreign_files
from reference_model.app.session import MAPS, Session, asked, cut_at, legend, painted, tiles
from reference_model.checkpoints.checkpoint import Checkpoint
from reference_model.files import InputError
from reference_model.viewing.explain import explain, unknown_words
from reference_model.viewing.runs import data_config, data_of, spaced_images

BUTTONS = ["download", "fullscreen"]
"""Of a picture; gradio's others include one that uploads it to a hub."""
FILES_LIVE = 2 * 3600
"""Seconds that gradio keeps uploads and files to download. The image of an open page lives in its session."""
LET_GO = (
    "This page was left alone for so long that its image was let go: press Find, and it is looked at again."
)


class Page(gr.Blocks):
    """Blocks whose visitors name no file but their own uploads."""

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """Refuse foreign files before gradio would fetch them."""
        refuse_foreign_files(inputs)
        return await super().preprocess_data(block_fn, inputs, *rest, **options)


def blocks(checkpoint: Checkpoint, run: Path) -> Page:
    """Build the page of a model."""
    curates = checkpoint.model.guidance.extractor is not None
    with Page(title="METRIS", analytics_enabled=False, delete_cache=(600, FILES_LIVE)) as page:
        # No time to live: gradio lets go of it an hour after the last answer, once its connection broke.
        session = gr.State(Session(), delete_callback=Session.forget)
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
                        scores = gr.HTML(elem_id="legend")
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
        drawn = [masks, scores, png, rle, plain]
        unchanged = lambda outputs: [gr.skip()] * len(outputs)

        def let_go(state: Session, sentence: int | None) -> bool:
            """Tell whether the page shows answers that its session no longer has."""
            return state.encoded is None and sentence is not None

        def draw(state: Session, cut: float, share: float) -> list[Any]:
            found = cut_at(state, cut)
            buttons = [gr.DownloadButton(value=file, interactive=True) for file in found.files]
            return [painted(found, share), legend(found.rows), *buttons]

        def tell(state: Session, sentence: int | None, kind: str) -> list[Any]:
            """Draw the map of the tab that is open; the others are drawn when they are."""
            out = unchanged(galleries)
            if kind in MAPS and sentence is not None and sentence < len(state.found):
                at = 2 * MAPS.index(kind)
                out[at : at + 2] = tiles(state.encoded, state.found[sentence], kind)
            return out

        def find(
            path: str | None, lines: str, cut: float, share: float, r: float, kind: str, state: Session
        ) -> list[Any]:
            try:
                state = asked(checkpoint, path, lines, r if curates else None, state)
            except InputError as error:
                return [_notice(str(error)), *[gr.skip()] * 2, *unchanged(drawn + galleries)]
            choices = gr.Radio(choices=[(s, i) for i, s in enumerate(state.sentences)], value=0)
            notes = _notes(checkpoint, state.sentences)
            return [_notice(notes), state, choices, *draw(state, cut, share), *tell(state, 0, kind)]

        def recut(cut: float, share: float, sentence: int | None, state: Session) -> list[Any]:
            if let_go(state, sentence):
                return [_notice(LET_GO), *unchanged(drawn)]
            return [gr.skip(), *(draw(state, cut, share) if state.found else unchanged(drawn))]

        def repaint(share: float, sentence: int | None, state: Session) -> list[Any]:
            """Draw the picture anew, from masks that are there already."""
            if let_go(state, sentence):
                return [_notice(LET_GO), gr.skip()]
            return [gr.skip(), gr.skip() if state.cut is None else painted(state.cut, share)]

        def recurate(
            cut: float, share: float, r: float, sentence: int | None, kind: str, state: Session
        ) -> list[Any]:
            if let_go(state, sentence):
                return [_notice(LET_GO), *unchanged(drawn + galleries)]
            if not (curates and state.sentences) or r == state.ratio:
                return [gr.skip(), *unchanged(drawn + galleries)]
            state.found = explain(checkpoint, state.encoded, state.sentences, ratio=r)
            state.ratio = r
            return [gr.skip(), *draw(state, cut, share), *tell(state, sentence, kind)]

        def retell(state: Session, sentence: int | None, kind: str) -> list[Any]:
            notice = _notice(LET_GO) if let_go(state, sentence) else gr.skip()
            return [notice, *tell(state, sentence, kind)]

        # These write files of the same names, one after the other.
        writes = {"concurrency_id": "files"}
        live = {"trigger_mode": "always_last", "show_progress": "hidden", "api_visibility": "private"}
        go.click(
            find,
            [source, text, threshold, opacity, ratio, tab, session],
            [message, session, which, *drawn, *galleries],
            **writes,
        )
        threshold.change(recut, [threshold, opacity, which, session], [message, *drawn], **live, **writes)
        opacity.change(repaint, [opacity, which, session], [message, masks], **live)
        which.change(retell, [session, which, tab], [message, *galleries], **live)
        for kind, one in tabs.items():
            select = lambda state, sentence, kind=kind: [kind, *retell(state, sentence, kind)]
            one.select(select, [session, which], [tab, message, *galleries], **live)
        inputs = [threshold, opacity, ratio, which, tab, session]
        ratio.change(recurate, inputs, [message, *drawn, *galleries], **live, **writes)
    return page


def serve(page: Page, *, host: str, port: int, wait: bool = True) -> str:
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
        app_kwargs={"middleware": [ClosedRoutes.layer()]},
    )
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return str(address)


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
