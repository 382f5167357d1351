"""A crash loop is one that starts from the same checkpoint again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import WillFailAgain
from llmtrain.runs.attempts import count_restart, forget_restarts, refuse_crash_loop


def test_three_restarts_without_progress_are_enough(tmp_path: Path) -> None:
    first, second = tmp_path / "step_000010", tmp_path / "step_000020"
    told = [count_restart(tmp_path, checkpoint=start) for start in (None, None, first, first, first, second, second)]
    assert told == [None] * 7
    assert count_restart(tmp_path, checkpoint=second) is None
    message = count_restart(tmp_path, checkpoint=second)
    with pytest.raises(WillFailAgain, match="started 3 times from step_000020") as raised:
        refuse_crash_loop(message)
    assert raised.value.exit_code == 42
    forget_restarts(tmp_path)
    assert count_restart(tmp_path, checkpoint=second) is None
