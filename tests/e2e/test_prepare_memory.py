"""Memory of `prepare` stays flat: it does not grow with the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.prepare_memory import WANTED_GB, measure


@pytest.mark.nightly
def test_five_gigabytes_of_text_take_no_more_memory_in_the_end_than_in_the_beginning(tmp_path: Path) -> None:
    curve = measure(tmp_path, 5_000_000_000)
    assert curve.documents > 500_000
    assert curve.peak() < WANTED_GB
    assert curve.peak(0.9, 1.0) < curve.peak(0.5, 0.6) + 0.2  # while texts are encoded
