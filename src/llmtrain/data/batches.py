"""Training and validation data: one global order of items, and the batches of it that a rank computes.

    step ─▶ item numbers ─▶ their places (order.py) ─▶ this rank's share ─▶ arrays of each micro-batch ─▶ tensors
            └───────────── computed ahead of time by a thread or worker processes (loader.py) ──────┘

An item is one sequence of a batch. What it holds is behind `Items`: a window of tokens (windows.py), or rows for
fine-tuning (chat/items.py). A position in the data is an item number, so that a resumed run needs no other state.
Workers import this module; torch is imported for the first tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NotRequired, Protocol, Self, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.data.loader import read_ahead
from llmtrain.data.mixture import ItemOrder, Mixture, MixtureSpec
from llmtrain.data.order import Ints, Places

_STEPS_AHEAD: Final = 256
"""Steps that a reader of a store knows in advance, at most; mostly it has enough to fetch before."""
_MORE_STEPS: Final = 8
"""Steps by which it looks further with every step, so that the first does not wait until all are found."""


class BatchArrays(TypedDict):
    """A micro-batch before it becomes tensors, of the same names."""

    input_ids: Ints
    labels: Ints
    document_ids: NotRequired[NDArray[np.int32]]
    cu_seqlens: NotRequired[NDArray[np.int32]]
    lengths: NotRequired[Ints]
    supervised: NotRequired[Ints]


class ItemReader(Protocol):
    """Finds items and reads them. It keeps files and tables, so it is not to be shared between threads."""

    def locate(self, items: Ints) -> Places:
        """Return where the items lie."""
        ...

    def share(self, places: Places, *, rank: int, world_size: int) -> Ints:
        """Return which of the places a rank computes, in its order. Shares differ by at most one item."""
        ...

    def expect(self, places: Places) -> bool:
        """Begin to fetch what reading these places later will need; return whether more of them would be fetched."""
        ...

    def read(self, places: Places, *, num_batches: int, batch_size: int) -> list[BatchArrays]:
        """Return the items at these places in batches of `batch_size` sequences; those without an item are padding."""
        ...

    def names(self, places: Places) -> list[str]:
        """Return `file:line` of each row that the items are made of; nothing where they are not made of rows."""
        ...


class Items(Protocol):
    """The sequences of one or more sources, and their order. Small, without torch, can be sent to another process."""

    @property
    def num_items(self) -> int:
        """Items of one epoch, all sources together."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash that changes when an item number would mean another item; the seed and seq_len do not count."""
        ...

    @property
    def mixture(self) -> MixtureSpec | None:
        """Mixture of the sources; None if there is one source, without a limit."""
        ...

    def with_mixture(self, mixture: MixtureSpec) -> Self:
        """Return the same sources, mixed otherwise."""
        ...

    def order(self) -> ItemOrder[Any]:
        """Return the order of training. Raises ConfigError for a weight that is too small."""
        ...

    def open(self, *, shuffled: bool, world_size: int = 1) -> ItemReader:
        """Return a reader, for one of `world_size` ranks, in the order of training, or of the one source in its own."""
        ...


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """Facts about the data besides its items."""

    name: str
    """Place of the data, for messages."""
    vocab_size: int
    """Tokens are in [0, vocab_size)."""
    eos_id: int | None
    """Ends every document; None: there are no documents."""
    num_tokens: int
    """End tokens counted."""
    num_bytes: int | None
    """UTF-8 bytes of the text; None: there is no text, or templates add some that is in no row."""
    tokenizer: Path | None
    """Folder of the tokenizer; None: there is no text."""
    tokenizer_sha256: str | None

    @property
    def tokens_per_byte(self) -> float | None:
        """Return tokens per byte, from which bits per byte follow; None where the bytes are not known."""
        return self.num_tokens / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """Training data of one rank. Meets TrainingData."""

    facts: DataFacts
    items: Items
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    pinned: bool = False
    """Batches are in pinned memory, from which a GPU copies while the host goes on."""

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return self.facts.name

    @property
    def items_per_epoch(self) -> int:
        """Items of all sources together; in a mixture each source goes through its own epochs, by its weight."""
        return self.items.num_items

    @property
    def end_item(self) -> int | None:
        """The item after the last one; None: there is no end, or it is not known yet where all stages begin."""
        return self.mixture.end if self.mixture and self.mixture.is_settled else None

    @cached_property
    def mixture(self) -> Mixture | None:
        """The mixture that the items come from; None if there is one source, without a limit."""
        return self.items.order().mixture if self.items.mixture else None

    def with_stages_at(self, items: Sequence[int]) -> TrainingSet:
        """Return the same data with the later stages of the mixture beginning at these items."""
        assert self.items.mixture
        mixture = replace(self.items.mixture, stage_items=tuple(items))
        return replace(self, items=self.items.with_mixture(mixture))

    @property
    def fingerprint(self) -> str:
        """Hash that a resumed run has to find again, or its position would mean other items."""
        return self.items.fingerprint

    def batches(
        self, *, start_item: int, batch_size: int, end_item: int, micro_batch_size: int
    ) -> Generator[list[Batch], None, None]:
        """Yield this rank's micro-batches of each step, from the one that begins at `start_item`.

        `batch_size` items over all ranks make a step; the last one ends at `end_item`. A micro-batch has
        `micro_batch_size` sequences, and all ranks have the same number of them: sequences without an item have only
        ignored labels. It reads ahead: close the generator (contextlib.closing) where it may not be used up.
        """
        steps = Steps(
            items=self.items,
            start_item=start_item,
            end_item=end_item,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )

        def finish(micro_batches: list[BatchArrays]) -> list[Batch]:
            return [_to_tensors(arrays, pinned=self.pinned) for arrays in micro_batches]

        if self.num_workers:
            with closing(read_ahead(steps.open, num_steps=len(steps), num_workers=self.num_workers)) as made:
                yield from map(finish, made)
            return
        open_ = partial(_finished, steps.open, finish)  # the thread that reads makes the tensors too
        with closing(read_ahead(open_, num_steps=len(steps), num_workers=0)) as finished:
            yield from finished

    def own_items(self, items: range) -> list[int]:
        """Return those of a step's items that this rank computes, in its order."""
        places = self._reader.locate(np.arange(items.start, items.stop))
        share = self._reader.share(places, rank=self.rank, world_size=self.world_size)
        return [items[index] for index in share.tolist()]

    def rows_of(self, item: int) -> list[str]:
        """Return `file:line` of each row of an item, for messages; nothing where items are not made of rows."""
        return self._reader.names(self._reader.locate(np.array([item])))

    @cached_property
    def _reader(self) -> ItemReader:
        """Reader for single items, as messages need them; whatever reads ahead opens its own."""
        return self.items.open(shuffled=True)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a run, and a rank's part in them. Opened where they are read: in a thread or a worker process."""

    items: Items
    start_item: int
    """The item at which step 0 begins."""
    end_item: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return max(0, -(-(self.end_item - self.start_item) // self.batch_size))

    def numbers(self, step: int) -> Ints:
        """Return the items of a step, over all ranks."""
        first = self.start_item + step * self.batch_size
        return np.arange(first, min(first + self.batch_size, self.end_item))

    def open(self) -> Callable[[int], list[BatchArrays]]:
        """Return the function from a step to its micro-batches."""
        return _StepReader(self, self.items.open(shuffled=True, world_size=self.world_size)).read


class _StepReader:
    """Reads the micro-batches of steps, and has the reader fetch what later ones need."""

    def __init__(self, steps: Steps, reader: ItemReader) -> None:
        self._steps = steps
        self._reader = reader
        self._places: dict[int, Places] = {}
        """Places of this rank's items, of the steps that were looked at and not read yet."""
        self._expected = 0
        """All steps before this one were announced to the reader, which is fetching what they need."""

    def read(self, step: int) -> list[BatchArrays]:
        self._look_ahead(step)
        own = self._places[step] if step in self._places else self._own_places(step)
        for passed in [other for other in self._places if other <= step]:  # with workers, others read some of them
            del self._places[passed]
        steps = self._steps
        num_batches = _num_batches(len(steps.numbers(step)), steps.micro_batch_size, steps.world_size)
        return _indexed(self._reader.read(own, num_batches=num_batches, batch_size=steps.micro_batch_size))

    def _look_ahead(self, step: int) -> None:
        """Announce steps until the reader has enough to fetch; a few more with every step, as the first should not
        wait until all are found."""
        self._expected = max(self._expected, step)
        for later in range(self._expected, min(self._expected + _MORE_STEPS, step + _STEPS_AHEAD, len(self._steps))):
            if later not in self._places:
                self._places[later] = self._own_places(later)
            if not self._reader.expect(self._places[later]):
                return
            self._expected = later + 1

    def _own_places(self, step: int) -> Places:
        places = self._reader.locate(self._steps.numbers(step))
        share = self._reader.share(places, rank=self._steps.rank, world_size=self._steps.world_size)
        return places.take(share)


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Held-out data: the same items at each evaluation."""

    facts: DataFacts
    items: Items

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return self.facts.name

    @property
    def num_items(self) -> int:
        """Items of the complete set."""
        return self.items.num_items

    def num_batches(
        self, *, batch_size: int, max_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> int:
        """Return the number of batches that `evaluation_batches` yields for the same arguments on any rank."""
        return _num_batches(self._num_taken(batch_size, max_batches), batch_size, world_size)

    def evaluation_batches(
        self, *, batch_size: int, max_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Generator[Batch, None, None]:
        """Yield a rank's batches of `batch_size` items, as many on every rank; over all ranks each item comes once.

        `max_batches` counts batches over all ranks: the items that fill them are taken, evenly spaced, so that they are
        the same at each evaluation and for any number of ranks. None takes all.
        """
        num_batches = self.num_batches(batch_size=batch_size, max_batches=max_batches, world_size=world_size)
        num_taken = self._num_taken(batch_size, max_batches)
        open_ = partial(
            _open_evaluation, self.items, num_taken=num_taken, batch_size=batch_size, rank=rank, world_size=world_size
        )
        with closing(read_ahead(open_, num_steps=num_batches, num_workers=0)) as batches:
            yield from map(_to_tensors, batches)

    def _num_taken(self, batch_size: int, max_batches: int | None) -> int:
        return self.num_items if max_batches is None else min(self.num_items, max_batches * batch_size)


def _open_evaluation(
    items: Items, *, num_taken: int, batch_size: int, rank: int, world_size: int
) -> Callable[[int], BatchArrays]:
    """Return the function from a batch's index to its arrays."""
    reader = items.open(shuffled=False, world_size=world_size)
    places = reader.locate(np.arange(num_taken) * items.num_items // num_taken)
    own = places.take(reader.share(places, rank=rank, world_size=world_size))

    def batch(index: int) -> BatchArrays:
        reader.expect(own.take(slice(index * batch_size, (index + _MORE_STEPS) * batch_size)))
        places = own.take(slice(index * batch_size, (index + 1) * batch_size))
        return _indexed(reader.read(places, num_batches=1, batch_size=batch_size))[0]

    return batch


def _num_batches(num_items: int, batch_size: int, world_size: int) -> int:
    """Return the batches that each rank needs for the largest share of the items."""
    largest_share = -(-num_items // world_size)
    return -(-largest_share // batch_size)


def _finished(
    open_: Callable[[], Callable[[int], list[BatchArrays]]], finish: Callable[[list[BatchArrays]], list[Batch]]
) -> Callable[[int], list[Batch]]:
    """Return the function from a step to its finished micro-batches."""
    read = open_()
    return lambda step: finish(read(step))


def _indexed(batches: list[BatchArrays]) -> list[BatchArrays]:
    """Add to each micro-batch which of its positions are supervised."""
    for arrays in batches:
        arrays["supervised"] = np.flatnonzero(arrays["labels"] != IGNORE_INDEX)
    return batches


def _to_tensors(arrays: BatchArrays, *, pinned: bool = False) -> Batch:
    """Return tensors over the arrays' memory, or copies of them in pinned memory."""
    import torch

    batch = Batch(input_ids=torch.from_numpy(arrays["input_ids"]), labels=torch.from_numpy(arrays["labels"]))
    if "document_ids" in arrays:
        batch["document_ids"] = torch.from_numpy(arrays["document_ids"])
    if "cu_seqlens" in arrays:
        batch["cu_seqlens"] = torch.from_numpy(arrays["cu_seqlens"])
    if "lengths" in arrays:
        batch["lengths"] = torch.from_numpy(arrays["lengths"])
    if "supervised" in arrays:
        batch["supervised"] = torch.from_numpy(arrays["supervised"])
    return cast(Batch, {name: cast(Any, tensor).pin_memory() for name, tensor in batch.items()}) if pinned else batch
