"""The command that installs something into the environment that this program runs in, for messages.

The environment that `make` makes has no pip, and the package is on no index: an extra is installed from the source.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCE = Path(__file__).parents[2]


def install(*words: str) -> str:
    """Return the command that installs `words`, as pip takes them, into this environment: by pip, else by uv."""
    python = _shown(sys.executable)
    if find_spec("pip") is not None:
        command = [python, "-m", "pip", "install"]
    else:
        beside = Path(f"{sys.prefix}-uv/bin/uv")  # which the Makefile fetched
        uv = shutil.which("uv") or (str(beside) if beside.is_file() else None)
        command = [_shown(uv) if uv else "uv", "pip", "install", "--python", python]
    return shlex.join([*command, *words])


def install_extra(name: str) -> str:
    """Return the command that installs what an extra of pyproject.toml names."""
    from_source = (SOURCE / "pyproject.toml").is_file()
    return install("-e", f"{SOURCE}[{name}]") if from_source else install(f"llmtrain[{name}]")


def install_requirements() -> str:
    """Return the command that installs all that llmtrain needs."""
    return install("-r", str(SOURCE / "requirements.txt"))


def _shown(program: str) -> str:
    """Return a path as it is typed here: relative where it lies below the working folder."""
    here = os.getcwd()
    return os.path.relpath(program, here) if program.startswith(here + os.sep) else program
