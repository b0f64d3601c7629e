"""What a visitor of the page cannot make its server do: fetch addresses, read files, run programs for him.

gradio takes a URL wherever a file is expected, and has routes that fetch one, proxy one, call its hub or run
ffmpeg. With ``--host 0.0.0.0`` anyone could use them, from inside the network of whoever serves the page.
"""

import re
from typing import Any
from urllib.parse import unquote, urlsplit

import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_CLOSED = re.compile(r"/(file[=/]\s*https?:|proxy=|run-history|process_recording|vibe-)", re.IGNORECASE)
_ADDRESS = re.compile(r"\s*([a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)


def refuse_foreign_files(data: Any) -> None:
    """Look through what a visitor sent to an event, at any depth: gradio takes files wherever it finds them.

    Raises:
        gr.Error: It names a file by an address, or one that is no upload to this page.
    """
    if isinstance(data, dict):
        path, url = data.get("path"), data.get("url")
        foreign = _is_address(path) or (_is_address(url) and not _names(url, path))
        if "path" in data and (foreign or not _is_upload(path)):
            raise gr.Error(
                "This page reads no addresses and no files but uploads: give the image itself.",
                print_exception=False,
            )
        data = list(data.values())
    if isinstance(data, list | tuple):
        for part in data:
            refuse_foreign_files(part)


def _is_address(text: Any) -> bool:
    return isinstance(text, str) and _ADDRESS.match(text) is not None


def _is_upload(path: Any) -> bool:
    """Tell whether a path is in gradio's folder; it looks itself only where a dict says that it is a file."""
    return isinstance(path, str) and is_in_or_equal(path, get_upload_folder())


def _names(url: str, path: Any) -> bool:
    """Tell whether an address is the one under which a page serves an upload."""
    return unquote(urlsplit(url).path).endswith(f"/gradio_api/file={path}")


class ClosedRoutes:
    """ASGI middleware: routes of gradio that the page has no use for answer 403.

    Args:
        app: What answers the others.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    @classmethod
    def layer(cls) -> Middleware:
        """Give it as FastAPI takes it."""
        return Middleware(cls)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] == "http" and _CLOSED.search(unquote(scope["path"])):
            await PlainTextResponse("This page reads no addresses.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)
