"""Reading ahead, in a thread and in processes: order, failures, signals, and that nothing is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from types import FrameType

import numpy as np
import pytest
import torch

from llmtrain.config.sections.data import SyntheticConfig
from llmtrain.data.loader import read_ahead
from llmtrain.data.tokens import open_training_data
from llmtrain.errors import RunError

# What `read_ahead` calls in its worker has to be importable there, so these are functions of the standard library.
SQUARES = partial(partial, pow, 2)
"""Step s gives 2 to the power of s."""
SLEEPS = partial(partial, time.sleep)
"""Step s takes s seconds."""


def read_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "llmtrain-data"]


def data_processes() -> list[multiprocessing.process.BaseProcess]:
    return [process for process in multiprocessing.active_children() if process.name == "llmtrain-data"]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("num_steps", [0, 1, 3, 20])
def test_results_come_in_the_order_of_the_steps(num_workers: int, num_steps: int) -> None:
    assert list(read_ahead(SQUARES, num_steps=num_steps, num_workers=num_workers)) == [2**n for n in range(num_steps)]
    assert read_threads() == []
    assert data_processes() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_closing_early_is_quick_and_leaves_nothing(num_workers: int) -> None:
    results = read_ahead(SQUARES, num_steps=10**9, num_workers=num_workers)
    assert [next(results) for _ in range(3)] == [1, 2, 4]
    assert (len(read_threads()), len(data_processes())) == ((1, 0), (0, 2))[num_workers // 2]
    begin = time.perf_counter()
    results.close()
    assert time.perf_counter() - begin < 20, "a billion steps would take longer"
    assert read_threads() == []
    assert data_processes() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_generator_that_is_forgotten_stops_its_workers(num_workers: int) -> None:
    results = read_ahead(SQUARES, num_steps=10**9, num_workers=num_workers)
    next(results)
    del results
    gc.collect()
    assert read_threads() == []
    assert data_processes() == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_workers_failure_is_raised_with_its_traceback(num_workers: int) -> None:
    results = read_ahead(partial(partial, divmod, 1), num_steps=5, num_workers=num_workers)
    with pytest.raises(RuntimeError, match=r"(?s)reading the data failed:.*Traceback.*ZeroDivisionError"):
        next(results)
    assert read_threads() == []
    assert data_processes() == []


class Interrupted(BaseException):
    pass


@contextmanager
def interruption(after_sec: float) -> Iterator[None]:
    """Raises Interrupted from a signal handler in the main thread, as the handlers of a run do."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, after_sec)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exception_from_a_signal_handler_ends_the_wait_without_a_hang(num_workers: int) -> None:
    begin = time.perf_counter()
    # Step 1 takes a second, so the exception comes during the wait for it.
    with interruption(0.8), pytest.raises(Interrupted):
        list(read_ahead(SLEEPS, num_steps=2, num_workers=num_workers))
    assert time.perf_counter() - begin < 20, "without end otherwise"
    assert read_threads() == []
    assert data_processes() == []


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.data.loader.CLOSE_SEC", 0.2)
    results = read_ahead(SLEEPS, num_steps=60, num_workers=1)
    next(results)
    next(results)  # the worker sleeps for two seconds now
    (worker,) = data_processes()
    results.close()
    assert worker.exitcode == -signal.SIGKILL
    assert data_processes() == []


def test_workers_go_on_through_the_signals_that_the_parent_answers() -> None:
    with closing(read_ahead(SQUARES, num_steps=30, num_workers=2)) as results:
        first = next(results)
        for process in data_processes():
            assert process.pid is not None
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                os.kill(process.pid, number)
        assert [first, *results] == [2**n for n in range(30)]


BIRTH = """
import multiprocessing, os, signal, threading
from functools import partial
from llmtrain.data.loader import read_ahead

def kill_at_birth():
    while not (children := multiprocessing.active_children()):
        pass
    os.kill(children[0].pid, signal.SIGTERM)

if __name__ == "__main__":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    killer = threading.Thread(target=kill_at_birth)
    killer.start()
    results = read_ahead(partial(partial, pow, 2), num_steps=10, num_workers=1)
    first = next(results)
    killer.join()
    print([first, *results] == [2**n for n in range(10)], signal.pthread_sigmask(signal.SIG_BLOCK, []) == before)
"""


def test_signals_are_blocked_in_a_worker_from_its_first_moment_and_not_in_the_parent() -> None:
    done = subprocess.run([sys.executable, "-c", BIRTH], capture_output=True, text=True, timeout=20, check=False)
    assert (done.stdout, done.stderr) == ("True True\n", "")


def test_a_workers_death_is_reported_at_once() -> None:
    results = read_ahead(SQUARES, num_steps=10**6, num_workers=2)
    next(results)
    victim = data_processes()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    begin = time.perf_counter()
    with pytest.raises(RunError, match=rf"data worker \(process {victim.pid}\) died with exit code -9"):
        for _ in results:
            pass
    assert time.perf_counter() - begin < 20, "without end otherwise"
    assert data_processes() == []


SCRIPT = """
import os, signal, sys
from functools import partial
from llmtrain.data.loader import read_ahead

if __name__ == "__main__":
    results = read_ahead(partial(partial, pow, 2), num_steps=10**6, num_workers={num_workers})
    print(next(results), next(results), flush=True)
    {ending}
"""


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("ending", "exit_code"),
    [("os.kill(os.getpid(), signal.SIGKILL)", -9), ("pass", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)],
)
def test_workers_end_with_their_parent_however_it_ends(num_workers: int, ending: str, exit_code: int) -> None:
    script = SCRIPT.format(num_workers=num_workers, ending=ending)
    # Workers inherit the pipe: it ends when the last of them has.
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=20,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("1 2\n", exit_code)


def test_what_a_worker_imports_holds_no_torch() -> None:
    modules = "llmtrain.data.loader, llmtrain.data.windows, llmtrain.data.shards, llmtrain.data.synthetic"
    heavy = "{'torch', 'pydantic', 'transformers', 'lightning_fabric'}"
    command = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_draws_nothing_from_the_global_generators(num_workers: int) -> None:
    config = SyntheticConfig(seq_len=8, num_items=20, num_workers=num_workers)
    torch_state, numpy_state, python_state = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    with closing(
        open_training_data(config, seed=1).batches(start_item=3, batch_size=4, end_item=40, micro_batch_size=2)
    ) as batches:
        next(batches)
        next(batches)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == str(numpy_state)
    assert random.getstate() == python_state
