from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain._version import __version__
from llmtrain.runs.metadata import GitState, code_git_state, git_state, new_run_id, run_metadata, slug

NOW = datetime(2026, 11, 20, 23, 15, 2, tzinfo=UTC)


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "a.txt").write_text("a")
    git(folder, "add", "a.txt")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_run_id_is_utc_time_commit_and_slug() -> None:
    elsewhere = NOW.astimezone(timezone(timedelta(hours=-8)))

    assert new_run_id("quickstart", now=NOW, git_sha="1a2b3c4d5e6f") == "20261120-231502-1a2b3c4-quickstart"
    assert new_run_id("My run: Ünï/../x", now=elsewhere, git_sha=None) == "20261120-231502-nogit-my-run-uni-x"
    with pytest.raises(ValueError, match="no time zone"):
        new_run_id("x", now=datetime(2026, 11, 20), git_sha=None)


@given(st.text())
def test_a_slug_is_a_safe_part_of_a_folders_name(name: str) -> None:
    made = slug(name)

    assert 1 <= len(made) <= 40
    assert set(made) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert not made.startswith("-")
    assert not made.endswith("-")
    assert slug(made) == made


def test_ids_sort_by_time() -> None:
    later = [new_run_id(name, now=NOW + timedelta(seconds=n), git_sha=None) for n, name in enumerate("zyxa")]

    assert sorted(later) == later


def test_git_tells_commit_and_changes_to_tracked_files(checkout: Path) -> None:
    sha = git(checkout, "rev-parse", "HEAD")
    (checkout / "untracked.txt").write_text("b")
    clean = git_state(checkout)
    (checkout / "a.txt").write_text("changed")

    assert clean == GitState(sha=sha, dirty=False)
    assert git_state(checkout) == GitState(sha=sha, dirty=True)


def test_without_a_checkout_a_commit_or_git_there_is_no_state(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    assert git_state(tmp_path / "empty") is None
    monkeypatch.setenv("GIT_DIR", str(checkout / ".git"))  # as a hook of another repository sets it
    assert git_state(tmp_path / "plain") is None
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) is None


def test_an_installed_package_in_somebodys_checkout_is_not_of_that_checkout(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = checkout / ".venv" / "llmtrain"
    (package / "runs").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr("llmtrain.runs.metadata.__file__", str(package / "runs" / "metadata.py"))

    assert code_git_state() is None
    git(checkout, "add", "-f", ".venv")
    assert code_git_state() == GitState(sha=git(checkout, "rev-parse", "HEAD"), dirty=True)


def test_meta_holds_no_secret_of_argv_or_environment(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 11
    environ = {
        "HF_TOKEN": token,
        "WANDB_API_KEY": "hush-1",
        "AWS_SECRET_ACCESS_KEY": "hush-2",
        "HOME": "/somewhere/hush-3",
        "OMP_NUM_THREADS": "2",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": f"host-{token}",
    }
    argv = [
        "llmtrain",
        "train",
        "quickstart",
        "--hub-token",
        "hush-4",
        "tracking.api_key=hush-5",
        f"run.notes={token}",
    ]
    meta = run_metadata(argv, now=NOW, environ=environ, working_folder=tmp_path)

    text = json.dumps(meta, allow_nan=False)
    assert "hush" not in text
    assert token not in text
    assert meta["argv"][:5] == ["llmtrain", "train", "quickstart", "--hub-token", "***"]
    assert meta["environment"] == {"OMP_NUM_THREADS": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "host-***"}


def test_meta_tells_code_machine_and_time(checkout: Path) -> None:
    meta = run_metadata(["llmtrain"], now=NOW, working_folder=checkout)

    assert meta["time"] == "2026-11-20T23:15:02+00:00"
    assert meta["working_folder"] == str(checkout)
    assert meta["git"]["working_folder"] == {"sha": git(checkout, "rev-parse", "HEAD"), "dirty": False}
    assert meta["versions"]["llmtrain"] == __version__
    assert meta["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert None not in {meta["versions"][name] for name in ("lightning-fabric", "transformers", "numpy", "python")}
    hardware = meta["hardware"]
    assert hardware["cores"] == os.cpu_count() >= hardware["usable_cores"] >= 1
    assert hardware["memory_bytes"] > 1e9
    assert len(hardware["gpus"]) == torch.cuda.device_count()
    assert hardware["cpu"] != ""
    assert meta["hostname"] != ""
