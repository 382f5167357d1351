"""Find out at once whether the Hugging Face Hub can be reached: its libraries try for most of a minute."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

_TIMEOUT_SEC = 5
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def hub_answers() -> bool:
    """Return whether there is a connection to the Hub (HF_ENDPOINT). Behind a proxy nobody can tell: then True."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in _PROXIES):
        return True
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_TIMEOUT_SEC).close()
    except OSError:
        return False
    return True
