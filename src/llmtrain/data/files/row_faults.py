"""Collect what is wrong with rows by `file:line`, so that one run of a command shows all of it."""

from __future__ import annotations

from typing import NamedTuple

from llmtrain.errors import ConfigError

MAX_SHOWN = 20
"""Faults that a message lists; the others are counted."""


class RowFault(NamedTuple):
    """One thing that is wrong with a row, or with a file."""

    source: str
    """`file:line`, or the file."""
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


class RowError(ValueError):
    """A row is wrong. Raised where that is found; the caller that knows the place adds it."""


class RowFaults:
    """The first faults, and how many there are."""

    def __init__(self, *, max_kept: int | None = 1000) -> None:
        """None keeps all."""
        self._max_kept = max_kept
        self.kept: list[RowFault] = []
        self.count = 0

    def add(self, fault: RowFault) -> None:
        """Count a fault, and keep it if there are not too many already."""
        self.count += 1
        if self._max_kept is None or len(self.kept) < self._max_kept:
            self.kept.append(fault)

    def lines(self, limit: int = MAX_SHOWN) -> list[str]:
        """Return the first `limit` faults, one a line, and how many more there are."""
        shown = [str(fault) for fault in self.kept[:limit]]
        more = self.count - len(shown)
        return [*shown, f"… and {more:,} more"] if more else shown

    def raise_if_any(self, advice: str = "") -> None:
        """Raise ConfigError with `lines` and the advice, if there is a fault."""
        if self.count:
            raise ConfigError("\n".join([*self.lines(), *([advice] if advice else [])]))


def kind_of(value: object) -> str:
    """Return words for the kind of a value, for a fault that says what stands in place of something else."""
    kinds = {list: "a list", dict: "an object", str: "text", bool: "true or false", type(None): "null"}
    other = "a number" if isinstance(value, int | float) else f"a value of type {type(value).__name__}"
    return kinds.get(type(value), other)
