"""Stop signals: noted everywhere, raised where nothing can be lost."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator

import pytest

from llmtrain.distributed.stop_signals import STOP_SIGNALS
from llmtrain.training.signals import StopRequested, StopSignal


@pytest.fixture(autouse=True)
def _as_at_a_terminal() -> Iterator[None]:
    """Tests may run under nohup, where SIGHUP is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_outside_an_interruptible_block_is_only_noted(number: signal.Signals) -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.received == number


def test_a_signal_inside_an_interruptible_block_ends_a_long_wait_at_once() -> None:
    with StopSignal() as stop:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        began = time.monotonic()
        with pytest.raises(StopRequested), stop.interrupts():
            time.sleep(30)
        assert time.monotonic() - began < 5


def test_a_signal_that_came_before_is_raised_on_entering() -> None:
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        entered = False
        with pytest.raises(StopRequested), stop.interrupts():
            entered = True
        assert not entered


def test_what_unwinds_is_not_interrupted_again() -> None:
    with StopSignal() as stop:
        cleaned_up: list[bool] = []

        def wait() -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                cleaned_up.append(True)

        with pytest.raises(StopRequested), stop.interrupts():
            wait()
        assert cleaned_up == [True]


def test_a_second_ctrl_c_does_not_wait() -> None:
    with StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_torch_does_not_warn_of_the_pass_that_a_signal_ends() -> None:
    def compile_backward() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            warnings.warn("Error detected in PermuteBackward0. Traceback of forward call", stacklevel=1)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with StopSignal() as stop, pytest.raises(StopRequested), stop.interrupts():
            compile_backward()
        warnings.warn("of the program around it", stacklevel=1)
    assert [str(warning.message) for warning in told] == ["of the program around it"]


def test_sighup_stays_ignored_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested


def test_in_another_thread_signals_are_left_to_the_program_around_it() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    inside: list[object] = []

    def train() -> None:
        with StopSignal() as stop, stop.interrupts():
            inside.extend(signal.getsignal(number) for number in STOP_SIGNALS)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert inside == before


def test_stop_requested_is_not_eaten_by_except_exception() -> None:
    assert not issubclass(StopRequested, Exception)
