"""The command that installs something is one that works in the environment that runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from llmtrain import installing
from llmtrain.installing import SOURCE, install, install_extra, install_requirements


def without_pip(monkeypatch: pytest.MonkeyPatch, *, uv: str | None) -> None:
    monkeypatch.setattr(installing, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: uv)


def test_pip_is_used_where_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "executable", "/opt/env/bin/python")
    assert install("-U", "torch") == "/opt/env/bin/python -m pip install -U torch"


def test_uv_is_used_in_an_environment_without_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/env/bin/python")
    without_pip(monkeypatch, uv="/usr/bin/uv")
    assert install("torch") == "/usr/bin/uv pip install --python /opt/env/bin/python torch"


def test_the_uv_that_make_fetched_is_found_and_paths_are_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".venv-uv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-uv" / "bin" / "uv").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    without_pip(monkeypatch, uv=None)
    assert install("torch") == ".venv-uv/bin/uv pip install --python .venv/bin/python torch"


def test_an_extra_is_installed_from_the_source_or_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert shlex.split(install_extra("mlflow"))[-2:] == ["-e", f"{SOURCE}[mlflow]"]
    assert Path(shlex.split(install_requirements())[-1]).is_file()
    monkeypatch.setattr(installing, "SOURCE", tmp_path)
    assert shlex.split(install_extra("mlflow"))[-1] == "llmtrain[mlflow]"


def test_no_message_names_another_way_to_install() -> None:
    messages = [*(SOURCE / "src" / "llmtrain").rglob("*.py")]
    own = {SOURCE / "src/llmtrain/installing.py", SOURCE / "src/llmtrain/config/loading/older_systems.py"}
    assert [str(file) for file in messages if file not in own and "pip install" in file.read_text()] == []
