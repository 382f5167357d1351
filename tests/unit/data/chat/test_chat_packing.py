"""Packs and the order of rows: each row once an epoch, nothing too long, little padding, and quickly made."""

from __future__ import annotations

import time
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.chat.packing import pack
from llmtrain.data.chat.row_order import RUN_ROWS, STRIP_RUNS, GroupedOrder, PackedOrder, RowOrder
from llmtrain.data.mixture import BLOCK_ITEMS, ItemOrder, MixtureSpec
from llmtrain.data.order import Ints
from llmtrain.errors import ConfigError

SEQ_LEN = 64
LENGTHS = st.lists(st.integers(1, SEQ_LEN), min_size=1, max_size=300).map(lambda values: np.array(values))


def skewed_lengths(num_rows: int, *, longest: int = 504, mean: float = 40.0) -> Ints:
    """As instructions and answers are: most are short, a few are ten times as long."""
    lengths = np.random.default_rng(0).lognormal(np.log(mean), 0.85, num_rows)
    return np.clip(lengths, 3, longest).astype(np.int64)


def packed(lengths: Ints, *, seed: int = 1, seq_len: int = SEQ_LEN, source: int = 0) -> PackedOrder:
    return PackedOrder(lengths, pack(lengths, seq_len), seed=seed, source=source)


def grouped(lengths: Ints, *, seed: int = 1) -> GroupedOrder:
    return GroupedOrder(lengths, seed=seed, source=0)


def rows_of(order: RowOrder, begin: int, end: int) -> list[list[int]]:
    """The rows of these items of the one source."""
    places = ItemOrder([order], None, seed=1).locate(np.arange(begin, end))
    both = zip(places.sequence.tolist(), places.epoch.tolist(), strict=True)
    return [order.rows(sequence, epoch=epoch).tolist() for sequence, epoch in both]


def best_fit_one_by_one(lengths: list[int], seq_len: int) -> list[int]:
    """The room of each pack, by the definition of best-fit decreasing."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(seq_len)
        rooms[min(fitting, key=lambda index: rooms[index])] -= length
    return sorted(rooms)


@given(lengths=LENGTHS)
@settings(max_examples=100, deadline=None)
def test_packs_are_those_of_best_fit_decreasing(lengths: Ints) -> None:
    packs = pack(lengths, SEQ_LEN)
    assert sorted((SEQ_LEN - packs.num_tokens).tolist()) == best_fit_one_by_one(lengths.tolist(), SEQ_LEN)
    assert packs.num_tokens.max() <= SEQ_LEN
    assert sorted(packs.slots.tolist()) == list(range(len(lengths)))
    slot_lengths = np.sort(lengths)[::-1]
    for number, (begin, end) in enumerate(zip(packs.starts[:-1], packs.starts[1:], strict=True)):
        assert slot_lengths[packs.slots[begin:end]].sum() == packs.num_tokens[number] > 0
    assert packs.efficiency == pytest.approx(lengths.sum() / (len(packs.num_tokens) * SEQ_LEN))


def test_packs_are_nearly_full_where_there_are_short_rows() -> None:
    lengths = skewed_lengths(3000)
    packs = pack(lengths, 512)
    assert packs.efficiency > 0.995
    assert len(packs.num_tokens) == -(-lengths.sum() // 512)  # no packing could have fewer


@pytest.mark.parametrize("length", [0, SEQ_LEN + 1])
def test_a_row_that_fits_into_no_pack_is_rejected(length: int) -> None:
    with pytest.raises(ValueError, match=f"row 1 has {length} tokens, which is not from 1 to {SEQ_LEN}"):
        pack(np.array([3, length, 5]), SEQ_LEN)


@given(lengths=LENGTHS, seed=st.integers(0, 2**63 - 1), make=st.sampled_from([packed, grouped]))
@settings(max_examples=60, deadline=None)
def test_each_row_comes_exactly_once_an_epoch(lengths: Ints, seed: int, make: type[PackedOrder]) -> None:
    order = make(lengths, seed=seed)  # type: ignore[call-arg]
    for epoch in range(3):
        items = rows_of(order, epoch * order.num_sequences, (epoch + 1) * order.num_sequences)
        assert sorted(row for rows in items for row in rows) == list(range(len(lengths)))
        assert all(lengths[rows].sum() <= SEQ_LEN for rows in items)
    in_order = [order.rows(sequence, epoch=None).tolist() for sequence in range(order.num_sequences)]
    assert sorted(row for rows in in_order for row in rows) == list(range(len(lengths)))
    assert [int(lengths[rows].sum()) for rows in in_order] == order.lengths.tolist()


@given(lengths=LENGTHS, seed=st.integers(0, 100), start=st.integers(0, 5000), make=st.sampled_from([packed, grouped]))
@settings(max_examples=60, deadline=None)
def test_an_item_is_the_same_whether_reached_in_order_or_by_a_jump(
    lengths: Ints, seed: int, start: int, make: type[PackedOrder]
) -> None:
    went_on, jumped = make(lengths, seed=seed), make(lengths, seed=seed)  # type: ignore[call-arg]
    begin = max(0, start - 2 * went_on.num_sequences)
    assert rows_of(went_on, begin, start + 20)[start - begin :] == rows_of(jumped, start, start + 20)
    assert rows_of(jumped, begin, begin + 3) == rows_of(went_on, begin, begin + 3)


@pytest.mark.parametrize("make", [packed, grouped])
def test_every_epoch_seed_and_source_has_its_own_order(make: type[PackedOrder]) -> None:
    lengths = np.minimum(skewed_lengths(3000), SEQ_LEN)
    order = make(lengths, seed=1)  # type: ignore[call-arg]
    first = rows_of(order, 0, order.num_sequences)
    other_epoch = rows_of(order, order.num_sequences, 2 * order.num_sequences)
    other_seed = rows_of(make(lengths, seed=2), 0, order.num_sequences)  # type: ignore[call-arg]
    for other in (other_epoch, other_seed):
        assert sum(map(list.__eq__, first, other)) < len(first) / 50


def test_rows_of_a_length_change_packs_from_epoch_to_epoch() -> None:
    order = packed(np.array([20] * 200 + [22] * 100))
    epochs = [{tuple(sorted(rows)) for rows in rows_of(order, begin, begin + 100)} for begin in (0, 100)]
    assert all(len(rows) == 3 for rows in epochs[0])
    assert len(epochs[0] & epochs[1]) <= 1


def padding_share(lengths: Ints, *, micro_batch_size: int) -> float:
    """Of micro-batches that are cut from the second epoch in its order."""
    order, num_rows = grouped(lengths), len(lengths)
    begin, end = (-(-items // micro_batch_size) * micro_batch_size for items in (num_rows, 2 * num_rows - 100))
    rows = np.concatenate(rows_of(order, begin, end))
    batches = lengths[rows].reshape(-1, micro_batch_size)
    return 1 - float(batches.sum()) / float(batches.max(axis=1).sum() * micro_batch_size)


@pytest.mark.parametrize(
    ("micro_batch_size", "most"),
    [(4, 0.015), (8, 0.02), (16, 0.025), (32, 0.025), (12, 0.06), (48, 0.12), (64, 0.06), (128, 0.08)],
)
def test_rows_of_like_length_come_together(micro_batch_size: int, most: float) -> None:
    lengths = skewed_lengths(20_001)
    assert padding_share(lengths, micro_batch_size=micro_batch_size) < most
    shuffled = np.random.default_rng(1).permutation(lengths)[: 20_001 // micro_batch_size * micro_batch_size]
    batches = shuffled.reshape(-1, micro_batch_size)
    assert 1 - batches.sum() / (batches.max(axis=1).sum() * micro_batch_size) > 0.4


def test_lengths_follow_each_other_at_random_from_strip_to_strip() -> None:
    lengths = skewed_lengths(12_800)
    order = grouped(lengths)
    in_order = lengths[np.concatenate(rows_of(order, 0, 12_800))]
    of_strips = np.log(in_order.reshape(-1, STRIP_RUNS * RUN_ROWS)).mean(axis=1)
    assert abs(np.corrcoef(of_strips[:-1], of_strips[1:])[0, 1]) < 0.3  # 3 sigma


def test_rows_meet_others_in_each_epoch() -> None:
    order = grouped(np.arange(1, 5001))
    epochs = []
    for epoch in range(2):
        first = -(-5000 * epoch // RUN_ROWS) * RUN_ROWS
        rows = np.concatenate(rows_of(order, first, first + 150 * RUN_ROWS))
        epochs.append({tuple(sorted(run.tolist())) for run in rows.reshape(-1, RUN_ROWS)})
    assert len(epochs[0] & epochs[1]) < 5


def test_the_order_is_the_one_of_every_release_and_numpy_version() -> None:
    lengths = np.arange(5000) * 7919 % 300 + 1
    for order, golden in ((packed(lengths, seq_len=512), GOLDEN_PACKED), (grouped(lengths), GOLDEN_GROUPED)):
        rows = np.concatenate(rows_of(order, 0, 700))
        assert sha256(rows.astype("<i8").tobytes()).hexdigest() == golden


GOLDEN_PACKED = "68671398768e26bfedfb794d5ebb6d5beffd056017d3cd0aa8094f42386004e0"
GOLDEN_GROUPED = "57ffbeac518ff987db6ab6c399515977ed7a9d05e0ca9d6d3d91da4dc1d76d17"


def test_a_mixture_has_exact_quotas_of_items() -> None:
    lengths = [np.full(30, 10), np.full(500, 64)]
    orders = [packed(each, source=index) for index, each in enumerate(lengths)]
    order = ItemOrder(orders, MixtureSpec(weights=(3, 1)), seed=1)
    assert order.items_per_epoch == 5 + 500
    places = order.locate(np.arange(BLOCK_ITEMS))
    of_first = places.take(np.flatnonzero(places.source == 0))
    assert len(of_first.source) == 7500
    both = zip(of_first.sequence.tolist(), of_first.epoch.tolist(), strict=True)
    assert [orders[0].rows(pack, epoch=epoch).tolist() for pack, epoch in both] == rows_of(orders[0], 0, 7500)
    with pytest.raises(ConfigError, match=r"data\.train: weight 1e-05"):
        ItemOrder(orders, MixtureSpec(weights=(1, 1e-5)), seed=1)


@pytest.mark.parametrize("make", [packed, grouped])
def test_200_000_rows_are_planned_in_less_than_a_second(make: type[PackedOrder]) -> None:
    lengths = np.minimum(skewed_lengths(200_000), SEQ_LEN)
    began = time.process_time()
    order = make(lengths, seed=1)  # type: ignore[call-arg]
    rows_of(order, 0, 1)
    assert time.process_time() - began < 1.0
