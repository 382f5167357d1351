"""Decides which requests `ui` answers: those that come to its own address, and with its token where others reach it.

Host, Origin: ours ─no─▶ 403
      │ yes
token: not needed, in the cookie or as a bearer ─no─▶ in the address ─▶ cookie, and the address without it
      │ yes                                             └─no─▶ 401
    the application
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from http.cookies import CookieError, SimpleCookie
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send
    from starlette.types import Message as ServerMessage

TOKEN: Final = re.compile(r"[A-Za-z0-9._~-]{16,512}")
"""A token that an address and a cookie hold as it is, and that nobody guesses."""
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


class Guard:
    """Rejects requests whose Host or Origin is not this server, and requests without the token where there is one.

    A foreign Host comes from DNS rebinding, by which a page of another site reads from this machine under its own name.
    An address cannot be rebound, so a server for others takes any address as its Host, but answers only with its token.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        assert token is not None or is_loopback(host), "a server that others reach needs a token"
        self._app = app
        self._names = _LOOPBACK_NAMES | {host.lower(), *([] if is_loopback(host) else [socket.gethostname().lower()])}
        self._any_address = not is_loopback(host)
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI defines it."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: ServerMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        answer = self._rejection(headers) or self._without_token(scope, headers) or self._app
        await answer(scope, receive, send_with_headers)

    def _rejection(self, headers: Headers) -> Response | None:
        origin = headers.get("origin")
        is_ours = self._is_ours(headers.get("host", ""))
        if is_ours and (origin is None or urlsplit(origin).netloc.lower() == headers["host"].lower()):
            return None
        return JSONResponse({"error": "this server answers only under its own address"}, status_code=403)

    def _without_token(self, scope: Scope, headers: Headers) -> Response | None:
        """Return what is answered in place of the application; None for a request with the token, or if none is needed.

        The token of an address becomes a cookie, so that the browser's history and its address bar do not show it.
        """
        if self._token is None:
            return None
        cookie = f"llmtrain_{(scope.get('server') or ('', 0))[1]}"  # cookies do not differ by port
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if self._is_token(_cookies(headers).get(cookie, "")) or self._is_token(bearer):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if scope["method"] != "GET" or not any(map(self._is_token, given)):
            message = "open the address with the token that `llmtrain ui` printed, or send it as a bearer token"
            return JSONResponse({"error": message}, status_code=401, headers={"WWW-Authenticate": "Bearer"})
        rest = urlencode([(name, value) for name, value in query if name != "token"])
        path = "/" + scope["path"].lstrip("/")  # of this server: //x would be another
        answer = RedirectResponse(f"{path}?{rest}" if rest else path, status_code=303)
        answer.set_cookie(cookie, self._token, httponly=True, samesite="lax")  # strict: not after a link from elsewhere
        return answer

    def _is_token(self, given: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(given.encode(), self._token.encode())

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._names or (self._any_address and _is_address(name))


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server at `host`."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _cookies(headers: Headers) -> dict[str, str]:
    try:
        return {name: one.value for name, one in SimpleCookie(headers.get("cookie", "")).items()}
    except CookieError:
        return {}
