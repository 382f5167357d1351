"""The pages of `ui` as a web application: which addresses there are, and who may ask.

    /                     the list of runs          /api/runs      the same as data
    /runs?run=a&run=b     a run, or several         /api/page      the document about them (document.py)
                                                    /api/follow    what is new, as server-sent events (live.py)
    /static/…             our scripts, Plotly's     /api/generate  a model's text, piece by piece (chat.py)

A run is named by its id, which is looked up among the folders there are; no path is made of what a browser sends.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmtrain.recipes.pages.chat import ChatDesk
from llmtrain.recipes.pages.document import page_document
from llmtrain.recipes.pages.live import Follower, follow
from llmtrain.recipes.pages.run_list import RunsList
from llmtrain.recipes.runs import find_runs
from llmtrain.tracking.page.html import LIVE_SCRIPTS, STYLE, asset, live_page, plotly_script

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as ServerMessage

    from llmtrain.data.chat.shapes import Message
    from llmtrain.recipes.loading.language_model import Settings

MAX_RUNS_ON_A_PAGE: Final = 20
MAX_PROMPT_CHARACTERS: Final = 100_000
_LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NUMBERS: Final[dict[str, tuple[type, float, float]]] = {
    "max_new_tokens": (int, 1, 4096),
    "temperature": (float, 0, 10),
    "top_p": (float, 0, 1),
    "seed": (int, 0, 2**63 - 1),
}
"""Settings of a text: type, least and most."""


def make_app(root: Path, *, host: str, is_ending: Callable[[], bool] = lambda: False) -> ASGIApp:
    """The application over all runs in `root`; `host` is the address that it is served at.

    `is_ending`: whether the server wants to end; answers that are still being written then end too.
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
        run, messages, settings = _asked(await request.body())
        answer = desk.answer(_run_named(root, run), messages, settings)
        return StreamingResponse(answer, media_type="application/jsonl")

    def static(request: Request) -> Response:
        name = request.path_params["name"]
        if name == STYLE:
            return Response(asset(name), media_type="text/css")
        if name in LIVE_SCRIPTS:
            return Response(plotly_script() if name == "plotly.js" else asset(name), media_type="text/javascript")
        raise HTTPException(404)

    routes = [
        Route("/", list_page),
        Route("/runs", runs_page),
        Route("/static/{name}", static),
        Route("/api/runs", runs_data),
        Route("/api/page", page_data),
        Route("/api/follow", follow_data),
        Route("/api/generate", generate, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes, exception_handlers={HTTPException: _refusal}), host=host)


class Guard:
    """Turns away requests whose Host or Origin is not this server: those of a page that a foreign name led here.

    Against DNS rebinding, by which a page of another site reads from 127.0.0.1 under its own name.
    """

    def __init__(self, app: ASGIApp, *, host: str) -> None:
        self._app = app
        self._names = _LOOPBACK_NAMES | {host.lower(), *([] if is_loopback(host) else [socket.gethostname().lower()])}
        self._any_address = not is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: ServerMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if not self._is_ours(headers.get("host", "")) or (
            origin is not None and urlsplit(origin).netloc.lower() != headers["host"].lower()
        ):
            refusal = JSONResponse({"error": "this server answers only under its own address"}, status_code=403)
            await refusal(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or (self._any_address and _is_address(name))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at `host`."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


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


def _asked(body: bytes) -> tuple[str, list[Message], Settings]:
    """Run, messages and settings of a request to write."""
    try:
        asked = json.loads(body)
        run, messages = asked["run"], asked["messages"]
    except (ValueError, KeyError, TypeError):
        raise HTTPException(400, "an object with `run` and `messages` is expected") from None
    if not isinstance(run, str) or not isinstance(messages, list) or not messages or not all(map(_is_turn, messages)):
        raise HTTPException(400, "`run` is a text, and `messages` are turns: objects with `role` and `content`")
    if messages[-1]["role"] != "user":
        raise HTTPException(400, "the last of `messages` is the user's")
    if sum(len(message["content"]) for message in messages) > MAX_PROMPT_CHARACTERS:
        raise HTTPException(400, f"`messages` have at most {MAX_PROMPT_CHARACTERS:,} characters")
    settings: Any = {key: _number(key, asked[key]) for key in _NUMBERS if asked.get(key) is not None}
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


def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
