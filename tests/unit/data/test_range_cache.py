"""A cache of ranges: bounded, checked, shared by processes and threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from llmtrain.data.range_cache import RangeCache


def entries(cache: RangeCache) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cache.folder / "entries").iterdir()}


def test_the_ranges_unused_for_longest_are_deleted_and_the_limit_holds(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=1000)
    for number in range(7):  # of 132 bytes with their hashes: seven fit
        cache.get(f"{number}", lambda: b"x" * 100)
        os.utime(tmp_path / "entries" / f"{number}", (number, number))
    cache.get("0", lambda: b"not asked")  # used last
    cache.get("7", lambda: b"7" * 100)
    assert sum(entries(cache).values()) <= 1000
    assert {"0", "7"} <= set(entries(cache))
    assert "1" not in entries(cache)
    for number in range(50):
        cache.get(f"n{number}", lambda: b"x" * 300)
        assert sum(entries(cache).values()) <= 1000


def test_a_range_larger_than_the_cache_is_returned_and_not_kept(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=100)
    assert cache.get("a", lambda: b"x" * 200) == b"x" * 200
    assert cache.get("a", lambda: b"y" * 200) == b"y" * 200
    assert RangeCache(tmp_path / "none", max_bytes=0).get("a", lambda: b"z") == b"z"
    assert not (tmp_path / "none").exists()


def test_the_count_is_made_again_where_it_is_lost(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=1000)
    for number in range(3):
        cache.get(f"{number}", lambda: b"x" * 100)
    (tmp_path / "total").write_text("")
    cache.get("3", lambda: b"x" * 100)
    assert (tmp_path / "total").read_text() == str(4 * 132)
    assert len(entries(cache)) == 4


def test_an_error_is_passed_on_and_nothing_is_kept(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, max_bytes=1000)

    def fail() -> bytes:
        raise KeyError("no")

    with pytest.raises(KeyError):
        cache.get("a", fail)
    assert cache.get("a", lambda: b"x") == b"x"


def test_a_folder_that_is_a_file_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    assert RangeCache(tmp_path / "x", max_bytes=1000).get("a", lambda: b"x") == b"x"


def fetch_all(folder: str, calls: str, barrier: object) -> None:
    cache = RangeCache(Path(folder), max_bytes=10**6)
    barrier.wait(60)  # type: ignore[attr-defined]
    for number in range(20):
        expected = bytes([number]) * 1000

        def fetch(number: int = number, expected: bytes = expected) -> bytes:
            with open(calls, "a") as file:
                file.write(f"{number}\n")
            return expected

        assert cache.get(f"range-{number}", fetch) == expected


def test_processes_and_threads_fetch_each_range_once_between_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    calls = tmp_path / "calls"
    arguments = (str(tmp_path / "cache"), str(calls), barrier)
    processes = [context.Process(target=fetch_all, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    thread = threading.Thread(target=fetch_all, args=arguments)
    thread.start()
    thread.join(60)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(calls.read_text().split(), key=int) == [str(number) for number in range(20)]
