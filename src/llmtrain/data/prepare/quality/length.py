"""The step `length`: a range of characters (code points)."""

from __future__ import annotations

from typing import ClassVar

from llmtrain.config.sections.quality import LengthStep
from llmtrain.data.prepare.quality.step import Dropped


class Length:
    """Drops texts of fewer or more characters."""

    version: ClassVar[int] = 1
    rules = ("too_short", "too_long")
    alters = False

    def __init__(self, options: LengthStep, *, key: str) -> None:
        self._least = options.min_chars
        self._most = options.max_chars

    def apply(self, text: str) -> str | Dropped:
        """Return the text if its length is in the range."""
        if len(text) < self._least:
            return Dropped("too_short")
        return Dropped("too_long") if self._most is not None and len(text) > self._most else text
