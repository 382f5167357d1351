"""Copies the project and this program to a machine by rsync, and runs from there. Only changes are sent.

A copy that broke is continued. scripts/rsync.sh starts rsync there in the right folder, so rsync's own arguments
contain no remote path, which a shell could misread.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.ssh.connection import (
    REASON_PREFIX,
    SSH_FAILED,
    connection_error,
    messages_file,
    script_line,
    ssh_words,
    with_reconnects,
)
from llmtrain.launching.ssh.quoting import rsync_shell
from llmtrain.launching.ssh.remote import RemoteMachine
from llmtrain.runs.folders import point_to_latest

STATE = ".llmtrain"
PACKAGE = Path(__file__).parents[2]
NOT_PUSHED = (
    *("/.llmtrain/", ".git/", ".venv*/", "venv/", "__pycache__/", "*.egg-info/", ".*_cache/", ".hypothesis/", "/site/"),
    *(".env", ".env.*", "*.pem", "id_rsa*", "id_ed25519*", ".netrc", ".ssh/", ".aws/", "/artifacts/"),
)
"""Patterns of environments, caches, results and secrets."""
REPLACED = f"{STATE}/replaced"
PARTIAL = ".llmtrain-partial"
BROKEN = (10, 12, 20, 30, 35, SSH_FAILED)
"""Exit codes of rsync for a connection that could not be made or that broke."""
VANISHED = 24
"""Exit code of rsync if files were deleted while they were copied: a run that trains deletes old checkpoints."""


def push_project(
    machine: RemoteMachine, folder: Path, *, exclude: Sequence[str], protect: Sequence[str], delete: bool
) -> int:
    """Copy the project `folder` to the machine, and return the number of files that were sent.

    `exclude`: more patterns of files that are not sent. With `delete`, files there that do not exist here are moved to
    .llmtrain/replaced, unless they match `protect`. Nothing outside the machine's folder changes.
    """
    if folder == Path.home() or folder == Path(folder.anchor):
        raise ConfigError(
            f"{folder} is not a project folder: change into the folder of the config and the data, and push from there"
        )
    words = ["--copy-unsafe-links", *(f"--exclude={pattern}" for pattern in (*exclude, *NOT_PUSHED))]
    if delete:
        words += [f"--filter=protect {pattern}" for pattern in protect]
        words += ["--delete", "--backup", f"--backup-dir={REPLACED}"]
    return _copy(machine, [*words, "./"], place=".", make=True, source=folder)


def push_program(machine: RemoteMachine) -> int:
    """Copy the source of this program to the machine."""
    words = ["--delete", "--exclude=__pycache__/", "./"]
    return _copy(machine, words, place=f"{STATE}/package/llmtrain", make=True, source=PACKAGE)


def fetch_run(machine: RemoteMachine, name: str, *, root: str) -> Path:
    """Copy the run `root`/`name` from the machine to the same place here, and return its folder.

    Files get their names only when all have arrived. A copy that broke is continued, now or at the next call.
    """
    if "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"{name!r} is not a run's id: `llmtrain launch ssh status` shows the newest run")
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--exclude=.*", "--delay-updates", f"--partial-dir={PARTIAL}"]
    with_reconnects(
        lambda: _copy(
            machine, words, place=f"{root if Path(root).is_absolute() else f'./{root}'}/{name}", make=False, into=folder
        ),
    )
    for partial in folder.rglob(PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)
    point_to_latest(Path(root).absolute())
    return folder


def _copy(
    machine: RemoteMachine,
    words: Sequence[str],
    *,
    place: str,
    make: bool,
    source: Path | None = None,
    into: Path | None = None,
) -> int:
    """Run rsync from the local folder `source`, or to the local folder `into`. Return the number of copied files.

    `place` is the folder there; `make` makes it if it does not exist.
    """
    other_side = f"{_bracketed(machine.destination)}:./"
    with messages_file() as messages:
        command = [
            *("rsync", "-a", "--no-owner", "--no-group", "-z", "--stats", "--timeout=60"),
            f"--rsh={rsync_shell(ssh_words(machine, messages=messages.name))}",
            f"--rsync-path={script_line(machine, 'rsync', place, 'make' if make else '')}",
            *words,
            *([other_side] if into is None else [other_side, "./"]),
        ]
        try:
            done = subprocess.run(
                command, cwd=source or into, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except FileNotFoundError:
            raise ConfigError("rsync is not installed here: apt-get install rsync") from None
        ssh_messages = messages.read()
    stderr = done.stderr.decode(errors="replace")
    if done.returncode in (0, VANISHED):
        found = re.search(rb"files transferred: ([\d,.]+)", done.stdout)
        return int(re.sub(rb"\D", b"", found[1])) if found else 0
    if reason := re.search(rf"^{REASON_PREFIX}(.*?)(?=^rsync|\Z)", stderr, re.MULTILINE | re.DOTALL):
        raise RunError(f"{machine}: {reason[1].strip()}")
    if done.returncode in BROKEN:
        raise connection_error(machine, ssh_messages or stderr.partition("\n")[0])
    raise RunError(f"{machine}: {stderr.strip() or f'rsync ended with exit code {done.returncode}'}")


def _bracketed(destination: str) -> str:
    user, at, host = destination.rpartition("@")
    return f"{user}{at}[{host}]" if ":" in host else destination


def patterns_of(paths: Sequence[str]) -> list[str]:
    """Return rsync patterns that match exactly those of `paths` that are in the current folder."""
    here = Path.cwd()
    inside = [full.relative_to(here) for path in paths if (full := here / Path(path).expanduser()).is_relative_to(here)]
    return ["/" + re.sub(r"([*?\[\\])", r"\\\1", str(path)) for path in inside if path.parts]
