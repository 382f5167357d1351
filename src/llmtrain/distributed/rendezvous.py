"""Rank of this process and the address where all processes meet, from the config and the environment together.

    distributed.rendezvous.*  ┐
    RANK, WORLD_SIZE, …       ┴─ complete_environment ─▶ the complete environment ─▶ logs, faults, the engine, torch

torchrun sets the environment. Without torchrun, the user sets it or the config. torch reads only the environment and
checks little: with a missing variable, or a rank beyond the number of processes, it fails with a traceback or hangs.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llmtrain.distributed.exit_codes import EXIT_FOLDER
from llmtrain.errors import ConfigError

if TYPE_CHECKING:  # `--help` imports this file and does without pydantic
    from llmtrain.config.sections.training import RendezvousConfig

KEY = "distributed.rendezvous"
"""Section of the config. Each of its keys has an environment variable of that name in upper case: rank and RANK."""
LAST_PORT = 65535


def complete_environment(config: RendezvousConfig, *, environ: MutableMapping[str, str] = os.environ) -> None:
    """Put the values of `config` into the environment, and fill in the variables that follow from the others.

    Afterwards either WORLD_SIZE is not set (one process), or RANK, LOCAL_RANK and the address are set as well. Raises
    ConfigError if the config and the environment contradict each other, or if something is missing.
    """
    values: dict[str, object] = {
        "rank": config.rank,
        "world_size": config.world_size,
        "local_rank": config.local_rank,
    }
    if EXIT_FOLDER not in environ:  # else torchrun has set the workers' address; the config's is for the machines
        values |= {"master_addr": config.master_addr, "master_port": config.master_port}
    for key, value in values.items():
        if value is not None:
            _set(key, str(value), environ, source=f"{KEY}.{key}")
    method = config.init_method or ""
    if method.startswith("tcp:"):
        address = split_address(method.removeprefix("tcp://"))
        if address is None:
            raise ConfigError(f"{KEY}.init_method is {method}, which is not tcp://HOST:PORT")
        for key, value in zip(("master_addr", "master_port"), address, strict=True):
            _set(key, str(value), environ, source=f"{KEY}.init_method")
    if "WORLD_SIZE" not in environ:
        if "RANK" in environ:
            raise ConfigError(f"RANK is {environ['RANK']}, but WORLD_SIZE is not set: set WORLD_SIZE, or unset RANK")
        return
    world_size = _number("WORLD_SIZE", environ)
    if world_size > 1:
        _require("rank", environ, why=f"WORLD_SIZE is {world_size}")
        if not method.startswith("file:"):
            for key in ("master_addr", "master_port"):
                _require(key, environ, why=f"{world_size} processes have to meet somewhere")
            if not 1 <= _number("MASTER_PORT", environ) <= LAST_PORT:
                raise ConfigError(f"MASTER_PORT is {environ['MASTER_PORT']}, but ports are 1 to {LAST_PORT}")
    environ.setdefault("RANK", "0")
    if "LOCAL_RANK" not in environ and world_size > 1:
        _reject_unknown_gpu()
    environ.setdefault("LOCAL_RANK", "0")
    _check_numbers(environ, world_size=world_size)


def local_world_size_of(world_size: int) -> int:
    """Return the number of processes on this machine, from the completed environment.

    If LOCAL_WORLD_SIZE is not set, it is the smallest number over LOCAL_RANK that divides `world_size`.
    """
    if world_size == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    return next(number for number in range(local_rank + 1, world_size + 1) if world_size % number == 0)


def rendezvous_file(config: RendezvousConfig) -> str | None:
    """Return the file:// URL by which the processes find each other, if the config names one."""
    method = config.init_method or ""
    return method if method.startswith("file://") else None


def first_machine(config: RendezvousConfig, *, option: str | None) -> str | None:
    """Return HOST:PORT of the first machine from `option` (--rendezvous) or the config; None if neither names it.

    Raises ConfigError if the two differ, or if the config has only one of the host and the port.
    """
    host, port = config.master_addr, config.master_port
    if host is None and port is None:
        return option
    if host is None or port is None:
        present, missing = ("master_port", "master_addr") if host is None else ("master_addr", "master_port")
        raise ConfigError(f"{KEY}.{present} is set, but {KEY}.{missing} is not: set both, or remove it")
    _reject_difference(f"{KEY}.master_addr:master_port", f"{host}:{port}", "--rendezvous", option)
    return f"{host}:{port}"


def reject_identity(config: RendezvousConfig) -> None:
    """Raise ConfigError if the config numbers the processes, which --nproc starts and numbers itself."""
    for key in ("init_method", "rank", "world_size", "local_rank"):
        if (value := getattr(config, key)) is not None:
            raise ConfigError(
                f"{KEY}.{key} is {value}, but --nproc starts the processes and numbers them itself: remove one of the "
                "two"
            )


def split_address(address: str) -> tuple[str, int] | None:
    """Split HOST:PORT; return None if `address` does not have that form."""
    try:
        parts = urlsplit(f"//{address}")
        return (parts.hostname, parts.port) if parts.hostname and parts.port else None
    except ValueError:  # the port is not a number, or too large
        return None


def _check_numbers(environ: MutableMapping[str, str], *, world_size: int) -> None:
    rank, local_rank = _number("RANK", environ), _number("LOCAL_RANK", environ)
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are numbered from 0")
    local_world_size = _number("LOCAL_WORLD_SIZE", environ) if "LOCAL_WORLD_SIZE" in environ else None
    if local_world_size is not None and world_size % local_world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {local_world_size}, which does not divide WORLD_SIZE, {world_size}: start the same "
            "number of processes on each machine"
        )
    if local_rank >= (local_world_size or world_size):
        where = "WORLD_SIZE" if local_world_size is None else "LOCAL_WORLD_SIZE"
        raise ConfigError(
            f"LOCAL_RANK is {local_rank}, but {where} is {environ[where]}: number the processes of each machine from 0"
        )


def _reject_unknown_gpu() -> None:
    """Raise ConfigError if this machine has several GPUs, since only LOCAL_RANK says which one this process uses."""
    import torch  # here, since the command that starts processes uses this file and does not import torch

    if torch.cuda.device_count() > 1:
        raise ConfigError(
            f"LOCAL_RANK is not set, so it is unknown which of this machine's {torch.cuda.device_count()} GPUs this "
            f"process uses: set it or {KEY}.local_rank (0 if each machine has one process)"
        )


def _set(key: str, value: str, environ: MutableMapping[str, str], *, source: str) -> None:
    _reject_difference(source, value, key.upper(), environ.get(key.upper()))
    environ[key.upper()] = value


def _reject_difference(one: str, value: str, other: str, other_value: str | None) -> None:
    if other_value is not None and other_value != value:
        raise ConfigError(f"{one} says {value}, but {other} says {other_value}: remove one of them, or make them agree")


def _require(key: str, environ: MutableMapping[str, str], *, why: str) -> None:
    if key.upper() not in environ:
        raise ConfigError(
            f"{why}, but {key.upper()} is not set: set it or {KEY}.{key}, or let `--nproc N` or torchrun start the "
            "processes"
        )


def _number(variable: str, environ: MutableMapping[str, str]) -> int:
    value, least = environ[variable], 1 if variable.endswith("SIZE") else 0
    if not value.isdecimal() or int(value) < least:
        raise ConfigError(f"{variable} is {value!r}, which is not a whole number of {least} or more")
    return int(value)
