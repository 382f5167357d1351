"""Data of the user's own, by import path: sequences of tokens (`contracts.TokenSequences`) as windows of a source.

    data.name, options ─▶ open_own ─▶ OwnWindows, around the user's object ─▶ windows.py

Another process that reads is sent the windows without the object, and makes its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmtrain.contracts import TokenSequences
from llmtrain.data.batches import DataFacts
from llmtrain.data.order import Ints, WindowOrder
from llmtrain.errors import ConfigError
from llmtrain.import_path import import_callable, what_failed
from llmtrain.screen import counted

KEY = "data.name"


@dataclass(frozen=True, kw_only=True)
class OwnWindows:
    """The sequences of the user's object, each a window."""

    name: str
    """Import path of the class."""
    options: str
    """Its keyword arguments, as JSON."""
    split: Literal["train", "val"]
    seq_len: int
    num_windows: int
    vocab_size: int
    sequences: TokenSequences | None = field(repr=False, compare=False)
    """The object; None in a process that has not made it yet."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "sequences": None}

    def open(self, order: WindowOrder | None, *, world_size: int = 1) -> OwnWindows:
        """Return windows that can be read in this process."""
        if self.sequences is not None:
            return self
        made = _make(self.name, json.loads(self.options), split=self.split, seq_len=self.seq_len)
        return replace(self, sequences=made)

    @property
    def fetches(self) -> bool:
        """Return False: how the user's object reads is its own affair."""
        return False

    def expect(self, windows: Ints) -> bool:
        """Return True: there is nothing to hold."""
        return True

    def read(self, windows: Ints, out: Ints) -> Ints:
        """Fill the first tokens of each row of `out` [n, seq_len + 1]; return their numbers. Raises ConfigError."""
        return np.array([self._read(*pair) for pair in zip(windows.tolist(), out, strict=True)], np.int64)

    def _read(self, index: int, row: Ints) -> int:
        assert self.sequences is not None
        try:
            tokens = np.asarray(self.sequences[index])
        except Exception as error:
            raise ConfigError(f"{self._described(index)} cannot be read ({what_failed(error)})") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not 2 <= len(tokens) <= len(row):
            raise ConfigError(
                f"{self._described(index)} should be 2 to {len(row)} integers (data.seq_len + 1), but it has the shape "
                f"{list(tokens.shape)} and the type {tokens.dtype}"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            outside = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            raise ConfigError(f"{self._described(index)} has the token {outside}, but vocab_size is {self.vocab_size}")
        row[: len(tokens)] = tokens
        return len(tokens)

    def _described(self, index: int) -> str:
        return f"{KEY}: sequence {index} of {self.name} (split {self.split})"


def open_own(
    name: str, options: Mapping[str, Any], *, split: Literal["train", "val"], seq_len: int
) -> tuple[DataFacts, OwnWindows, str]:
    """Return what is known of a split, its windows, and the hash of its content.

    Raises ConfigError for a class that cannot be had, or does not meet the contract.
    """
    sequences = _make(name, options, split=split, seq_len=seq_len)
    try:
        num_windows, vocab_size = len(sequences), int(sequences.vocab_size)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{KEY}: {name} has no vocab_size or no length ({what_failed(error)})") from error
    from llmtrain.data.tokenizers import load_tokenizer  # here: processes that read ahead need no tokenizer

    folder = getattr(sequences, "tokenizer", None)
    tokenizer = load_tokenizer(folder) if folder is not None else None
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"{KEY}: vocab_size of {name} is {vocab_size}, but its tokenizer has "
            f"{counted(tokenizer.vocab_size, 'token')}"
        )
    windows = OwnWindows(
        name=name,
        options=json.dumps(options, sort_keys=True),
        split=split,
        seq_len=seq_len,
        num_windows=num_windows,
        vocab_size=vocab_size,
        sequences=sequences,
    )
    facts = DataFacts(
        name=name,
        vocab_size=vocab_size,
        eos_id=getattr(sequences, "eos_id", tokenizer.eos_id if tokenizer else None),
        num_tokens=num_windows * (seq_len + 1),
        num_bytes=None,
        tokenizer=Path(folder).absolute() if folder is not None else None,
        tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
    )
    content = getattr(sequences, "fingerprint", None) or f"{name} {windows.options}"
    return facts, windows, sha256(f"{split} {num_windows} {vocab_size} {content}".encode()).hexdigest()


def _make(name: str, options: Mapping[str, Any], *, split: str, seq_len: int) -> TokenSequences:
    make = import_callable(name, key=KEY)
    if not (hasattr(make, "__len__") and hasattr(make, "__getitem__")):  # before anything of it is called
        raise ConfigError(
            f"{KEY}: {name} should be a class with __len__ and __getitem__; llmtrain.contracts.TokenSequences "
            "says what it needs"
        )
    given = {"split": split, "seq_len": seq_len, **options}
    try:
        made: TokenSequences = make(**given)
    except Exception as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConfigError(f"{KEY}: {name}({shown}) failed ({what_failed(error)})") from error
    return made
