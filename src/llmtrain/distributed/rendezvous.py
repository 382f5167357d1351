"""Who this process is among the others, and where they meet: the config's word and the environment's, brought together.

    distributed.rendezvous.*  ┐
    RANK, WORLD_SIZE, …       ┴─ settle ─▶ the environment, complete ─▶ everybody who asks (logs, faults, the engine)

torchrun sets the environment by itself; by hand either place will do. Where both speak and differ, that is a mistake.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from urllib.parse import urlsplit

import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.training import RendezvousConfig
from llmtrain.distributed.asked import KEY, refuse_difference
from llmtrain.distributed.launch import EXIT_FOLDER, LAST_PORT


def settle(config: RendezvousConfig, *, environ: MutableMapping[str, str] = os.environ) -> None:
    """Put what `config` says into the environment, and fill in what follows from the rest.

    Afterwards either WORLD_SIZE is absent (one process), or RANK, LOCAL_RANK and where to meet are there. Raises
    ConfigError where two places contradict each other, or something is missing.
    """
    said = {
        "rank": ("RANK", config.rank),
        "world_size": ("WORLD_SIZE", config.world_size),
        "local_rank": ("LOCAL_RANK", config.local_rank),
        "master_addr": ("MASTER_ADDR", config.master_addr),
        "master_port": ("MASTER_PORT", config.master_port),
    }
    for key, (variable, value) in said.items():
        if value is not None and not (
            key.startswith("master") and EXIT_FOLDER in environ
        ):  # --nproc's, not the workers'
            refuse_difference(f"{KEY}.{key}", str(value), variable, environ.get(variable))
            environ[variable] = str(value)
    _meet_by_address(config, environ)
    if "WORLD_SIZE" not in environ:
        if "RANK" in environ:
            raise ConfigError(f"RANK is {environ['RANK']}, but nobody says of how many: set WORLD_SIZE, or unset RANK")
        return
    world_size = _number("WORLD_SIZE", environ)
    if world_size > 1:
        _require("RANK", "rank", environ, why=f"WORLD_SIZE is {world_size}")
        if not (config.init_method or "").startswith("file:"):
            for key in ("master_addr", "master_port"):
                _require(said[key][0], key, environ, why=f"{world_size} processes have to meet somewhere")
            if not 1 <= _number("MASTER_PORT", environ) <= LAST_PORT:
                raise ConfigError(f"MASTER_PORT is {environ['MASTER_PORT']}, but ports are 1 to {LAST_PORT}")
    environ.setdefault("RANK", "0")
    if "LOCAL_RANK" not in environ and world_size > 1 and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"LOCAL_RANK is not set, so nobody knows which of the {torch.cuda.device_count()} GPUs here is this "
            f"process's: set it or {KEY}.local_rank (0 where each machine has one process)"
        )
    environ.setdefault("LOCAL_RANK", "0")
    rank, local_rank = _number("RANK", environ), _number("LOCAL_RANK", environ)
    if rank >= world_size:
        raise ConfigError(f"RANK is {rank}, but WORLD_SIZE is {world_size}: ranks are numbered from 0")
    local_world_size = _number("LOCAL_WORLD_SIZE", environ) if "LOCAL_WORLD_SIZE" in environ else None
    if local_world_size is not None and world_size % local_world_size:
        raise ConfigError(
            f"LOCAL_WORLD_SIZE is {local_world_size}, which does not divide the {world_size} of WORLD_SIZE: start as "
            "many processes on each machine"
        )
    if local_rank >= (local_world_size or world_size):
        where = "WORLD_SIZE" if local_world_size is None else "LOCAL_WORLD_SIZE"
        raise ConfigError(f"LOCAL_RANK is {local_rank}, but {where} is {environ[where]}: it is counted on each machine")


def file_to_meet_at(config: RendezvousConfig) -> str | None:
    """The URL of the file by which the processes find each other, where the config names one."""
    method = config.init_method or ""
    return method if method.startswith("file://") else None


def _meet_by_address(config: RendezvousConfig, environ: MutableMapping[str, str]) -> None:
    method = config.init_method or ""
    if not method.startswith("tcp:"):
        return
    url = urlsplit(method)
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host, port = url.hostname, None
    if host is None or port is None:
        raise ConfigError(f"{KEY}.init_method is {method}, which is not tcp://HOST:PORT")
    for variable, value in (("MASTER_ADDR", host), ("MASTER_PORT", str(port))):
        refuse_difference(f"{KEY}.init_method", value, variable, environ.get(variable))
        environ[variable] = value


def _require(variable: str, key: str, environ: MutableMapping[str, str], *, why: str) -> None:
    if variable not in environ:
        raise ConfigError(
            f"{why}, but {variable} is not set: set it or {KEY}.{key}, or let `--nproc N` or torchrun start the "
            "processes"
        )


def _number(variable: str, environ: MutableMapping[str, str]) -> int:
    try:
        number = int(environ[variable])
    except ValueError:
        number = -1
    if number < 0 or (number == 0 and variable.endswith("SIZE")):
        raise ConfigError(f"{variable} is {environ[variable]!r}, which is no such number")
    return number
