"""Mixtures: item number -> source, and number in the source. A pure function of counts, weights and seed.

    items     0 1 2 3 4 5 …                     one order over all sources
    stretch   as long as the shares stay the same: a stage begins, or a source is used up, and the next one starts
    block     10,000 items of a stretch, with quotas of each source, in an order of (seed, block)
    source    its numbers go on from stretch to stretch: order.py has its epochs

There are as many stretches as stages and limits at most, so an item is found without a walk over those before it. Two
orders are possible in a block. With weights alone it is a random one, as it was before there were stages and limits.
With anything more the draws of each source are spread evenly: its k-th of q lies somewhere in the k-th of q equal parts
of the block, so that after any number of items a source has its share of them but for an item or two.

Workers import this module, so it imports no torch and no config.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Final, Generic, Literal, NamedTuple, TypeVar

import numpy as np

from llmtrain.data.order import Ints, Places, SourceOrder, distinct, make_room, permutation, random_bits
from llmtrain.errors import ConfigError

BLOCK_ITEMS: Final = 10_000
"""Items of a block. With weights alone the quotas of each block are the same."""
NEVER: Final = 2**60
"""No run comes to an item of so high a number."""

Unit = Literal["sequences", "tokens", "documents"]
AnyOrder = TypeVar("AnyOrder", bound=SourceOrder)


@dataclass(frozen=True, kw_only=True)
class MixtureStage:
    """A part of the run with weights of its own."""

    weights: tuple[float, ...]
    from_step: int | None = None
    from_fraction: float | None = None
    """Share of the run's steps before it; one of the two is given."""

    @property
    def begins(self) -> str:
        """Return in words where the stage begins."""
        return f"step {self.from_step:,}" if self.from_step is not None else f"{self.from_fraction:.4g} of the run"


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Description of a mixture, as a config asks for it. Tuples have one entry for each source, in their order."""

    weights: tuple[float, ...] | None
    """Weights up to the first of the later stages; None: each source comes as often as `max_epochs` says."""
    by: Unit = "sequences"
    """Unit in which weights are shares."""
    max_epochs: tuple[float | None, ...] = ()
    """Times that a source is used at most; empty: there are no limits."""
    at_limit: Literal["share", "stop"] = "share"
    """After the last use of a source: the others get its share, or the data end."""
    stages: tuple[MixtureStage, ...] = ()
    """Later stages, in their order."""
    stage_items: tuple[int, ...] | None = None
    """The item at which each of the later stages begins; None: not known yet, as it depends on the run's length."""
    names: tuple[str, ...] = ()
    """The sources in messages."""

    @property
    def has_weights_alone(self) -> bool:
        """Return whether this is a mixture by the share of sequences, without limits and later stages."""
        return self.weights is not None and self.by == "sequences" and not self.stages and not any(self.max_epochs)

    @property
    def identity(self) -> str:
        """Return text that changes when an item would come from another source, for a fingerprint.

        Where later stages begin is decided once for a run and recorded with it, so that only what decides it counts.
        """
        if self.has_weights_alone:
            return str(list(self.weights or ()))
        return repr(replace(self, stage_items=None, names=()))


class Amount(NamedTuple):
    """Tokens and documents in one epoch of a source, for weights that are shares of these."""

    tokens: int
    documents: int


class Change(NamedTuple):
    """A place in the order from which on the shares differ."""

    item: int
    stage: int
    """Number of the stage that the item belongs to; 0 is the first."""
    used_up: tuple[int, ...]
    """Sources that have nothing left from here on, and had something before."""


@dataclass(frozen=True)
class _Stretch:
    """Items with the same shares."""

    start: int
    stage: int
    parts: tuple[int, ...]
    """Share of each source, as a part of `total`."""
    before: tuple[int, ...]
    """Items of each source before the stretch."""
    block_items: int

    @cached_property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self.parts)

    @cached_property
    def largest(self) -> int:
        """The source with the largest share, which takes what rounding leaves."""
        return max(range(len(self.parts)), key=self.parts.__getitem__)

    def counts(self, num_items: int) -> list[int]:
        """Return the items of each source among the first `num_items`, at the end of a block: rounded shares."""
        rounded = [(2 * num_items * part + self.total) // (2 * self.total) for part in self.parts]
        rounded[self.largest] += num_items - sum(rounded)
        return rounded

    def block_with(self, number: int, source: int) -> int:
        """Return the block that holds the item of a source with this number (from 1) in the stretch."""
        part = self.parts[source]
        at_least = -(-(2 * number - 1) * self.total // (2 * part))  # items after which the rounded share is `number`
        block = max(0, (at_least - 1) // self.block_items)
        if source != self.largest:
            return block
        while self.counts((block + 1) * self.block_items)[source] < number:
            block += 1
        while block and self.counts(block * self.block_items)[source] >= number:
            block -= 1
        return block


class Mixture:
    """Source of each item, and the number of items of that source before it."""

    def __init__(
        self, spec: MixtureSpec, num_sequences: Sequence[int], *, seed: int, amounts: Sequence[Amount] = ()
    ) -> None:
        """`num_sequences` of each source; `amounts` of each source, where `spec.by` is not sequences.

        Raises ConfigError when a weight is so small that its source would have no item in a block.
        """
        self.spec = spec
        self.num_sources = len(num_sequences)
        self.num_sequences = num_sequences
        self._amounts = amounts
        self._seed = seed
        self._blocks: dict[tuple[int, int], tuple[Ints, Ints]] = {}
        self._limits = [
            None if times is None else _items_of(times, sequences)
            for times, sequences in zip(spec.max_epochs or [None] * self.num_sources, num_sequences, strict=True)
        ]
        self._weights = [spec.weights, *(stage.weights for stage in spec.stages[: len(spec.stage_items or ())])]
        # In a block of this size the quota of the largest source is never rounded below 0.
        self._block_items = BLOCK_ITEMS if spec.has_weights_alone else max(BLOCK_ITEMS, self.num_sources**2)
        self._stretches: list[_Stretch] = []
        self.end: int | None = self._find_stretches([0, *(spec.stage_items or ())])
        """Number of items until the sources are used up; None: there is no end."""
        self._starts = np.array([stretch.start for stretch in self._stretches])

    @property
    def is_settled(self) -> bool:
        """Return whether it is known where all stages begin."""
        return not self.spec.stages or self.spec.stage_items is not None

    def locate(self, items: Ints) -> tuple[Ints, Ints]:
        """Return the source of each item, and its number among the items of that source. No item is past the end."""
        assert self.end is None or not len(items) or items.max() < self.end
        if self.num_sources == 1:
            return np.zeros_like(items), items
        sources, numbers = np.empty_like(items), np.empty_like(items)
        stretches = np.searchsorted(self._starts, items, side="right") - 1
        for index in distinct(stretches):
            stretch, there = self._stretches[index], np.flatnonzero(stretches == index)
            blocks, places = np.divmod(items[there] - stretch.start, stretch.block_items)
            for block in distinct(blocks):
                here = np.flatnonzero(blocks == block)
                block_sources, block_numbers = self._block(stretch, block)
                sources[there[here]] = block_sources[places[here]]
                numbers[there[here]] = block_numbers[places[here]]
        return sources, numbers

    def counts(self, item: int) -> list[int]:
        """Return the number of items of each source before `item`."""
        item = item if self.end is None else min(item, self.end)
        index = int(np.searchsorted(self._starts, item, side="right")) - 1
        return self._counts(self._stretches[index], item)

    def shares(self, item: int) -> list[float]:
        """Return the share of the items around `item` that each source has."""
        stretch = self._stretches[int(np.searchsorted(self._starts, item, side="right")) - 1]
        return [part / stretch.total for part in stretch.parts]

    def stage_shares(self, stage: int) -> list[float]:
        """Return the share of the items that each source has in a stage by its weights, as if nothing were used up."""
        weights = self.spec.weights if stage == 0 else self.spec.stages[stage - 1].weights
        parts = self._parts(weights, [True] * self.num_sources)
        return [part / sum(parts) for part in parts]

    def asked(self, item: int) -> list[float]:
        """Return the number of items of each source before `item` by the weights alone, as if nothing were used up."""
        starts = [0, *(self.spec.stage_items or ())]
        asked = [0.0] * self.num_sources
        for stage, start in enumerate(starts):
            end = min(item, starts[stage + 1]) if stage + 1 < len(starts) else item
            for source, share in enumerate(self.stage_shares(stage)):
                asked[source] += share * max(0, end - start)
        return asked

    def in_unit(self, counts: Sequence[float]) -> list[float]:
        """Return how many sequences, tokens or documents, as `spec.by` says, so many items of each source are."""
        return [count * float(self._units(source)) for source, count in enumerate(counts)]

    @property
    def changes(self) -> list[Change]:
        """Places where a stage begins or a source is used up, the end among them, in their order."""
        found, gone = [], set[int]()
        places = [(stretch.start, stretch.stage, stretch.before) for stretch in self._stretches]
        if self.end is not None:
            places.append((self.end, self._stretches[-1].stage, tuple(self.counts(self.end))))
        for item, stage, before in places:
            used = {
                source for source, limit in enumerate(self._limits) if limit is not None and before[source] >= limit
            }
            if item:
                found.append(Change(item, stage, tuple(sorted(used - gone))))
            gone |= used
        return found

    # -- stretches -----------------------------------------------------------------------------------------------------

    def _find_stretches(self, stage_starts: Sequence[int]) -> int | None:
        """Find all stretches; return the item at which the last one ends, None if it does not."""
        start, before = 0, [0] * self.num_sources
        while True:
            stage = max(number for number, begins in enumerate(stage_starts) if begins <= start)
            left = [limit is None or before[source] < limit for source, limit in enumerate(self._limits)]
            parts = self._parts(self._weights[stage], left)
            if not any(parts):
                return start
            stretch = _Stretch(start, stage, parts, tuple(before), self._block_items)
            self._stretches.append(stretch)
            used_up = self._first_used_up(stretch)
            ends = [stage_starts[stage + 1] if stage + 1 < len(stage_starts) else None, used_up]
            known = [end for end in ends if end is not None]
            if not known:
                return None
            start = min(known)
            before = self._counts(stretch, start)
            if start == used_up and self.spec.at_limit == "stop":
                return start

    def _parts(self, weights: tuple[float, ...] | None, left: Sequence[bool]) -> tuple[int, ...]:
        """Return the share of each source, as whole numbers; 0 for a source of which nothing is left."""
        if self.spec.has_weights_alone:
            return tuple(block_quotas(weights or ()))
        shares = []
        for source, has_some in enumerate(left):
            limit = self._limits[source]
            assert weights is not None or limit is not None
            weight = Fraction(limit or 0) if weights is None else Fraction(weights[source]) / self._units(source)
            shares.append(weight if has_some else Fraction(0))
        denominator = lcm(*(share.denominator for share in shares))
        return tuple(int(share * denominator) for share in shares)

    def _units(self, source: int) -> Fraction:
        """Return the sequences, tokens or documents in an item of a source, on average."""
        if self.spec.by == "sequences":
            return Fraction(1)
        return Fraction(getattr(self._amounts[source], self.spec.by), self.num_sequences[source])

    def _first_used_up(self, stretch: _Stretch) -> int | None:
        """Return the item after the one with which the first source has reached its limit; None: there is no such."""
        left = {
            source: limit - stretch.before[source]
            for source, limit in enumerate(self._limits)
            if limit is not None and stretch.parts[source]
        }
        if not left:
            return None
        blocks = {source: stretch.block_with(number, source) for source, number in left.items()}
        block = min(blocks.values())
        if block > NEVER // stretch.block_items:
            return None
        sources, _ = self._block(stretch, block)
        counts = stretch.counts(block * stretch.block_items)
        places = [
            int(np.flatnonzero(sources == source)[left[source] - counts[source] - 1])
            for source in left
            if blocks[source] == block
        ]
        return stretch.start + block * stretch.block_items + min(places) + 1

    def _counts(self, stretch: _Stretch, item: int) -> list[int]:
        """Return the number of items of each source before an item that is in the stretch, or at its end."""
        block, place = divmod(item - stretch.start, stretch.block_items)
        counts = np.array(stretch.counts(block * stretch.block_items)) + np.array(stretch.before)
        if place:
            counts += np.bincount(self._block(stretch, block)[0][:place], minlength=self.num_sources)
        return [int(count) for count in counts]

    def _block(self, stretch: _Stretch, block: int) -> tuple[Ints, Ints]:
        """Return the source of each item of a block, and the number of items of that source before it."""
        if (stretch.start, block) not in self._blocks:
            begin, end = (np.array(stretch.counts(number * stretch.block_items)) for number in (block, block + 1))
            quotas = end - begin
            sources = np.repeat(np.arange(self.num_sources), quotas)
            draws = np.arange(stretch.block_items) - np.repeat(np.cumsum(quotas) - quotas, quotas)
            if self.spec.has_weights_alone:
                sources = sources[permutation(BLOCK_ITEMS, "block", self._seed, block)]
            else:
                bits = random_bits(stretch.block_items, "spread", self._seed, stretch.start, block)
                within = (bits >> np.uint64(11)) / 2.0**53
                sources = sources[np.argsort((draws + within) / quotas[sources], kind="stable")]
            numbers = np.empty_like(sources)
            numbers[np.argsort(sources, kind="stable")] = draws + np.repeat(begin + np.array(stretch.before), quotas)
            make_room(self._blocks, 2)
            self._blocks[stretch.start, block] = sources, numbers
        return self._blocks[stretch.start, block]


class ItemOrder(Generic[AnyOrder]):
    """The order of items over one source, which is endless, or over the sources of a mixture."""

    def __init__(
        self, sources: Sequence[AnyOrder], mixture: MixtureSpec | None, *, seed: int, amounts: Sequence[Amount] = ()
    ) -> None:
        """`mixture`: None where there is only one source, without a limit. `amounts` and errors as of `Mixture`."""
        assert sources
        assert mixture or len(sources) == 1
        self.sources = sources
        sequences = [source.num_sequences for source in sources]
        self.mixture = Mixture(mixture or MixtureSpec(weights=(1.0,)), sequences, seed=seed, amounts=amounts)

    @property
    def items_per_epoch(self) -> int:
        """Items of all sources together. The epoch of a source in a mixture may be shorter or longer, by its weight."""
        return sum(source.num_sequences for source in self.sources)

    def locate(self, items: Ints) -> Places:
        """Return where the items lie. One call costs about the same for a batch anywhere in the order."""
        sources, numbers = self.mixture.locate(items)
        epochs, slots, sequences = np.empty_like(items), np.empty_like(items), np.empty_like(items)
        for source in distinct(sources):
            order, here = self.sources[source], np.flatnonzero(sources == source)
            epochs[here], positions = np.divmod(numbers[here], order.num_sequences)
            for epoch in distinct(epochs[here]):
                of_epoch = epochs[here] == epoch
                there = here[of_epoch]
                slots[there], sequences[there] = order.locate(epoch, positions[of_epoch])
        return Places(sources, epochs, slots, sequences)


def block_quotas(weights: Sequence[float]) -> list[int]:
    """Return the items of each source in a block: by the weights, rounded by largest remainder, BLOCK_ITEMS in all.

    Raises ConfigError when one of them is 0.
    """
    total = sum(map(Fraction, weights))
    shares = [BLOCK_ITEMS * Fraction(weight) / total for weight in weights]
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: quotas[source] - shares[source])
    for source in by_remainder[: BLOCK_ITEMS - sum(quotas)]:
        quotas[source] += 1
    for weight, quota in zip(weights, quotas, strict=True):
        if quota == 0:
            raise ConfigError(
                f"data.train: weight {weight:g} is {float(weight / total):.2g} of the sum of all weights, less than "
                f"one item in {BLOCK_ITEMS}: give the source a larger weight or remove it"
            )
    return quotas


def _items_of(times: float, num_sequences: int) -> int:
    """Return the items of a source that is used so many times: 1.5 times 10 sequences are 15 items."""
    return max(1, round(Fraction(str(times)) * num_sequences))
