"""Finds the machines of a job: from flags, then `remote` of the config, then REMOTE_HOST, REMOTE_USER, REMOTE_DIR."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmtrain.config.sections.remote import RemoteConfig
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.env_file import read_env_file

_HOST = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+\\@-]*)@)?"
    r"(?:(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)(?::(?P<port>\d{1,5}))?|(?P<v6>\[[0-9A-Fa-f:.]+(?:%\w+)?\])(?::(?P<v6port>\d{1,5}))?)"
)


@dataclass(frozen=True, kw_only=True)
class RemoteMachine:
    """One machine, and the project folder on it."""

    name: str
    """Name as the user wrote it."""
    destination: str
    """[USER@]HOST for ssh and rsync."""
    port: int | None
    folder: str
    ssh_config: str | None

    @property
    def host(self) -> str:
        """Host without the user."""
        return self.destination.rpartition("@")[2]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Remote:
    """The machines of a job, the first of which is node 0."""

    machines: tuple[RemoteMachine, ...]
    python: str | None
    extras: tuple[str, ...]
    exclude: tuple[str, ...]
    env_file: str | None
    variables: Mapping[str, str] | None
    """Variables of the env file; None without such a file."""

    @property
    def first(self) -> RemoteMachine:
        """Node 0, on which rank 0 writes the run."""
        return self.machines[0]


def remote_of(config: Config | None, given: Mapping[str, object], *, environ: Mapping[str, str] = os.environ) -> Remote:
    """Return the machines of a job. `given`: the flags, by config key. Raises ConfigError for missing or bad values."""
    section = config.remote if config else RemoteConfig()
    merged: RemoteConfig = section.model_copy(
        update={key: value for key, value in given.items() if value not in (None, [])}
    )
    hosts = _listed(merged.host) or _listed(_variable("REMOTE_HOST", environ))
    if not hosts:
        raise ConfigError("no machine is named: give --host USER@HOST, remote.host in the config, or REMOTE_HOST")
    folder = merged.dir or _variable("REMOTE_DIR", environ)
    if not folder:
        raise ConfigError(f"no folder on {hosts[0]} is named: give --dir DIR, remote.dir in the config, or REMOTE_DIR")
    _check_folder(folder)
    user = merged.user or _variable("REMOTE_USER", environ)
    machines = tuple(_machine(host, user=user, folder=folder, ssh_config=merged.ssh_config) for host in hosts)
    if len({(machine.destination, machine.port) for machine in machines}) < len(machines):
        raise ConfigError(f"a host is named twice: {', '.join(hosts)}; one machine is one node, with --nproc processes")
    return Remote(
        machines=machines,
        python=merged.python,
        extras=tuple(merged.extras),
        exclude=tuple(merged.exclude),
        env_file=merged.env_file,
        variables=read_env_file(merged.env_file) if merged.env_file else None,
    )


def _machine(host: str, *, user: str, folder: str, ssh_config: str | None) -> RemoteMachine:
    """Return one machine. A `host` of another form is rejected, since it could be an option or a command."""
    written = host if "@" in host or not user else f"{user}@{host}"
    found = _HOST.fullmatch(written)
    port = found and (found["port"] or found["v6port"])
    if found is None or (port and not 1 <= int(port) <= 65535):
        raise ConfigError(
            f"{written!r} is not a machine: write [USER@]HOST or [USER@]HOST:PORT, or a name from ~/.ssh/config"
        )
    name = found["name"] or found["v6"].strip("[]")
    return RemoteMachine(
        name=written,
        destination=f"{found['user']}@{name}" if found["user"] else name,
        port=int(port) if port else None,
        folder=folder,
        ssh_config=ssh_config,
    )


def _check_folder(folder: str) -> None:
    if folder.strip("/") in ("", "~", ".") or folder in ("~", "~/"):
        raise ConfigError(f"the folder on the hosts is {folder!r}: name one for this project alone, like ~/project")
    if folder.startswith("~") and not folder.startswith("~/"):
        raise ConfigError(
            f"{folder!r}: of home folders only ~/… is known, that of the user who logs in; write the full path of "
            "another one"
        )


def _variable(name: str, environ: Mapping[str, str]) -> str:
    """Return a variable without the blanks that a Makefile leaves before a comment."""
    return environ.get(name, "").strip()


def _listed(hosts: str | Sequence[str]) -> list[str]:
    """Return the hosts one by one; commas or blanks may separate them."""
    words = [hosts] if isinstance(hosts, str) else hosts
    return [host for word in words for host in re.split(r"[,\s]+", word) if host]
