"""The Python environment on a machine, made by uv or given as `remote.python`, and facts about the machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

from llmtrain.errors import ConfigError, RunError
from llmtrain.installing import SOURCE, install
from llmtrain.launching.ssh.connection import run_script
from llmtrain.launching.ssh.remote import Remote, RemoteMachine

log = logging.getLogger("llmtrain.ssh")

OWN_PYTHON = ".llmtrain/venv/bin/python"
OLDEST_PYTHON = ">=3.11"
TOOLS = ("rsync", "tmux")


def inspect_machine(machine: RemoteMachine, *, job: str) -> dict[str, Any]:
    """Return facts about the machine: `gpu` (a list of names), `free` (bytes on disk), `folder`, tools that it has.

    Also facts about the job: `state`, `name`, `session` and `exit` (its exit code).
    """
    found: dict[str, Any] = {"gpu": []}
    for line in run_script(machine, "look", job).stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition(" ")
        if name == "gpu":
            found["gpu"].append(value)
        else:
            found[name] = int(value) if name in ("free", "exit") and value.isdecimal() else value
    return found


def check_tools(machine: RemoteMachine, found: dict[str, Any]) -> None:
    """Raise RunError if a program that we need there is missing."""
    missing = [tool for tool in TOOLS if tool not in found]
    if missing:
        raise RunError(
            f"{machine} lacks {' and '.join(missing)}: install them there, apt-get install {' '.join(missing)}"
        )


def make_environment(machine: RemoteMachine, remote: Remote) -> None:
    """Install the packages there, unless `remote.python` names a Python that has them."""
    if remote.python is None:
        log.info("%s: installing packages; the first time takes minutes", machine)
        stdin = requirements(remote.extras).encode()
        run_script(machine, "environment", OLDEST_PYTHON, stdin=stdin, show=True)


def run_llmtrain(machine: RemoteMachine, remote: Remote, *words: str) -> Any:
    """Run `llmtrain *words --json` there, and return its document. Raises RunError if it prints none."""
    answer = run_script(machine, "program", remote.python or OWN_PYTHON, *words, "--json")
    try:
        return json.loads(answer.stdout)
    except ValueError:
        raise RunError(
            f"{machine}: llmtrain {words[0]} ended with exit code {answer.exit_code} and printed no JSON document"
        ) from None


def requirements(extras: Sequence[str]) -> str:
    """Return the packages to install: from requirements.lock of a checkout, else those that the package declares."""
    lock = Path(__file__).parents[4] / "requirements.lock"
    try:
        known = requires("llmtrain") or []
    except PackageNotFoundError:
        known = []
    if not known and (extras or not lock.is_file()):
        raise ConfigError(f"the packages that llmtrain needs are not known: {install('-e', str(SOURCE))}")
    lines = [lock.read_text(encoding="utf-8")] if lock.is_file() else [line for line in known if "extra ==" not in line]
    for extra in extras:
        found = [line for line in known if f"extra == '{extra}'" in line.replace('"', "'")]
        if not found:
            raise ConfigError(f"remote.extras: llmtrain has no extra {extra!r}")
        lines += [line.partition(";")[0].strip() for line in found]
    return "\n".join(lines) + "\n"
