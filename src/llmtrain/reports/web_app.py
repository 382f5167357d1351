"""Serves the pages of `ui` as a web application: its addresses. `guard` decides which requests it answers.

    /                     the list of runs          /api/runs      the same as data
    /runs?run=a&run=b     a run, or several         /api/page      the document about them (document.py)
                                                    /api/follow    what is new, as server-sent events (follower.py)
    /static/…             our scripts, Plotly's     /api/generate  a model's text, piece by piece (chat_box.py)

A run is named by its id, which is looked up among the folders that exist; a browser's text never becomes a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmtrain.reports.chat_box import ChatDesk
from llmtrain.reports.document import page_document
from llmtrain.reports.follower import Follower, follow
from llmtrain.reports.guard import Guard
from llmtrain.reports.html import asset, plotly_script
from llmtrain.reports.run_list import RunsList
from llmtrain.reports.run_page import LIVE_SCRIPTS, STYLE, live_page
from llmtrain.runs.listing import find_runs

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp

    from llmtrain.data.chat.shapes import Message
    from llmtrain.generation.language_model import Settings

MAX_RUNS_ON_A_PAGE: Final = 20
MAX_PROMPT_CHARACTERS: Final = 100_000
_NUMBERS: Final[dict[str, tuple[type, float, float]]] = {
    "max_new_tokens": (int, 1, 4096),
    "temperature": (float, 0, 10),
    "top_p": (float, 0, 1),
    "seed": (int, 0, 2**63 - 1),
}
"""Settings of a text: type, minimum and maximum."""


def make_app(
    root: Path, *, host: str, token: str | None = None, is_ending: Callable[[], bool] = lambda: False
) -> ASGIApp:
    """Return the application over all runs in `root`, to be served at the address `host`.

    `token`: what a request has to bring, for a server that others reach; None on a loopback address for all of its own.
    `is_ending` returns whether the server wants to end; answers that are still being written then end too.
    """
    desk, runs_list = ChatDesk(is_ending=is_ending), RunsList(root)

    def runs_named(request: Request) -> list[Path]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 0 < len(names) <= MAX_RUNS_ON_A_PAGE:
            raise HTTPException(400, f"1 to {MAX_RUNS_ON_A_PAGE} runs can be shown, and {len(names)} are named")
        return [_run_named(root, name) for name in names]

    def list_page(_: Request) -> Response:
        return HTMLResponse(live_page(title="Runs", kind="list"))

    def runs_page(request: Request) -> Response:
        folders = runs_named(request)
        return HTMLResponse(live_page(title=", ".join(folder.name for folder in folders), kind="runs"))

    def runs_data(_: Request) -> Response:
        return JSONResponse({"root": str(root.absolute()), "runs": runs_list.now()})

    def page_data(request: Request) -> Response:
        document = page_document(runs_named(request))
        for run in document["runs"]:
            checkpoints = root / run["id"] / "checkpoints"
            run["can_write"] = any((checkpoints / name).exists() for name in ("best", "final", "latest"))
        return JSONResponse(document)

    def follow_data(request: Request) -> Response:
        folders, positions = runs_named(request), request.query_params.getlist("from")
        if len(positions) != len(folders):
            raise HTTPException(400, "each `run` needs a `from`")
        followers = [
            Follower(folder, *_position(position)) for folder, position in zip(folders, positions, strict=True)
        ]
        return StreamingResponse(follow(followers, is_ending=is_ending), media_type="text/event-stream")

    async def generate(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "send JSON")  # a form of another page cannot
        run, messages, settings = _read_request(await request.body())
        answer = desk.answer(_run_named(root, run), messages, settings)
        return StreamingResponse(answer, media_type="application/jsonl")

    routes = [
        Route("/", list_page),
        Route("/runs", runs_page),
        Route("/static/{name}", _static),
        Route("/api/runs", runs_data),
        Route("/api/page", page_data),
        Route("/api/follow", follow_data),
        Route("/api/generate", generate, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={HTTPException: _rejection}), host=host, token=token)


def _static(request: Request) -> Response:
    name = request.path_params["name"]
    if name == STYLE:
        return Response(asset(name), media_type="text/css")
    if name in LIVE_SCRIPTS:
        return Response(plotly_script() if name == "plotly.js" else asset(name), media_type="text/javascript")
    raise HTTPException(404)


def _run_named(root: Path, name: str) -> Path:
    for folder in find_runs(root):
        if folder.name == name:
            return folder
    raise HTTPException(404, "there is no such run")


def _position(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,18})-(\d{1,20})", text, re.ASCII)
    if found is None:
        raise HTTPException(400, "`from` is what the page's document says under `followed_from`")
    return int(found[1]), int(found[2])


def _read_request(body: bytes) -> tuple[str, list[Message], Settings]:
    """Return run, messages and settings of a request to write."""
    try:
        request = json.loads(body)
        run, messages = request["run"], request["messages"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise HTTPException(400, "an object with `run` and `messages` is expected") from None
    if not isinstance(run, str) or not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise HTTPException(400, "`run` is a text, and `messages` are turns: objects with `role` and `content`")
    if messages[-1]["role"] != "user":
        raise HTTPException(400, "the last of `messages` is the user's")
    if sum(len(message["content"]) for message in messages) > MAX_PROMPT_CHARACTERS:
        raise HTTPException(400, f"`messages` have at most {MAX_PROMPT_CHARACTERS:,} characters")
    settings: Any = {key: _number(key, request[key]) for key in _NUMBERS if request.get(key) is not None}
    return run, messages, settings


def _is_turn(message: Any) -> bool:
    return (
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"], str)
    )


def _number(key: str, value: Any) -> float:
    kind, least, most = _NUMBERS[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most or (kind is int and value != int(value)):
        raise HTTPException(400, f"`{key}` is a number from {least:g} to {most:g}")
    return kind(value)  # type: ignore[no-any-return]


def _rejection(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
