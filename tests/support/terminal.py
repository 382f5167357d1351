"""A terminal for tests: what is drawn there, and what a person would see of it. POSIX."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmtrain.tracking import terminal


class Terminal:
    """A pseudo-terminal, and the screen that a person would see there (scrolled lines included)."""

    def __init__(self, *, columns: int, rows: int) -> None:
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self._columns = columns
        self._received = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while data := os.read(self._master, 65536):
                self._received += data
        except OSError:
            return  # what Linux says when the other side is closed

    def close(self) -> None:
        """End it; its screen is complete afterwards."""
        self.file.close()
        self._reader.join(5)  # the end comes after all that was written
        os.close(self._master)

    @property
    def raw(self) -> str:
        """All that was written to it so far."""
        return self._received.decode(errors="replace")  # it may end inside of a character

    def screen(self) -> list[str]:
        """Carry out the few controls that are used: line feeds, returns, cursor up, erase line."""
        lines, row, column = [""], 0, 0
        for control, char in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|([^\x1b])", self.raw):
            if control.endswith("A"):
                row -= int(control[2:-1] or 1)
            elif control.endswith("K"):
                lines[row] = ""
            elif control:
                assert control[-1] in "mhl", f"the screen does not know {control!r}"
            elif char == "\r":
                column = 0
            elif char == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            else:
                if column == self._columns:
                    row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                lines[row] = (lines[row].ljust(column)[:column] + char + lines[row][column + 1 :]).rstrip("\n")
                column += 1
        return [line.rstrip() for line in lines if line.strip()]


@contextmanager
def terminal_as_stderr(*, columns: int = 100, rows: int = 40) -> Iterator[Terminal]:
    """A block at a terminal; its screen is complete afterwards."""
    tty, before = Terminal(columns=columns, rows=rows), sys.stderr
    # Rich asks the process's own streams for the size; those of a test are none.
    os.environ |= {"COLUMNS": str(columns), "LINES": str(rows)}
    terminal.forget_console()
    sys.stderr = tty.file
    try:
        yield tty
        assert sys.stderr is tty.file
    finally:
        sys.stderr = before
        del os.environ["COLUMNS"], os.environ["LINES"]
        tty.close()
