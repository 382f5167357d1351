"""`ui`: the pages of all runs of a folder, live, in a browser on this machine."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.recipes.pages.app import is_loopback, make_app

log = logging.getLogger("llmtrain.ui")

_SECONDS_TO_FINISH = 2


def serve(
    *,
    root_dir: str,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda url: None,
) -> dict[str, Any]:
    """Serve until Ctrl-C or SIGTERM. `port` 0 takes a free one; `ready` is told the address once it answers.

    Raises ConfigError when there is no folder of runs, and when the address cannot be had.
    """
    import uvicorn  # here: a config that is wrong should be said at once

    root = Path(root_dir)
    if not root.is_dir():
        raise ConfigError(f"{root.absolute()}: there is no such folder; name the folder of runs with --root")
    with _listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listener.getsockname()[1]}/"
        if not is_loopback(host):
            log.warning("%s is no loopback address: whoever reaches it can read all runs and use their models", host)
        config = uvicorn.Config(
            make_app(root, host=host, is_ending=lambda: server.should_exit),
            log_level="warning",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_SECONDS_TO_FINISH,
        )
        server = uvicorn.Server(config)
        ready(url)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    return {"url": url, "root": str(root.absolute())}


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that whoever is told the address can ask at once."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise ConfigError(
            f"cannot serve at {host}, port {port} ({error.strerror or error}): choose another --port (0: any)"
        ) from None
    return listener
