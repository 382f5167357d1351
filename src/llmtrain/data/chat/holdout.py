"""Choosing the rows that validate, by hash; and finding their prompts among the training rows.

The hash is the prompt's, not the row's: rows with the same question fall on the same side, so that a model is never
validated on a question that it was trained on.
"""

from __future__ import annotations

import hashlib

from llmtrain.data.chat.shapes import Chat, Example, PromptCompletion

_MAX_KEPT = 1000


def prompt_of(example: Example) -> str:
    """Return what the model is asked, with blanks made equal: the same for rows that ask the same in other shapes.

    Of a conversation these are all turns before the first that is learned; of a row of text, all of it.
    """
    if isinstance(example, PromptCompletion):
        return " ".join(example.prompt.split())
    if isinstance(example, Chat):
        turns = example.messages[: min(example.supervised)]
        texts = [" ".join(turn["content"].split()) for turn in turns]
        if [turn["role"] for turn in turns] == ["user"]:
            return texts[0]
        return "\n".join(f"{turn['role']}: {text}" for turn, text in zip(turns, texts, strict=True))
    return " ".join(example.text.split())


def is_held_out(example: Example, fraction: float) -> bool:
    """Return whether the row is in the `fraction` that validates. A larger fraction holds out the same and more."""
    return int.from_bytes(_hash(example)[:8]) < fraction * 2**64


def is_kept(example: Example, fraction: float) -> bool:
    """Return whether the row stays for training when a `fraction` is held out."""
    return not is_held_out(example, fraction)


def prompt_hash(example: Example) -> bytes | None:
    """Return what is compared in place of the prompt; None for a row of text."""
    return _hash(example) if isinstance(example, Chat | PromptCompletion) else None


class ValidationPrompts:
    """The prompts of the validation rows, to be looked for among the training rows."""

    def __init__(self) -> None:
        self._sources: dict[bytes, str] = {}
        self._met: set[bytes] = set()
        self.pairs: list[tuple[str, str]] = []
        """Source of a validation row, and of the first training row with its prompt; the first thousand."""

    @property
    def num_met(self) -> int:
        """Prompts that were found among the training rows."""
        return len(self._met)

    def add(self, prompt: bytes | None, source: str) -> None:
        """Take in a validation row, by its `prompt_hash`."""
        if prompt is not None:
            self._sources.setdefault(prompt, source)

    def look_for(self, prompt: bytes | None, source: str) -> None:
        """Note whether a training row has one of the prompts."""
        if prompt in self._sources and prompt not in self._met:
            self._met.add(prompt)
            if len(self.pairs) < _MAX_KEPT:
                self.pairs.append((self._sources[prompt], source))

    def warning(self, *, max_named: int = 5) -> str | None:
        """Return one message that names rows, or None where no prompt is on both sides."""
        if not self._met:
            return None
        named = ", ".join(f"{validation} = {training}" for validation, training in self.pairs[:max_named])
        more = f" and {self.num_met - max_named:,} more" if self.num_met > max_named else ""
        return (
            f"{self.num_met:,} of {len(self._sources):,} validation prompts stand word for word in the training rows, "
            f"so the validation loss says less than it seems: {named}{more}"
        )


def _hash(example: Example) -> bytes:
    return hashlib.blake2b(prompt_of(example).encode(), digest_size=16).digest()
