"""The packages for another machine: the exact versions of the lock file, and the extras that are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.ssh.environment import check_tools, requirements
from llmtrain.launching.ssh.remote import remote_of

LOCK = (Path(__file__).parents[4] / "requirements.lock").read_text()


def test_requirements_are_those_of_the_lock_file_and_of_the_extras() -> None:
    assert requirements([]) == LOCK + "\n"
    assert requirements(["mlflow"]).removeprefix(LOCK).strip().startswith("mlflow>=")


def test_an_unknown_extra_is_rejected() -> None:
    with pytest.raises(ConfigError, match="no extra 'mflow'"):
        requirements(["mflow"])


def test_missing_tools_are_named() -> None:
    machine = remote_of(None, {"host": ["a"], "dir": "~/x"}).first
    check_tools(machine, {"rsync": "yes", "tmux": "yes"})
    with pytest.raises(RunError, match=r"a lacks rsync and tmux: .* apt-get install rsync tmux"):
        check_tools(machine, {})
