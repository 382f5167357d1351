"""The watchdog of several ranks: who notices, what is written, with which exit code the process would end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtrain.distributed import watchdog
from llmtrain.distributed.watchdog import Watchdog

LONG = 600.0


class Ending:
    """Takes the place of os._exit."""

    def __init__(self) -> None:
        self.code: int | None = None
        self.came = threading.Event()

    def __call__(self, code: int) -> None:
        if not self.came.is_set():
            self.code = code
            self.came.set()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "OTHERS_SEC", 0.1)


def make(rank: int, timeout_sec: float) -> tuple[Watchdog, Ending]:
    ending = Ending()
    return Watchdog(rank=rank, world_size=3, timeout_sec=timeout_sec, end=ending), ending


def test_a_rank_without_progress_writes_its_stacks_and_ends_with_76(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dog, ending = make(1, 0.2)
    with dog.over(tmp_path):
        dog.beat("step")
        dog.beat("step")
        assert ending.came.wait(30)
    assert ending.code == 76
    text = (tmp_path / "stacks_rank_1.txt").read_text()
    assert text.startswith("--- hang: no progress for ")
    assert "in test_a_rank_without_progress" in text, "where the main thread stood"
    assert "rank 0, 2 wrote none in 0 s: stopped, killed or cut off" in capfd.readouterr().err


def test_the_first_time_of_each_stage_has_three_times_the_timeout(tmp_path: Path) -> None:
    dog, ending = make(0, 0.4)
    with dog.over(tmp_path):
        began = time.monotonic()
        dog.beat("step")
        assert ending.came.wait(30)
    assert time.monotonic() - began >= 1.2


@pytest.mark.parametrize(("why", "code"), [("hang: no progress", 76), ("a process is gone: reset by peer", 75)])
def test_a_waiting_rank_ends_as_soon_as_another_has_written_its_stacks(tmp_path: Path, why: str, code: int) -> None:
    (tmp_path / "stacks_rank_2.txt").write_text("--- hang: of an earlier start\n")
    dog, ending = make(0, LONG)
    with dog.over(tmp_path):
        assert not ending.came.wait(0.1)
        with (tmp_path / "stacks_rank_2.txt").open("a") as file:
            file.write(f"--- {why}\n")
        assert ending.came.wait(30)
    assert ending.code == code
    assert "rank 2 noticed" in (tmp_path / "stacks_rank_0.txt").read_text()


def test_a_rank_that_makes_progress_is_not_ended_and_writes_no_file(tmp_path: Path) -> None:
    dog, ending = make(0, 2.0)
    with dog.over(tmp_path):
        for _ in range(30):
            dog.beat("step")
            time.sleep(0.1)
    assert not ending.came.is_set()
    assert not (tmp_path / "stacks_rank_0.txt").exists()


def test_a_lost_peer_is_recorded_with_the_place_where_it_was_noticed(tmp_path: Path) -> None:
    dog, _ = make(0, LONG)

    def collective() -> None:
        raise RuntimeError("Connection reset by peer")

    noticed: list[Callable[[], None]] = [collective]
    with dog.over(tmp_path):
        pass
    try:
        noticed[0]()
    except RuntimeError as error:
        dog.peer_lost(error)
    text = (tmp_path / "stacks_rank_0.txt").read_text()
    assert text.startswith("--- a process is gone: Connection reset by peer")
    assert "in collective" in text


def test_one_process_alone_is_not_watched(tmp_path: Path) -> None:
    ending = Ending()
    dog = Watchdog(rank=0, world_size=1, timeout_sec=0.01, end=ending)
    with dog.over(tmp_path / "logs"):
        time.sleep(0.1)
    assert not ending.came.is_set()
    assert not (tmp_path / "logs").exists()
