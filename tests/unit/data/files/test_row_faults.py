"""Faults of rows are collected, listed up to a limit, and counted."""

from __future__ import annotations

import pytest

from llmtrain.data.files.row_faults import RowFault, RowFaults
from llmtrain.errors import ConfigError


def test_faults_are_listed_up_to_a_limit_and_the_rest_counted() -> None:
    faults = RowFaults(max_kept=30)
    for line in range(1, 41):
        faults.add(RowFault(f"a:{line}", "bad"))
    with pytest.raises(ConfigError) as raised:
        faults.raise_if_any("Do better.")
    lines = str(raised.value).splitlines()
    assert (lines[0], lines[19], lines[20], lines[21]) == ("a:1: bad", "a:20: bad", "… and 20 more", "Do better.")
