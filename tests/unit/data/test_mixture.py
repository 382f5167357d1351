"""Mixtures: the shares, limits and stages that are promised of the order, held against the counts it is made of."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.mixture import BLOCK_ITEMS, Amount, ItemOrder, Mixture, MixtureSpec, MixtureStage
from llmtrain.data.mixture_report import change_in_words, source_rows
from llmtrain.data.order import Ints, Places, WindowOrder

BY_TOKENS: dict[str, Any] = {"by": "tokens"}
WEIGHTS = st.lists(st.floats(0.001, 10), min_size=1, max_size=6)


def make_mixture(sequences: list[int], *, seed: int = 1, amounts: list[Amount] | None = None, **asked: Any) -> Mixture:
    """A mixture of sources of so many sequences; where tokens count, each has 256."""
    amounts = amounts or [Amount(256 * count, count) for count in sequences]
    return Mixture(MixtureSpec(**asked), sequences, seed=seed, amounts=amounts)


def make_order(sequences: list[int], *, seed: int = 1, **asked: Any) -> ItemOrder[WindowOrder]:
    orders = [
        WindowOrder(count, seq_len=256, shuffle_chunks=4, seed=seed, source=source)
        for source, count in enumerate(sequences)
    ]
    amounts = [Amount(256 * count, count) for count in sequences]
    return ItemOrder(orders, MixtureSpec(**asked), seed=seed, amounts=amounts)


def span(start: int, stop: int) -> Ints:
    return np.arange(start, stop, dtype=np.int64)


@st.composite
def specs(draw: st.DrawFn) -> tuple[list[int], dict[str, Any]]:
    """Sources, and a mixture of them with weights, and perhaps limits and stages."""
    sequences = draw(st.lists(st.integers(80, 4000), min_size=2, max_size=4))
    number = len(sequences)
    weights = st.lists(st.floats(0, 5), min_size=number, max_size=number).filter(any)
    limits = st.lists(st.one_of(st.none(), st.floats(0.25, 6)), min_size=number, max_size=number)
    asked: dict[str, Any] = {
        "weights": tuple(draw(weights)),
        "by": draw(st.sampled_from(["sequences", "tokens", "documents"])),
        "max_epochs": tuple(draw(limits)),
        "at_limit": draw(st.sampled_from(["share", "stop"])),
        "stages": tuple(MixtureStage(weights=tuple(one), from_step=1) for one in draw(st.lists(weights, max_size=3))),
    }
    starts = draw(st.sets(st.integers(1, 11_000), min_size=len(asked["stages"]), max_size=len(asked["stages"])))
    asked["stage_items"] = tuple(sorted(starts))
    if MixtureSpec(**asked).has_weights_alone:
        asked["by"] = "tokens"
    return sequences, asked


@given(weights=WEIGHTS, seed=st.integers(0, 2**63 - 1), start=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_ten_million_tokens_anywhere_have_the_asked_shares(weights: list[float], seed: int, start: int) -> None:
    """At 1,024 tokens a sequence they are 9,766 sequences: 0.1 % of these are nearly ten."""
    mixture = make_mixture([10**6] * len(weights), seed=seed, weights=tuple(weights), by="tokens")
    num_items = 10_000_000 // 1024 + 1
    counts = np.array(mixture.counts(start + num_items)) - mixture.counts(start)
    asked = np.array(weights) / sum(weights)
    assert counts.sum() == num_items
    assert np.abs(counts / num_items - asked).max() < 0.001


def test_weights_alone_have_exact_shares_in_each_block_to_a_ten_thousandth() -> None:
    mixture = make_mixture([10**6] * 3, weights=(0.7, 0.2, 0.1))
    assert mixture.counts(7 * BLOCK_ITEMS) == [49_000, 14_000, 7_000]


@given(weights=WEIGHTS, num_items=st.integers(1, 40_000))
@settings(max_examples=40, deadline=None)
def test_sources_are_spread_evenly_over_any_number_of_items(weights: list[float], num_items: int) -> None:
    counts = make_mixture([10**6] * len(weights), weights=tuple(weights), by="tokens").counts(num_items)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - num_items * weight / sum(weights)) < 2 + len(weights) / 2


@given(asked=specs(), seed=st.integers(0, 2**63 - 1), position=st.integers(0, 14_000), length=st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_any_position_is_found_as_if_all_before_it_had_been_read(
    asked: tuple[list[int], dict[str, Any]], seed: int, position: int, length: int
) -> None:
    """A run that is resumed opens the data anew, and knows one number."""
    sequences, spec = asked
    order = make_order(sequences, seed=seed, **spec)
    stop = 14_000 if order.mixture.end is None else min(14_000, order.mixture.end)
    position = min(position, stop - 1)
    whole = order.locate(span(0, stop))
    resumed = make_order(sequences, seed=seed, **spec).locate(span(position, min(position + length, stop)))
    read = whole.take(slice(position, position + length))
    assert all(np.array_equal(left, right) for left, right in zip(resumed, read, strict=True))
    before = Counter(whole.source[:position].tolist())
    assert order.mixture.counts(position) == [before[source] for source in range(len(sequences))]


@given(asked=specs())
@settings(max_examples=40, deadline=None)
def test_a_source_goes_on_where_its_order_stood_and_keeps_its_limit(asked: tuple[list[int], dict[str, Any]]) -> None:
    sequences, spec = asked
    order = make_order(sequences, **spec)
    places = order.locate(span(0, 14_000 if order.mixture.end is None else min(14_000, order.mixture.end)))
    for source, count in enumerate(sequences):
        mine = places.take(places.source == source)
        assert mine.epoch.tolist() == [number // count for number in range(len(mine.source))]
        for epoch in set(mine.epoch.tolist()):
            seen = mine.sequence[mine.epoch == epoch]
            assert len(set(seen.tolist())) == len(seen)
        limit = spec["max_epochs"][source]
        if limit is not None:
            assert len(mine.source) <= max(1, round(Fraction(str(limit)) * count))


@given(
    sources=st.lists(st.tuples(st.integers(1, 8000), st.integers(1, 4)), min_size=1, max_size=5),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_with_epochs_each_sequence_comes_exactly_so_often_and_the_data_end(
    sources: list[tuple[int, int]], seed: int
) -> None:
    sequences, epochs = [list(column) for column in zip(*sources, strict=True)]
    order = make_order(sequences, seed=seed, weights=None, max_epochs=tuple(map(float, epochs)))
    end = sum(count * times for count, times in sources)
    assert order.mixture.end == end
    places = order.locate(span(0, end))
    for source, (count, times) in enumerate(sources):
        assert np.bincount(places.sequence[places.source == source], minlength=count).tolist() == [times] * count


def test_sources_with_epochs_come_side_by_side_and_not_one_after_the_other() -> None:
    places = make_order([30_000, 3_000], weights=None, max_epochs=(1.0, 2.0)).locate(span(0, 36_000))
    per_part = np.bincount(span(0, 36_000)[places.source == 1] // 3_600, minlength=10)
    assert (per_part.min(), per_part.max()) == (pytest.approx(600, abs=2), pytest.approx(600, abs=2))


def test_part_of_an_epoch_is_possible() -> None:
    assert make_mixture([10, 40], weights=None, max_epochs=(0.1, 1.5)).counts(61) == [1, 60]


def test_the_others_get_the_share_of_a_source_that_is_used_up() -> None:
    mixture = make_mixture([1000, 10**6, 10**6], weights=(0.5, 0.3, 0.2), max_epochs=(4.0, None, None))
    (change,) = mixture.changes
    assert change.item == pytest.approx(8000, abs=4)
    assert change.used_up == (0,)
    assert mixture.counts(change.item)[0] == mixture.counts(10**6)[0] == 4000
    assert mixture.shares(change.item) == pytest.approx([0, 0.6, 0.4])
    after = np.array(mixture.counts(10**6)) - mixture.counts(change.item)
    assert after / after.sum() == pytest.approx([0, 0.6, 0.4], abs=1e-5)
    assert mixture.end is None
    assert source_rows(mixture, 10**6)[0] == {
        "source": "0",
        "by": "sequences",
        "sequences": 4000,
        "share": 0.004,
        "asked": 0.5,
        "epochs": 4.0,
    }


def test_the_data_end_with_the_first_source_that_is_used_up_if_so_asked() -> None:
    asked: dict[str, Any] = {"weights": (0.5, 0.5), "max_epochs": (4.0, 1.0)}
    mixture = make_mixture([1000, 10**6], at_limit="stop", **asked)
    assert mixture.end is not None
    assert mixture.end == pytest.approx(8000, abs=4)
    assert mixture.counts(10**7) == mixture.counts(mixture.end)
    assert change_in_words(mixture.changes[-1], mixture) == "0 is used up; the data end"
    assert make_mixture([1000, 10**6], **asked).end == 1_004_000


def test_stages_have_their_own_shares_from_their_first_item_on() -> None:
    stages = (MixtureStage(weights=(1, 1, 2), from_step=1), MixtureStage(weights=(0, 0, 1), from_fraction=0.9))
    mixture = make_mixture([5000] * 3, weights=(3, 1, 0), stages=stages, stage_items=(7_777, 31_000))
    assert mixture.counts(7_777) == pytest.approx([5833, 1944, 0], abs=2)
    second = np.array(mixture.counts(31_000)) - mixture.counts(7_777)
    assert second / second.sum() == pytest.approx([0.25, 0.25, 0.5], abs=1e-4)
    assert (np.array(mixture.counts(40_000)) - mixture.counts(31_000)).tolist() == [0, 0, 9_000]
    assert [(change.item, change.stage) for change in mixture.changes] == [(7_777, 1), (31_000, 2)]
    words = change_in_words(mixture.changes[0], mixture)
    assert words == "stage 1 begins; sequences from now on: 0 25.00%, 1 25.00%, 2 50.00%"


def test_until_the_run_knows_its_length_the_first_stage_goes_on() -> None:
    stages = (MixtureStage(weights=(0, 1), from_fraction=0.5),)
    mixture = make_mixture([5000] * 2, weights=(1, 0), stages=stages)
    assert not mixture.is_settled
    assert mixture.counts(100_000) == [100_000, 0]


def test_weights_may_count_tokens_or_documents() -> None:
    """The second source has half as many tokens in a sequence, and four times as many documents."""
    sizes = [Amount(tokens=256_000, documents=500), Amount(tokens=128_000, documents=2000)]
    for unit, asked in (("tokens", [1 / 3, 2 / 3]), ("documents", [0.8, 0.2])):
        mixture = make_mixture([1000, 1000], amounts=sizes, weights=(1, 1), by=unit)
        assert mixture.shares(0) == pytest.approx(asked)
        assert [row["share"] for row in source_rows(mixture, 30_000)] == pytest.approx([0.5, 0.5], abs=1e-3)


def test_a_share_of_less_than_a_sequence_in_a_block_is_kept_over_many() -> None:
    mixture = make_mixture([100, 100], weights=(1, 1e-5), by="tokens")
    assert mixture.counts(10_000_000)[1] == pytest.approx(100, abs=1)


def test_many_small_sources_never_get_a_negative_quota() -> None:
    weights = (*[0.7] * 150, 1.0)
    mixture = make_mixture([50] * 151, weights=weights, max_epochs=(None, *[3.0] * 150))
    counts = mixture.counts(2_000_000)
    assert counts[1:] == [150] * 150
    assert sum(counts) == 2_000_000


def test_the_order_of_a_mixture_is_the_one_of_every_release() -> None:
    stages = (MixtureStage(weights=(1, 1, 1), from_step=1),)
    asked: dict[str, Any] = {"weights": (5, 1, 2.5), "max_epochs": (None, 30.0, 1.5), "stages": stages}
    order = make_order([190_000, 31, 4000], seed=1337, by="tokens", stage_items=(12_000,), **asked)
    places = order.locate(span(9_950, 31_000))
    assert _digest(places) == GOLDEN_PLACES


def _digest(places: Places) -> str:
    from hashlib import sha256

    return sha256(np.stack(places).astype("<i8").tobytes()).hexdigest()


GOLDEN_PLACES = "f28c4be4fbbec479b37fcbb57adb87699f9f8f2e63815fcd448045e0db3b0a29"


def test_another_seed_gives_another_order_and_the_same_shares() -> None:
    one, other = (make_mixture([9000] * 2, seed=seed, weights=(1, 1), by="tokens") for seed in (1, 2))
    sources = [mixture.locate(span(0, 20_000))[0] for mixture in (one, other)]
    assert np.count_nonzero(sources[0] != sources[1]) > 5_000
    assert one.counts(20_000) == other.counts(20_000) == [10_000, 10_000]


def test_any_position_of_ten_billion_tokens_is_found_in_a_third_of_a_second() -> None:
    """Of twenty sources with limits and three stages, at 1,024 tokens a sequence, in seconds of a core."""
    sequences = [10_000 * (number + 1) ** 2 // 3 for number in range(20)]
    weights = tuple(float(number % 7 + 1) for number in range(20))
    stages = tuple(MixtureStage(weights=weights[number:] + weights[:number], from_step=1) for number in (3, 7, 11))
    seconds = []
    for item in (9_765_000, 5_000_000, 8_000_000):
        begin = time.process_time()
        order = make_order(
            sequences,
            weights=weights,
            by="tokens",
            max_epochs=(4.0,) * 20,
            stages=stages,
            stage_items=(2_000_000, 5_000_000, 9_000_000),
        )
        order.locate(span(item, item + 64))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.3


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": (2.0, 1.0)},
        {"by": "documents"},
        {"max_epochs": (2.0, None)},
        {"at_limit": "stop", "max_epochs": (3.0, None)},
        {"stages": (MixtureStage(weights=(1, 1), from_step=10),)},
    ],
)
def test_the_fingerprint_of_a_mixture_changes_with_what_is_asked(changed: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"weights": (1.0, 1.0), **BY_TOKENS, "max_epochs": (3.0, None)}
    assert MixtureSpec(**asked).identity != MixtureSpec(**{**asked, **changed}).identity
    assert MixtureSpec(**asked).identity == MixtureSpec(**asked, names=("a", "b"), stage_items=(7,)).identity
