"""The bad files and rows of a corpus: the first one ends the preparation, or all are counted and some are named."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from llmtrain.data.prepare.documents import CorpusDocument
from llmtrain.errors import ConfigError

logger = logging.getLogger("llmtrain.prepare")

_NAMED_ERRORS = 20
"""Bad files and rows that are named one by one; all are counted."""


class ErrorLog:
    """Collects what is wrong, in reading order."""

    def __init__(self, on_error: str) -> None:
        self.named: list[str] = []
        self._on_error = on_error
        self._count = 0

    def add_unit(
        self, documents: Mapping[int, CorpusDocument], errors: Mapping[int, str], *, lines_before: int, first_row: int
    ) -> None:
        """Add the documents of a unit, by index, that could not be read, or that (`errors`) a quality step failed on.

        `lines_before`: lines of the file before the unit; `first_row`: rows, of JSONL lines. Raises ConfigError when
        `on_error` is fail.
        """
        for index, document in documents.items():
            where = document.file.dataset or document.file.path
            if document.error is not None:
                line = "" if document.line is None else f":{lines_before + document.line}"
                self._add(f"{where}{line}: {document.error}")
            elif index in errors:
                row = first_row + document.row
                place = "" if document.file.format == "text" else f":{row + 1}"
                self._add(f"{where}{place}: {errors[index]}")

    def close(self) -> None:
        """Say how many more there were than are named."""
        if self._count > len(self.named):
            logger.warning("left out: %d more bad files and rows", self._count - len(self.named))

    def _add(self, error: str) -> None:
        if self._on_error == "fail":
            raise ConfigError(f"{error}; repair it, or leave such ones out with prepare.on_error: skip")
        self._count += 1
        if self._count <= _NAMED_ERRORS:
            self.named.append(error)
            logger.warning("left out: %s", error)
