"""rsync: the project and this program to a machine, runs from there. Only changes travel, and a broken copy goes on.

rsync runs in the folder there by way of scripts/rsync.sh, so no path of the other side is ever a word of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.ssh.connection import (
    REASON,
    SSH_FAILED,
    connection_error,
    messages_file,
    persistently,
    script_line,
    ssh_words,
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
"""Environments, caches, results and secrets."""
REPLACED = f"{STATE}/replaced"
PARTIAL = ".llmtrain-partial"
BROKEN = (10, 12, 20, 30, 35, SSH_FAILED)
"""Exit codes of rsync for a connection that could not be made or that broke."""
VANISHED = 24
"""Files were deleted while they were copied, as a run that trains deletes old checkpoints."""


def push_project(
    machine: RemoteMachine, folder: Path, *, exclude: Sequence[str], protect: Sequence[str], delete: bool
) -> int:
    """Copy the project `folder` to the machine, and return the number of files that were sent.

    `exclude`: more patterns of files that stay here. With `delete`, files there that are not here are moved to
    .llmtrain/replaced, but none of those that `protect` matches. Nothing outside the machine's folder changes.
    """
    if folder == Path.home() or folder == Path(folder.anchor):
        raise ConfigError(
            f"{folder} is no project: change into the folder of the config and the data, and push from there"
        )
    words = ["--copy-unsafe-links", *(f"--exclude={pattern}" for pattern in (*exclude, *NOT_PUSHED))]
    if delete:
        words += [f"--filter=protect {pattern}" for pattern in protect]
        words += ["--delete", "--backup", f"--backup-dir={REPLACED}"]
    return _copy(machine, [*words, "./"], place=".", make=True, source=folder)


def push_program(machine: RemoteMachine) -> int:
    """Copy this program to the machine, as it is here."""
    words = ["--delete", "--exclude=__pycache__/", "./"]
    return _copy(machine, words, place=f"{STATE}/package/llmtrain", make=True, source=PACKAGE)


def fetch_run(machine: RemoteMachine, name: str, *, root: str) -> Path:
    """Copy the run `root`/`name` from the machine to the same place here, and return its folder.

    A file gets its name when all have come. A copy that broke goes on where it was, now or at the next call.
    """
    if "/" in name or name in ("", ".", ".."):
        raise ConfigError(f"{name!r} is no run's id: `llmtrain launch ssh status` names the newest")
    folder = Path(root) / name
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--exclude=.*", "--delay-updates", f"--partial-dir={PARTIAL}"]
    persistently(
        machine,
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
    """Run rsync in a local folder, `source` or `into`. Return the number of files that were copied."""
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
        told = messages.read()
    stderr = done.stderr.decode(errors="replace")
    if done.returncode in (0, VANISHED):
        found = re.search(rb"files transferred: ([\d,.]+)", done.stdout)
        return int(re.sub(rb"\D", b"", found[1])) if found else 0
    if reason := re.search(rf"^{REASON}(.*?)(?=^rsync|\Z)", stderr, re.MULTILINE | re.DOTALL):
        raise RunError(f"{machine}: {reason[1].strip()}")
    if done.returncode in BROKEN:
        raise connection_error(machine, told or stderr.partition("\n")[0])
    raise RunError(f"{machine}: {stderr.strip() or f'rsync ended with exit code {done.returncode}'}")


def _bracketed(destination: str) -> str:
    user, at, host = destination.rpartition("@")
    return f"{user}{at}[{host}]" if ":" in host else destination


def patterns_of(paths: Sequence[str]) -> list[str]:
    """Return patterns of rsync that mean these paths alone, of those that lie in this folder."""
    here = Path.cwd()
    inside = [full.relative_to(here) for path in paths if (full := here / Path(path).expanduser()).is_relative_to(here)]
    return ["/" + re.sub(r"([*?\[\\])", r"\\\1", str(path)) for path in inside if path.parts]
