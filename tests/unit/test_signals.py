"""Stop signals: noted everywhere, raised where nothing can be lost."""

import os
import signal
import threading
import time

import pytest

from llmtrain.training.signals import STOP_SIGNALS, StopRequested, StopSignal


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


def test_stop_requested_is_not_eaten_by_except_exception() -> None:
    assert not issubclass(StopRequested, Exception)
