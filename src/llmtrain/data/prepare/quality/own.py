"""The step `own`: a function of the user's own, named by import path."""

from __future__ import annotations

from typing import ClassVar

from llmtrain.config.sections.quality import OwnStep
from llmtrain.data.prepare.quality.step import Dropped, StepError
from llmtrain.import_path import code_sha256, import_callable, what_failed


class Own:
    """Calls the function with each text; it returns the text that goes on, or None to drop the document.

    `StepError` says where the function failed, by file:line.
    """

    version: ClassVar[int] = 1
    rules = ("own", "empty")
    alters = True

    def __init__(self, options: OwnStep, *, key: str) -> None:
        """Raises ConfigError, with the config's `key`, when the function cannot be imported."""
        self._name = options.function
        self._key = key
        self._function = import_callable(options.function, key=f"{key}.function")
        self.source_sha256 = code_sha256(options.function)
        """Hash of the code of the function, as `code_sha256` says."""

    def apply(self, text: str) -> str | Dropped:
        """Return what the function makes of the text."""
        try:
            made = self._function(text)
        except Exception as error:
            raise StepError(f"{self._key}: {self._name} failed ({what_failed(error)})") from error
        if made is None:
            return Dropped("own")
        if not isinstance(made, str):
            raise StepError(f"{self._key}: {self._name} returned {type(made).__name__}, not text or None")
        try:
            made.encode()
        except UnicodeEncodeError:
            raise StepError(f"{self._key}: {self._name} returned half of a surrogate pair, no valid Unicode") from None
        return made
