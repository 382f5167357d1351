"""Fault injection: named points in the program at which a test lets the process die, fail, wait or be told to stop.

    LLMTRAIN_FAULTS="kill@after-rename:2, sleep@model-written:0.5"

Each wish is ACTION@POINT, followed by options behind colons:

    kill            SIGKILL to this process: nothing is flushed, no handler runs
    int             SIGINT to this process, as Ctrl-C sends it
    hup             SIGHUP to this process, as a terminal sends it that is closed
    term            SIGTERM to this process, as a scheduler sends it before it takes the machine away
    raise           raises FaultInjected; with the name of an errno (`raise@temp-made:EROFS`) that OSError instead
    stop            SIGSTOP to this process: it stands still, its connections stay open
    cut             from here on this process hears nothing and says nothing on its TCP connections, which stay open, as
                    if a cable were pulled (Linux)
    nan             the number that the caller is about to use is no number (`reach` returns True)
    sleep           waits as many seconds as its first option says (`sleep@before-latest:0.5`)
    wait            waits until the file or folder exists that its first option names, without colons and commas in it:
                    `wait@step:runs/a/checkpoints/step_000008:step=9, kill@step:step=9` kills once that save is done
    a whole number  only the so-manieth time that the point is reached (after the own option of `sleep` and `wait`)
    NAME=VALUE      only where the caller of `reach` gave that detail (`kill@after-rename:step=500`); `rank` and
                    `restart` (how often torchrun started the processes again) are there at every point

Without a number a wish comes true each time. The points of a checkpoint's save are listed in docs/checkpoints.md. This
module imports nothing else of llmtrain, so anything may call it; unless the variable is set a call costs a microsecond.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

VARIABLE = "LLMTRAIN_FAULTS"
_ACTIONS = ("cut", "hup", "int", "kill", "nan", "raise", "sleep", "stop", "term", "wait")
_SIGNALS = {
    "hup": signal.SIGHUP,
    "int": signal.SIGINT,
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
}
_times_met: Counter[tuple[str, int]] = Counter()


class FaultInjected(RuntimeError):
    """Raised by the action `raise` when no errno is named."""


@dataclass(frozen=True)
class _Fault:
    action: str
    point: str
    nth: int | None = None
    seconds: float = 0.0
    path: Path | None = None
    errno_name: str | None = None
    details: dict[str, str] = field(default_factory=dict)


def reach(point: str, **context: object) -> bool:
    """Say that the program is at `point`. Does nothing unless LLMTRAIN_FAULTS wishes for something here.

    `context` holds details that a wish can ask for, such as the step. True: `nan` was wished for, which only callers
    that have a number can grant. Raises ValueError for a wish that cannot be read.
    """
    wishes = os.environ.get(VARIABLE)
    if not wishes:
        return False
    spoiled = False
    context = {**_process(), **context}
    for index, fault in enumerate(_parse(wishes)):
        if fault.point != point or any(str(context.get(name)) != value for name, value in fault.details.items()):
            continue
        _times_met[wishes, index] += 1
        if fault.nth is None or fault.nth == _times_met[wishes, index]:
            _come_true(fault)
            spoiled |= fault.action == "nan"
    return spoiled


def _process() -> dict[str, object]:
    return {"rank": os.environ.get("RANK", "0"), "restart": os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")}


def forget() -> None:
    """Count from zero again how often each point was reached."""
    _times_met.clear()


def _come_true(fault: _Fault) -> None:
    if fault.action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[fault.action])
    elif fault.action == "sleep":
        time.sleep(fault.seconds)
    elif fault.path is not None:
        while not fault.path.exists():
            time.sleep(0.01)
    elif fault.action == "cut":
        _cut_connections()
    elif fault.action == "nan":
        return
    elif fault.errno_name is not None:
        number = getattr(errno, fault.errno_name)
        raise OSError(number, os.strerror(number))
    else:
        raise FaultInjected(f"fault injected at {fault.point}")


def _cut_connections() -> None:
    """Put a silent socket in the place of each TCP connection, which itself stays open, so that no peer is told."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        try:
            connection = socket.socket(fileno=os.dup(descriptor))
        except OSError:
            continue
        if connection.family not in (socket.AF_INET, socket.AF_INET6):
            connection.close()
            continue
        connection.detach()  # this descriptor keeps the connection open, and nobody reads it
        silent, other_end = socket.socketpair()
        silent.setblocking(False)
        os.dup2(silent.fileno(), descriptor)
        other_end.detach()
        silent.close()


@lru_cache(maxsize=16)
def _parse(wishes: str) -> tuple[_Fault, ...]:
    return tuple(_parse_one(wish.strip()) for wish in wishes.split(",") if wish.strip())


def _parse_one(wish: str) -> _Fault:
    head, *options = wish.split(":")
    action, at, point = head.partition("@")
    if action not in _ACTIONS or not at or not point:
        raise ValueError(f"{VARIABLE}: {wish!r} is not ACTION@POINT with an action of {', '.join(_ACTIONS)}")
    seconds = 0.0
    if action == "sleep":
        try:
            seconds = float(options.pop(0))
        except (IndexError, ValueError):
            raise ValueError(f"{VARIABLE}: {wish!r} does not say how many seconds, as in sleep@{point}:0.5") from None
    path: Path | None = None
    if action == "wait":
        if not options or not options[0]:
            raise ValueError(f"{VARIABLE}: {wish!r} does not say what to wait for, as in wait@{point}:PATH")
        path = Path(options.pop(0))
    nth: int | None = None
    errno_name: str | None = None
    details: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if equals:
            details[name] = value
        elif option.isdigit():
            nth = int(option)
        elif action == "raise" and option in errno.errorcode.values():
            errno_name = option
        else:
            raise ValueError(f"{VARIABLE}: {option!r} in {wish!r} is no number, no NAME=VALUE and no errno of raise")
    return _Fault(action, point, nth=nth, seconds=seconds, path=path, errno_name=errno_name, details=details)
