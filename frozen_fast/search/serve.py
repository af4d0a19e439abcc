"""The search page: a small web application over one index, whose clips it serves by row number and never by path."""

from __future__ import annotations

import mimetypes
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from frozen_fast.data.load.previews import preview_jpeg
from frozen_fast.data.shards.layout import parse_address
from frozen_fast.errors import UserError
from frozen_fast.search.index import Hit, Index
from frozen_fast.search.row_table import row_clip

PAGE = Path(__file__).parent / "page"
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
MOST_RESULTS = 200
MOST_CHARACTERS = 1000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

K = Annotated[int, Query(ge=1, le=MOST_RESULTS)]
Text = Annotated[str, Query(max_length=MOST_CHARACTERS)]
Where = Annotated[list[str] | None, Query(max_length=20)]
Call = Callable[[Request], Awaitable[Response]]


def create_app(index: Index, hosts: Sequence[str] = LOCAL_HOSTS) -> FastAPI:
    """Build the application.

    Args:
        index: searched; its model is loaded now.
        hosts: names under which the page may be asked for (the Host header), so that a foreign page cannot reach a
            local one through a name of its own; "*" allows every name.

    Raises:
        UserError: the index's model is gone or another one.
    """
    assert index.model is not None  # loaded here rather than by the first question
    app = FastAPI(title="frozen_fast search", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Call) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(UserError)
    async def tell(request: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    _add_page(app)
    _add_questions(app, index)
    _add_clips(app, index)
    return app


def _add_page(app: FastAPI) -> None:
    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "search.html")

    @app.get("/search.js")
    def script() -> FileResponse:
        return FileResponse(PAGE / "search.js")

    @app.get("/search.css")
    def style() -> FileResponse:
        return FileResponse(PAGE / "search.css")


def _add_questions(app: FastAPI, index: Index) -> None:
    @app.get("/api/facts")
    def facts() -> dict[str, Any]:
        return index.facts()

    @app.get("/api/search")
    def search(q: Text, k: K = 24, where: Where = None) -> dict[str, Any]:
        return {"hits": [_described(hit) for hit in index.search_text(q, k, where or ())]}

    @app.get("/api/similar/{row}")
    def similar(row: int, k: K = 24, where: Where = None) -> dict[str, Any]:
        return {"hits": [_described(hit) for hit in index.search_similar(row, k, where or ())]}


def _add_clips(app: FastAPI, index: Index) -> None:
    @app.get("/preview/{row}")
    def preview(row: int) -> Response:
        return Response(preview_jpeg(row_clip(_unchanged(index, row))), media_type="image/jpeg")

    @app.get("/media/{row}")
    def media(row: int) -> FileResponse:
        clip = _unchanged(index, row)
        if parse_address(clip["path"]) is not None:
            raise UserError(f"row: got {row}, a packed clip; allowed: a clip with a file of its own (see its preview)")
        return FileResponse(clip["path"], media_type=mimetypes.guess_type(clip["path"])[0])


def _unchanged(index: Index, row: int) -> dict[str, Any]:
    """A row whose file is the one that was embedded: what has taken its place since was never meant to be shown.

    Raises:
        UserError: no such row, or its file is missing or changed.
    """
    clip = index.row(row)
    for path, state in index.changed_files([row]).items():
        raise UserError(f"row: got {row}, whose file {Path(path).name} is {state} since it was embedded")
    return clip


def _described(hit: Hit) -> dict[str, Any]:
    """A result for the page; playable: it has a video file of its own."""
    playable = hit.kind == "video" and parse_address(hit.path) is None
    return {**hit.to_json(), "row": hit.row, "caption": hit.caption, "playable": playable}
