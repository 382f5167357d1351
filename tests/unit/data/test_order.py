"""The order of the items: what is promised of it, held against the counts that it is made of."""

from __future__ import annotations

import time
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.mixture import BLOCK_ITEMS, ItemOrder, MixtureSpec, block_quotas
from llmtrain.data.order import (
    Ints,
    Places,
    WindowOrder,
    permutation,
    rank_share,
)
from llmtrain.errors import ConfigError

SOURCES = st.lists(st.integers(1, 3000), min_size=1, max_size=4)


def make_source(num_windows: int, *, seq_len: int = 256, shuffle_chunks: int = 8, seed: int = 1) -> WindowOrder:
    return WindowOrder(num_windows, seq_len=seq_len, shuffle_chunks=shuffle_chunks, seed=seed, source=0)


def locate(order: WindowOrder, items: Ints) -> Places:
    """Where the items of the one source lie."""
    return ItemOrder([order], None, seed=1).locate(items)


def make_items(
    *num_windows: int, weights: list[float] | None = None, seed: int = 1, chunks: int = 8
) -> ItemOrder[WindowOrder]:
    orders = [
        WindowOrder(count, seq_len=256, shuffle_chunks=chunks, seed=seed, source=source)
        for source, count in enumerate(num_windows)
    ]
    return ItemOrder(orders, MixtureSpec(weights=tuple(weights)) if weights else None, seed=seed)


def span(start: int, stop: int) -> Ints:
    return np.arange(start, stop, dtype=np.int64)


@given(num_windows=st.integers(1, 5000), seq_len=st.sampled_from([1, 256, 2**14, 2**20]), chunks=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_each_window_comes_exactly_once_an_epoch(num_windows: int, seq_len: int, chunks: int) -> None:
    order = make_source(num_windows, seq_len=seq_len, shuffle_chunks=chunks)
    _, epochs, slots, windows = locate(order, span(0, 3 * num_windows))
    for epoch in range(3):
        assert sorted(windows[epochs == epoch].tolist()) == list(range(num_windows))
    assert epochs.tolist() == sorted(epochs.tolist())
    assert 0 <= slots.min() <= slots.max() < chunks


@given(num_windows=st.integers(1, 100_000), seq_len=st.sampled_from([64, 1024, 2**14]), chunks=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_chunks_cover_the_windows_in_sizes_that_differ_by_at_most_one(
    num_windows: int, seq_len: int, chunks: int
) -> None:
    order = make_source(num_windows, seq_len=seq_len, shuffle_chunks=chunks)
    starts = order.chunk_starts()
    sizes = np.diff(starts)
    assert (starts[0], starts[-1], len(sizes)) == (0, num_windows, order.num_chunks)
    assert 1 <= sizes.min() <= sizes.max() <= sizes.min() + 1
    assert order.num_chunks >= min(num_windows, 4 * chunks)


def test_a_large_source_has_chunks_of_about_a_million_tokens() -> None:
    order = make_source(10_000_000, seq_len=1024)
    assert order.num_chunks == 9768
    assert 0.99 * 2**20 < order.chunk_starts()[1] * 1024 <= 2**20


@given(sources=SOURCES, weighted=st.booleans(), seed=st.integers(0, 2**63 - 1), start=st.integers(0, 10**7))
@settings(max_examples=60, deadline=None)
def test_locating_from_any_item_equals_going_there_step_by_step(
    sources: list[int], weighted: bool, seed: int, start: int
) -> None:
    weights = [1.0 + index for index in range(len(sources))] if weighted else None
    counts = sources if weighted else sources[:1]
    steps = make_items(*counts, weights=weights, seed=seed)
    begin = max(0, start - 100)
    whole = steps.locate(span(begin, start + 50))
    one_by_one = [make_items(*counts, weights=weights, seed=seed).locate(span(start, start + 50))]
    one_by_one.append(Places(*(column[start - begin :] for column in whole)))
    assert all(np.array_equal(left, right) for left, right in zip(*one_by_one, strict=True))


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    asked_backwards, asked_forwards = make_items(5000), make_items(5000)
    backwards = [asked_backwards.locate(span(start, start + 16)).sequence for start in range(20_000, 0, -371)]
    forwards = [asked_forwards.locate(span(start, start + 16)).sequence for start in reversed(range(20_000, 0, -371))]
    assert np.array_equal(backwards, forwards[::-1])


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    first = make_items(4000).locate(span(0, 8000)).sequence
    other_seed = make_items(4000, seed=2).locate(span(0, 4000)).sequence
    for other in (first[4000:], other_seed):
        assert np.count_nonzero(first[:4000] == other) < 20


def test_chunks_and_the_windows_inside_them_are_shuffled_anew_every_epoch() -> None:
    order = make_source(150_000)
    first, second = locate(order, span(0, 300_000)).sequence.reshape(2, -1)
    chunk_size = int(order.chunk_starts()[1])
    of_chunk_0 = [epoch[epoch < chunk_size] for epoch in (first, second)]
    assert sorted(of_chunk_0[0].tolist()) == sorted(of_chunk_0[1].tolist()) == list(range(chunk_size))
    assert np.count_nonzero(of_chunk_0[0] == of_chunk_0[1]) < 10
    chunks = [list(dict.fromkeys((epoch // chunk_size).tolist())) for epoch in (first, second)]
    assert chunks[0] != chunks[1]


def test_the_order_is_the_one_of_every_release_and_numpy_version() -> None:
    assert permutation(8, "golden", 1).tolist() == GOLDEN_PERMUTATION
    order = make_items(190_000, 31, 4000, weights=[5, 1, 2.5], seed=1337, chunks=3)
    places = order.locate(span(9_950, 31_000))
    assert sha256(np.stack(places).astype("<i8").tobytes()).hexdigest() == GOLDEN_PLACES


GOLDEN_PERMUTATION = [4, 5, 0, 3, 1, 2, 6, 7]
GOLDEN_PLACES = "99de1df654bf3b93c8219ad51c32fe177b95022ded1166cd98de565fedfdfafb"


def test_a_batch_draws_from_all_open_chunks_in_turn() -> None:
    order = make_source(140_000, shuffle_chunks=8)
    _, _, slots, windows = locate(order, span(0, 140_000))
    chunk_of = np.searchsorted(order.chunk_starts(), windows, side="right") - 1
    for start in range(0, 140_000 - 16, 16):
        assert len(set(chunk_of[start : start + 16].tolist())) >= 8
    per_group = [set(chunk_of[slots == slot].tolist()) for slot in range(8)]
    assert sum(map(len, per_group)) == order.num_chunks == 40


def test_neighbours_in_the_data_are_not_neighbours_in_the_sequence() -> None:
    windows = locate(make_source(140_000), span(0, 140_000)).sequence.astype(float)
    assert np.count_nonzero(np.abs(np.diff(windows)) <= 1) < 70
    # Within a group the same chunks take turns, so every K-th item is of the same one: its draws must be unrelated.
    same_chunk = windows[: 8 * 3500].reshape(-1, 8)
    for slot in range(8):
        column = same_chunk[:, slot] - same_chunk[:, slot].mean()
        assert abs((column[1:] * column[:-1]).sum() / (column**2).sum()) < 0.1


def test_small_data_are_shuffled_as_a_whole() -> None:
    windows = locate(make_source(30_000), span(0, 3000)).sequence
    assert np.histogram(windows, bins=10, range=(0, 30_000))[0].min() > 250
    centred = windows - windows.mean()
    for lag in (1, 8, 16):
        assert abs((centred[lag:] * centred[:-lag]).mean() / centred.var()) < 0.06
    assert sorted(locate(make_source(3), span(0, 3)).sequence.tolist()) == [0, 1, 2]


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_quotas_fill_a_block_and_follow_the_weights(weights: list[float]) -> None:
    quotas = block_quotas(weights)
    assert sum(quotas) == BLOCK_ITEMS
    assert all(
        abs(quota - BLOCK_ITEMS * weight / sum(weights)) < 1 for quota, weight in zip(quotas, weights, strict=True)
    )


def test_quotas_round_by_largest_remainder() -> None:
    assert block_quotas([1, 1, 1]) == [3334, 3333, 3333]
    assert block_quotas([0.7, 0.2, 0.1]) == [7000, 2000, 1000]
    with pytest.raises(ConfigError, match="weight 1e-05"):
        block_quotas([1, 0.00001])


def test_mixtures_have_exact_quotas_in_every_block() -> None:
    order = make_items(700, 90_000, 31, weights=[0.5, 0.3, 0.2])
    sources = order.locate(span(0, 3 * BLOCK_ITEMS)).source
    for block in range(3):
        counts = Counter(sources[block * BLOCK_ITEMS : (block + 1) * BLOCK_ITEMS].tolist())
        assert counts == {0: 5000, 1: 3000, 2: 2000}


def test_each_source_of_a_mixture_goes_through_its_own_epochs() -> None:
    places = make_items(700, 90_000, weights=[0.5, 0.5]).locate(span(0, 20_000))
    small = places.sequence[places.source == 0]
    assert len(small) == 10_000
    for epoch in range(14):
        assert sorted(small[epoch * 700 : (epoch + 1) * 700].tolist()) == list(range(700))
    assert places.epoch[places.source == 0].tolist() == [number // 700 for number in range(10_000)]
    large = places.sequence[places.source == 1]
    assert len(set(large.tolist())) == 10_000


def test_the_sources_of_a_mixture_are_not_correlated_along_the_sequence() -> None:
    sources = make_items(5000, 5000, weights=[1, 1]).locate(span(0, 50_000)).source - 0.5
    for lag in (1, 2, 3, 8, 16, 10_000):
        assert abs(np.mean(sources[lag:] * sources[:-lag]) / 0.25) < 0.03


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@given(batch_size=st.integers(1, 40), start=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_ranks_together_hold_the_batch(world_size: int, batch_size: int, start: int) -> None:
    places = make_items(3000, 500, weights=[3, 1]).locate(span(start, start + batch_size))
    shares = [rank_share(places, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(batch_size))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_keeps_to_its_own_chunks_where_there_are_enough() -> None:
    order = make_items(200_000)
    seen: list[set[int]] = [set() for _ in range(4)]
    for start in range(0, 16 * 500, 16):
        places = order.locate(span(start, start + 16))
        for rank in range(4):
            seen[rank] |= set(places.slot[rank_share(places, rank=rank, world_size=4)].tolist())
    assert seen == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]


def test_seeking_in_ten_billion_tokens_takes_less_than_a_third_of_a_second() -> None:
    num_windows = 10_000_000_000 // 256
    order = make_items(num_windows, num_windows, weights=[0.9, 0.1])
    for item in (0, num_windows // 2, 3 * num_windows + 12_345):
        begin = time.process_time()
        make_items(num_windows, num_windows, weights=[0.9, 0.1]).locate(span(item, item + 512))
        assert time.process_time() - begin < 0.3
    assert order.items_per_epoch == 2 * num_windows
