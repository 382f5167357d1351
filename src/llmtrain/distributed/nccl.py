"""Environment variables of NCCL and gloo: older names, defaults, and values that match nothing on this machine.

Variables that a user sets are not changed and reach every process. Nothing here imports torch.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger("llmtrain.device")

ASYNC_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_OLDER_NAMES = {
    "NCCL_ASYNC_ERROR_HANDLING": ASYNC_ERRORS,
    "NCCL_BLOCKING_WAIT": "TORCH_NCCL_BLOCKING_WAIT",
}
_DEFAULTS = {ASYNC_ERRORS: "3"}
"""3: a failed collective ends the process, without waiting for NCCL to clean up, which may hang as well."""
SHOWN = ("CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME", "TORCH_DISTRIBUTED_DEBUG")
SHOWN_PREFIXES = ("NCCL_", "TORCH_NCCL_")

_DEBUG_LEVELS = ("VERSION", "WARN", "INFO", "TRACE")
_MAX_CONNECTIONS = range(1, 33)
_ADAPTERS = Path("/sys/class/infiniband")


def nccl_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to add to the environment: defaults, and today's names for older names that are set."""
    renamed = {today: environ[older] for older, today in _OLDER_NAMES.items() if older in environ}
    return {name: value for name, value in (_DEFAULTS | renamed).items() if name not in environ}


def set_nccl_environment() -> None:
    """Add `nccl_settings` to this process's environment, and warn about contradictions in it."""
    for contradiction in contradictions(os.environ):
        log.warning("%s", contradiction)
    os.environ.update(nccl_settings(os.environ))


def contradictions(environ: Mapping[str, str]) -> list[str]:
    """Return a line for each setting whose older name has another value than today's name, which takes precedence."""
    return [
        f"{older} is {environ[older]}, but {today}, its name today, is {environ[today]} and takes precedence"
        for older, today in _OLDER_NAMES.items()
        if older in environ and today in environ and environ[older] != environ[today]
    ]


def network_interfaces() -> list[str]:
    """Return the names of this machine's network interfaces."""
    return sorted(name for _, name in socket.if_nameindex())


def infiniband_adapters() -> list[str]:
    """Return the names of this machine's InfiniBand adapters."""
    return sorted(path.name for path in _ADAPTERS.iterdir()) if _ADAPTERS.is_dir() else []


def network_faults(
    environ: Mapping[str, str], *, interfaces: Sequence[str], adapters: Sequence[str]
) -> list[tuple[str, str]]:
    """Return the settings that match nothing on this machine, each with its fix."""
    faults = [(each, "unset the older one") for each in contradictions(environ)]
    for name, present, kind in (
        ("NCCL_SOCKET_IFNAME", interfaces, "network interface"),
        ("GLOO_SOCKET_IFNAME", interfaces, "network interface"),
        ("NCCL_IB_HCA", adapters, "InfiniBand adapter"),
    ):
        selection = environ.get(name)
        if selection and not _selects(selection, present):
            fix = f"name one of {', '.join(present)}, or unset it" if present else "unset it: there is none here"
            faults.append((f"{name}={selection} matches no {kind} of this machine", fix))
    level = environ.get("NCCL_DEBUG")
    if level is not None and level.upper() not in _DEBUG_LEVELS:
        faults.append((f"NCCL_DEBUG={level} is not a log level", f"set it to one of {', '.join(_DEBUG_LEVELS)}"))
    connections = environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if connections is not None and (not connections.isdigit() or int(connections) not in _MAX_CONNECTIONS):
        fix = "set it to such a number, or unset it for CUDA's default, 8"
        faults.append((f"CUDA_DEVICE_MAX_CONNECTIONS={connections} is not a number from 1 to 32", fix))
    return faults


def _selects(selection: str, names: Sequence[str]) -> bool:
    """Return whether a selection in NCCL's syntax selects any of `names`. If `names` is empty, `^…` selects too.

    A selection is a list of prefixes. `=` before it makes them full names, `^` excludes what matches, and `:port` is
    ignored.
    """
    excludes = selection.startswith("^")
    exactly = selection.lstrip("^").startswith("=")
    prefixes = [part.partition(":")[0] for part in selection.lstrip("^=").split(",") if part]
    matching = [name for name in names if any(name == p if exactly else name.startswith(p) for p in prefixes)]
    return not names or len(matching) < len(names) if excludes else bool(matching)
