"""The list of quality steps, built: what each is, and one pass of the steps that look at one document.

A text has a version before the first step, and one more after each step that may change it:

    steps      length   mask_pii   exact_duplicates   own   near_duplicates
    version    0      0          1                  1     2                 2
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.quality import ExactDuplicatesStep, QualityStep
from llmtrain.data.prepare.quality.c4 import C4
from llmtrain.data.prepare.quality.gopher import Gopher
from llmtrain.data.prepare.quality.language import Language
from llmtrain.data.prepare.quality.length import Length
from llmtrain.data.prepare.quality.near_duplicates import NUM_HASHES, NearDuplicates, Signatures
from llmtrain.data.prepare.quality.own import Own
from llmtrain.data.prepare.quality.pii import MaskPii
from llmtrain.data.prepare.quality.step import DocumentStep, Dropped, StepError

SAMPLE_CHARS = 1 << 18
"""Characters that are kept of a text in the sample."""


class ExactDuplicates:
    """Compares hashes of texts, which every document has anyway."""

    version: ClassVar[int] = 1

    def __init__(self, options: ExactDuplicatesStep, *, key: str) -> None:
        pass


Step = DocumentStep | ExactDuplicates | NearDuplicates


def key_of(position: int) -> str:
    """Return the key of a step in the config, for messages."""
    return f"prepare.steps[{position}]"


def looks_at_one(step: Step) -> TypeGuard[DocumentStep]:
    """Return whether a step looks at one document at a time."""
    return not isinstance(step, ExactDuplicates | NearDuplicates)


class Rule(NamedTuple):
    """A reason to leave a document out."""

    position: int
    """Index of its step in the list."""
    name: str


@dataclass(frozen=True)
class Examined:
    """Answers of the steps for some texts. Arrays have one entry for each text."""

    hashes: NDArray[np.uint64]
    """[versions, texts, 2]: the first 128 bits of the sha256 of each version of the text."""
    num_bytes: NDArray[np.int64]
    """[versions, texts]: UTF-8 bytes."""
    dropped_by: NDArray[np.uint16]
    """0, or one more than the index of the rule in `Plan.rules` by which a step dropped it."""
    errors: dict[int, str]
    """Texts that a step had no answer for. Their versions end there, as do those of dropped texts."""
    signatures: list[Signatures]
    """[texts, NUM_HASHES] for each near_duplicates step; zeros for texts that did not come so far."""
    sample: list[str]
    """Beginnings of the texts that were asked for."""

    def spread(self, rows: NDArray[np.int64], texts: Sequence[str]) -> Examined:
        """Return the same of more texts, of which those at `rows` were examined."""
        first_hashes, first_bytes = hash_texts(texts)
        hashes = np.repeat(first_hashes[None], len(self.hashes), axis=0)
        num_bytes = np.repeat(first_bytes[None], len(self.hashes), axis=0)
        hashes[:, rows], num_bytes[:, rows] = self.hashes, self.num_bytes
        dropped_by = np.zeros(len(texts), np.uint16)
        dropped_by[rows] = self.dropped_by
        errors = {int(rows[index]): error for index, error in self.errors.items()}
        signatures = [_placed(of_rows, rows, len(texts)) for of_rows in self.signatures]
        return Examined(hashes, num_bytes, dropped_by, errors, signatures, self.sample)


class Plan:
    """The steps of a list. The same list gives the same answers in every process."""

    def __init__(self, steps: Sequence[QualityStep]) -> None:
        """Raises ConfigError when a step's library or function cannot be had."""
        self.steps: list[Step] = [
            STEPS[options.name](options, key=key_of(position)) for position, options in enumerate(steps)
        ]

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """Every rule of every step, in the order of the list."""
        return tuple(
            Rule(position, name)
            for position, step in enumerate(self.steps)
            for name in (step.rules if looks_at_one(step) else ("duplicate",))
        )

    @cached_property
    def versions_before(self) -> tuple[int, ...]:
        """The version of the text that each step is given, and last the one that remains."""
        found = [0]
        for step in self.steps:
            found.append(found[-1] + (looks_at_one(step) and step.alters))
        return tuple(found)

    @property
    def num_versions(self) -> int:
        """Versions of a text."""
        return self.versions_before[-1] + 1

    @property
    def near_duplicates(self) -> dict[int, NearDuplicates]:
        """The steps that compare signatures, by their position."""
        return {at: step for at, step in enumerate(self.steps) if isinstance(step, NearDuplicates)}

    @property
    def is_heavy(self) -> bool:
        """Return whether a step takes so long, in Python, that processes pay."""
        return any(not isinstance(step, ExactDuplicates | Length) for step in self.steps)

    def alter(self, texts: Sequence[str], until: int | None = None) -> list[str]:
        """Return the texts as they are after the steps (before the step at `until`), of documents that those keep.

        Raises StepError when a function of the user's own gives no text where it gave one.
        """
        altered = []
        for text in texts:
            for step in self.steps[:until]:
                if looks_at_one(step) and step.alters:
                    made = step.apply(text)
                    if isinstance(made, Dropped):
                        raise StepError("a step dropped a document that it had kept")
                    text = made
            altered.append(text)
        return altered

    def examine(self, texts: Sequence[str], *, sample_share: float = 0.0) -> Examined:
        """Pass texts through the steps that look at one document; the others are `duplicates`.

        `sample_share`: of the texts that stay, those whose second 64 bits of the hash, as a fraction, are at most that.
        """
        first_hashes, first_bytes = hash_texts(texts)
        hashes = np.repeat(first_hashes[None], self.num_versions, axis=0)
        num_bytes = np.repeat(first_bytes[None], self.num_versions, axis=0)
        dropped_by = np.zeros(len(texts), np.uint16)
        arrived: dict[int, dict[int, str]] = {position: {} for position in self.near_duplicates}
        errors: dict[int, str] = {}
        sample = []
        index_of = {rule: index for index, rule in enumerate(self.rules)}
        for number, text in enumerate(texts):
            made: str | Dropped = text
            at = 0
            for position, step in enumerate(self.steps):
                assert isinstance(made, str)
                if not looks_at_one(step):
                    if position in arrived:
                        arrived[position][number] = made
                    continue
                before = made
                try:
                    made = step.apply(before)
                except StepError as error:
                    errors[number] = str(error)
                    break
                if step.alters and isinstance(made, str) and (not made or made.isspace()):
                    made = Dropped("empty")
                if isinstance(made, Dropped):
                    dropped_by[number] = 1 + index_of[Rule(position, made.rule)]
                    break
                at += step.alters
                if made is not before and made != before:
                    hashes[at:, number], num_bytes[at:, number] = (array[0] for array in hash_texts([made]))
            else:
                assert isinstance(made, str)
                if hashes[-1, number, 1] * 2.0**-64 <= sample_share:
                    sample.append(made[:SAMPLE_CHARS])
        signatures = [
            _placed(
                self.near_duplicates[position].signatures(list(found.values())),
                np.array([*found], np.int64),
                len(texts),
            )
            for position, found in arrived.items()
        ]
        return Examined(hashes, num_bytes, dropped_by, errors, signatures, sample)


STEPS: Mapping[str, type[Any]] = {
    "exact_duplicates": ExactDuplicates,
    "near_duplicates": NearDuplicates,
    "length": Length,
    "language": Language,
    "gopher": Gopher,
    "c4": C4,
    "mask_pii": MaskPii,
    "own": Own,
}
"""The steps by their name in the config. Each is made of its options and its `key` in the config, for messages."""


def hash_texts(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return [texts, 2], the first 128 bits of the sha256 of each text, and its bytes in UTF-8."""
    digests = bytearray()
    num_bytes = np.zeros(len(texts), np.int64)
    for index, text in enumerate(texts):
        data = text.encode()
        digests += hashlib.sha256(data).digest()[:16]
        num_bytes[index] = len(data)
    return np.frombuffer(bytes(digests), ">u8").astype(np.uint64).reshape(len(texts), 2), num_bytes


def _placed(signatures: Signatures, rows: NDArray[np.int64], count: int) -> Signatures:
    placed = np.zeros((count, NUM_HASHES), np.uint32)
    placed[rows] = signatures
    return placed
