"""What the disks of runs and of the cache can do, and what is in the way of training there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtrain.distributed.diagnosis import Finding
from llmtrain.training.disk import disk_findings, look_at_folder
from tests.support.machines import GOOD_DISKS, RUNS


def only(**different: Any) -> Finding:
    (finding,) = disk_findings(replace(GOOD_DISKS, runs=replace(RUNS, **different)))
    assert finding.fix
    return finding


@pytest.mark.parametrize(("free_bytes", "severity"), [(3 * 10**9, "warning"), (10**8, "fatal")])
def test_low_disk(free_bytes: int, severity: str) -> None:
    found = only(free_bytes=free_bytes)
    assert found.severity == severity
    assert found.what.endswith("GB free at /data/runs")


def test_a_folder_that_cannot_be_written_makes_training_impossible() -> None:
    found = only(writable=False)
    assert (found.severity, found.what) == ("fatal", "/data/runs cannot be written")


def test_a_file_system_without_links_is_no_hindrance() -> None:
    found = only(lacks=["links", "fsync of folders"])
    assert (found.severity, "lacks links, fsync of folders" in found.what) == ("warning", True)


def test_a_full_cache_is_a_warning_with_the_variable_that_moves_it() -> None:
    (found,) = disk_findings(replace(GOOD_DISKS, cache_free_bytes=10**9))
    assert (found.severity, found.what) == ("warning", "1.0 GB free at /home/user/.cache/huggingface")
    assert "HF_HOME" in found.fix


def test_looking_at_the_runs_leaves_nothing_behind(tmp_path: Path) -> None:
    found = look_at_folder(tmp_path / "not" / "yet")
    assert (found.writable, found.lacks) == (True, [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_sync_folders_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.fsync", fail)
    assert look_at_folder(tmp_path).lacks == ["fsync of folders"]
