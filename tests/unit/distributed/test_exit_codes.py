"""The workers' exit codes make one, and a worker that would fail again is not started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.distributed.exit_codes import (
    EXIT_FOLDER,
    exit_code_of,
    exit_codes_in,
    hopeless_exit_code,
    leave_exit_code,
)


@pytest.mark.parametrize(
    ("codes", "torchrun", "code"),
    [
        ([0, 0], 0, 0),
        ([75, 2], 1, 2),
        ([75, 42], 1, 42),
        ([76, 1], 1, 1),
        ([75, 76], 1, 76),
        ([0], 1, 75),  # the other worker was killed
        ([], -9, 75),
        ([], 1, 1),
    ],
)
def test_a_run_exits_with_its_workers_strongest_code(codes: list[int], torchrun: int, code: int) -> None:
    assert exit_code_of(codes, num_workers=2, torchrun=torchrun) == code


def test_a_restarted_worker_deletes_its_code_unless_one_would_fail_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_FOLDER, str(tmp_path))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    leave_exit_code(75)
    assert exit_codes_in(tmp_path) == [75]
    assert hopeless_exit_code() is None
    assert exit_codes_in(tmp_path) == []
    leave_exit_code(42)
    assert hopeless_exit_code() == 42
    assert exit_codes_in(tmp_path) == [42]


def test_without_a_launcher_no_exit_code_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EXIT_FOLDER, raising=False)
    leave_exit_code(75)
    assert hopeless_exit_code() is None
