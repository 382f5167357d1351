"""`ui`: serve the pages of all runs of a folder, live, to a browser on this machine, or with a token to others."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError
from llmtrain.reports.guard import TOKEN, is_loopback
from llmtrain.reports.web_app import make_app
from llmtrain.runs.listing import find_runs
from llmtrain.runs.stores import fetched_runs

log = logging.getLogger("llmtrain.ui")

_SECONDS_TO_FINISH = 2


def serve(
    *,
    root_dir: str,
    host: str,
    port: int,
    token_file: str | None = None,
    ready: Callable[[str], None] = lambda url: None,
) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM. `port` 0 takes a free one. `ready` gets the URL as soon as it answers.

    At an address that others reach, every request needs a token: that of `token_file`, or a new one, which stands in
    the URL. Raises ConfigError when there is no folder of runs, and when the address or the token cannot be used.
    """
    import uvicorn  # here, so that wrong arguments are reported at once

    root = fetched_runs(root_dir)
    find_runs(root)
    with _listen(host, port) as listener:
        token = _token(host, token_file)
        url = _url(host, listener.getsockname()[1])
        config = uvicorn.Config(
            make_app(root, host=host, token=token, is_ending=lambda: server.should_exit),
            log_level="warning",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
        )
        server = uvicorn.Server(config)
        ready(url if token is None or token_file else f"{url}?token={token}")
        if not is_loopback(host):
            log.warning("others reach %s: with the token they can read all runs, and use their models", host)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return {"url": url, "root": str(root.absolute())}


def _url(host: str, port: int) -> str:
    """Return the address to open; that of a server on all addresses by the name of this machine."""
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}/"


def _token(host: str, token_file: str | None) -> str | None:
    if token_file is None:
        return None if is_loopback(host) else secrets.token_urlsafe(32)
    file = Path(token_file)
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not ASCII"
        raise ConfigError(f"--token-file {file}: cannot be read ({why})") from None
    if TOKEN.fullmatch(token) is None:
        raise ConfigError(
            f"--token-file {file}: a token is 16 to 512 letters, digits and . _ ~ -: write one with "
            f"`openssl rand -hex 32 > {file}`"
        )
    return token


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that already listens, so that a request to its address is answered at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        fix = "--port (0: any)" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise ConfigError(
            f"cannot serve at {host!r}, port {port} ({error.strerror or error}): choose another {fix}"
        ) from None
    return listener
