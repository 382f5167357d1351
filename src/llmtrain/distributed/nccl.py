"""What the environment says to NCCL, and to gloo about the network: older names, defaults, and names of nothing here.

Whatever a user sets is left as it is and goes to every process; nothing here imports torch.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """What is to be added to the environment: today's names of what is set by an older one, and defaults."""
    renamed = {today: environ[older] for older, today in _OLDER_NAMES.items() if older in environ}
    return {name: value for name, value in (_DEFAULTS | renamed).items() if name not in environ}


def contradictions(environ: Mapping[str, str]) -> list[str]:
    """Settings whose older name says something else than today's, which counts."""
    return [
        f"{older} is {environ[older]}, but {today}, its name today, is {environ[today]}, and counts"
        for older, today in _OLDER_NAMES.items()
        if older in environ and today in environ and environ[older] != environ[today]
    ]


def network_interfaces() -> list[str]:
    """Names of this machine's."""
    return sorted(name for _, name in socket.if_nameindex())


def infiniband_adapters() -> list[str]:
    """Names of this machine's."""
    return sorted(path.name for path in _ADAPTERS.iterdir()) if _ADAPTERS.is_dir() else []


def network_faults(
    environ: Mapping[str, str], *, interfaces: Sequence[str], adapters: Sequence[str]
) -> list[tuple[str, str]]:
    """What is set and cannot be meant so on this machine, each with what to do."""
    faults = [(each, "unset the older one") for each in contradictions(environ)]
    for name, there, what in (
        ("NCCL_SOCKET_IFNAME", interfaces, "network interface"),
        ("GLOO_SOCKET_IFNAME", interfaces, "network interface"),
        ("NCCL_IB_HCA", adapters, "InfiniBand adapter"),
    ):
        wanted = environ.get(name)
        if wanted and not _selects(wanted, there):
            fix = f"name one of {', '.join(there)}, or unset it" if there else "unset it: there is none here"
            faults.append((f"{name}={wanted} leaves no {what} of this machine", fix))
    level = environ.get("NCCL_DEBUG")
    if level is not None and level.upper() not in _DEBUG_LEVELS:
        faults.append((f"NCCL_DEBUG={level} is no level", f"one of {', '.join(_DEBUG_LEVELS)}"))
    connections = environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
    if connections is not None and (not connections.isdigit() or int(connections) not in _MAX_CONNECTIONS):
        faults.append((f"CUDA_DEVICE_MAX_CONNECTIONS={connections} is not 1 to 32", "unset it for CUDA's own 8"))
    return faults


def _selects(wanted: str, names: Sequence[str]) -> bool:
    """Whether NCCL's way of naming leaves any: prefixes by commas; `=` exactly, `^` all but these; `:port` aside."""
    excludes = wanted.startswith("^")
    exactly = wanted.lstrip("^").startswith("=")
    given = [part.partition(":")[0] for part in wanted.lstrip("^=").split(",") if part]
    chosen = [
        name for name in names if any(name == each if exactly else name.startswith(each) for each in given)
    ]  # fmt: skip
    return not names or len(chosen) < len(names) if excludes else bool(chosen)
