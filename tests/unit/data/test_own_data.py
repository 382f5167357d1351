"""Data of the user's own: each sequence comes once an epoch, for any number of ranks, and what is wrong is named."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest

from llmtrain.config.sections.own import OwnDataConfig
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.errors import ConfigError


class Counting:
    """Sequence i is i, i, … and of another length than its neighbours."""

    vocab_size = 50

    def __init__(self, split: str, seq_len: int, num: int = 20, **more: Any) -> None:
        self.num = num if split == "train" else num // 4
        self.seq_len = seq_len
        vars(self).update(more)

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> Sequence[int]:
        return [index] * (2 + index % self.seq_len)


class TooLong(Counting):
    def __getitem__(self, index: int) -> Sequence[int]:
        return [1] * (self.seq_len + 2)


class Outside(Counting):
    def __getitem__(self, index: int) -> Sequence[int]:
        return [1, 50]


class Fails(Counting):
    def __getitem__(self, index: int) -> Sequence[int]:
        raise OSError("the disk is gone")


class Fractions(Counting):
    def __getitem__(self, index: int) -> Any:
        return [0.5, 1.0]


class Broken(Counting):
    def __init__(self, split: str, seq_len: int, num: int) -> None:
        super().__init__(split, seq_len, num + 1)


class NoVocabulary:
    __len__, __getitem__ = Counting.__len__, Counting.__getitem__

    def __init__(self, split: str, seq_len: int) -> None:
        self.num = 3


class NoLength:
    vocab_size = 5

    def __init__(self, **_: Any) -> None: ...


def own(cls: type, **options: Any) -> OwnDataConfig:
    return OwnDataConfig(name=f"{__name__}:{cls.__name__}", seq_len=6, options=options)


def read(config: OwnDataConfig, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Return the supervised labels of each sequence of an epoch on one rank."""
    data = open_training_data(config, seed=3, rank=rank, world_size=world_size)
    steps = data.batches(start_item=0, batch_size=4, end_item=data.items_per_epoch, micro_batch_size=2)
    rows = chain.from_iterable(batch["labels"].tolist() for batches in steps for batch in batches)
    return [kept for row in rows if (kept := [label for label in row if label != IGNORE_INDEX])]


def test_every_sequence_comes_once_an_epoch_with_all_its_tokens_and_in_another_order() -> None:
    rows = read(own(Counting))
    assert sorted(rows) == [[index] * (1 + index % 6) for index in range(20)]
    assert rows != sorted(rows)


def test_two_ranks_share_the_sequences_of_one() -> None:
    both = [read(own(Counting), rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(chain(*both)) == sorted(read(own(Counting)))


def test_a_validation_split_without_sequences_is_none() -> None:
    assert open_validation_data(own(Counting, num=3), seed=3) is None
    validation = open_validation_data(own(Counting), seed=3)
    assert validation is not None
    assert validation.num_items == 5


def test_documents_are_told_apart_by_the_end_token_and_content_by_the_fingerprint() -> None:
    data = open_training_data(own(Counting, eos_id=4), seed=3)
    (batch, *_), *_ = data.batches(start_item=0, batch_size=4, end_item=4, micro_batch_size=4)
    assert "document_ids" in batch
    prints = [open_training_data(own(Counting, **more), seed=3).fingerprint for more in ({}, {"fingerprint": "b"})]
    assert prints[0] != prints[1]


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (TooLong, r"data\.name: sequence \d+ of .*:TooLong \(split train\) should be 2 to 7 integers .* shape \[8\]"),
        (Outside, r"has the token 50, but vocab_size is 50"),
        (Fails, r"cannot be read \(OSError: the disk is gone at .*test_own_data\.py:\d+\)"),
        (Fractions, r"should be 2 to 7 integers .* the type float64"),
        (
            NoLength,
            r"NoLength should be a class with __len__ and __getitem__; llmtrain\.contracts\.TokenSequences says",
        ),
        (NoVocabulary, r"has no vocab_size or no length \(AttributeError: .* no attribute 'vocab_size'"),
    ],
)
def test_data_that_does_not_meet_the_contract_is_one_message(cls: type, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(own(cls))


def test_a_class_that_fails_or_has_nothing_to_train_on_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"data\.name: .*:Broken\(split='train', seq_len=6, num='x'\) failed \(TypeE"):
        read(own(Broken, num="x"))
    with pytest.raises(ConfigError, match="has no sequences in the split train: its length is 0"):
        read(own(Counting, num=0))
