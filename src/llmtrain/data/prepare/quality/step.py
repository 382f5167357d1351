"""Protocol of a step that looks at one document: a text goes in, and the text, another one, or `Dropped` comes out."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol


class Dropped(NamedTuple):
    """The document is left out."""

    rule: str


class DocumentStep(Protocol):
    """A step of the list that looks at one document. The same text always gives the same answer."""

    version: ClassVar[int]
    """Raised when the same text gives another answer than before."""
    rules: tuple[str, ...]
    """Every rule that it may drop a document by."""
    alters: bool
    """True if it may return another text than it was given. If nothing but whitespace is left, the rule is `empty`."""

    def apply(self, text: str) -> str | Dropped:
        """Return the text that goes on, or the rule that the document is dropped by."""
        ...


class StepError(ValueError):
    """A step cannot answer for this text; the message says which step, and why."""
