"""Batches: what is in them, on which rank, from which item on. The data are real shards unless said otherwise."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.config.sections.data import SyntheticConfig, TokensConfig
from llmtrain.config.sections.sources import Source
from llmtrain.contracts import IGNORE_INDEX, Batch, TrainingData
from llmtrain.data.batches import TrainingSet, ValidationSet
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.data.mixture import MixtureSpec
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.data.windows import WindowItems, document_ids
from tests.support.token_shards import cut_stream, write_token_shards

SEQ_LEN = 16
NUM_TOKENS = 3001
"""Of which the last window has 3000 mod 16 = 8 to predict."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of [1, 50000), all different, so that each tells where it stands; every 37th or so is an end token."""
    folder = tmp_path_factory.mktemp("data")
    write_token_shards(folder, {"train": cut_stream(stream()), "val": cut_stream(stream(700))}, vocab_size=50_000)
    other = [10_000 + token if token else 0 for token in stream(900)]
    write_token_shards(folder / "other", {"train": cut_stream(other)}, vocab_size=50_000)
    return folder


def stream(count: int = NUM_TOKENS) -> list[int]:
    return [0 if index % 37 == 36 else index + 1 for index in range(count)]


def open_data(shards: Path, *, rank: int = 0, world_size: int = 1, seed: int = 1, **keys: object) -> TrainingSet:
    config = TokensConfig.model_validate({"train": str(shards / "train"), "seq_len": SEQ_LEN, **keys})
    return open_training_data(config, seed=seed, rank=rank, world_size=world_size)


def take(data: TrainingSet, start: int, end: int, *, batch: int = 4, micro: int = 2) -> list[list[Batch]]:
    return list(data.batches(start_item=start, batch_size=batch, end_item=end, micro_batch_size=micro))


def real_rows(micro_batches: Sequence[Batch]) -> list[list[int]]:
    """Inputs and labels of the rows that are not padding alone, as one list of numbers each."""
    return [
        [*ids.tolist(), *labels.tolist()]
        for batch in micro_batches
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if bool((labels != IGNORE_INDEX).any())
    ]


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The same, for those who go through all of its tensors."""
    found = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    return found | {"document_ids": batch["document_ids"]} if "document_ids" in batch else found


def same(one: Sequence[Sequence[Batch]], other: Sequence[Sequence[Batch]]) -> bool:
    if list(map(len, one)) != list(map(len, other)):
        return False
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    return all(
        tensors(a).keys() == tensors(b).keys() and all(torch.equal(t, tensors(b)[n]) for n, t in tensors(a).items())
        for a, b in pairs
    )


def test_a_training_set_of_tokens_meets_the_contract(shards: Path) -> None:
    data: TrainingData = open_data(shards)
    assert data.items_per_epoch == 188


def test_the_loader_indexes_the_supervised_positions(shards: Path) -> None:
    """In the last step most of a window, and all of the padding, is not supervised."""
    validation = open_validation_data(TokensConfig(train=str(shards / "train"), val=str(shards / "val")), seed=1)
    assert validation is not None
    steps = [*take(open_data(shards), 150, 188, batch=6, micro=4), list(validation.evaluation_batches(batch_size=3))]
    for batch in chain.from_iterable(steps):
        assert batch["supervised"].tolist() == (batch["labels"] != IGNORE_INDEX).flatten().nonzero()[:, 0].tolist()


def test_pinned_batches_are_the_same_in_pinned_memory(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: set[int] = set()

    def pin(tensor: Tensor) -> Tensor:
        assert threading.current_thread().name == "llmtrain-data", "the loop need not wait for it"
        copy = tensor.clone()
        pinned.add(copy.data_ptr())
        return copy

    monkeypatch.setattr(Tensor, "pin_memory", pin)  # there is none without a GPU
    data = open_data(shards)
    found, plain = take(replace(data, pinned=True), 0, 12), take(data, 0, 12)
    assert same(found, plain)
    assert pinned == {tensor.data_ptr() for step in found for batch in step for tensor in batch.values()}  # type: ignore[attr-defined]


def test_batches_have_the_contracts_shapes_and_types(shards: Path) -> None:
    for step in take(open_data(shards), 0, 400, batch=6, micro=4):
        for batch in step:
            assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors(batch).items()} == {
                "input_ids": ((4, SEQ_LEN), torch.int64),
                "labels": ((4, SEQ_LEN), torch.int64),
                "document_ids": ((4, SEQ_LEN), torch.int32),
            }
            assert all(tensor.is_contiguous() for tensor in tensors(batch).values())
            assert batch["cu_seqlens"].tolist() == cu_seqlens(batch["document_ids"].numpy()).tolist()
    assert "document_ids" not in take(open_data(shards, mask_documents=False), 0, 4)[0][0]


def test_every_token_but_the_first_is_predicted_once_an_epoch_from_all_before_it(shards: Path) -> None:
    tokens = stream()
    predicted: Counter[int] = Counter()
    for step in take(open_data(shards), 0, 188):
        for batch in step:
            for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                known = [label for label in labels if label != IGNORE_INDEX]
                if not known:
                    continue
                index = next(number for number in range(SEQ_LEN) if ids[number]) if ids[0] == 0 else 0
                begin = ids[index] - 1 - index
                assert begin % SEQ_LEN == 0
                assert ids[: len(known)] == tokens[begin : begin + len(known)]
                assert known == tokens[begin + 1 : begin + 1 + SEQ_LEN]
                assert labels[len(known) :] == [IGNORE_INDEX] * (SEQ_LEN - len(known))
                predicted.update(range(begin + 1, begin + 1 + len(known)))
    assert predicted == dict.fromkeys(range(1, NUM_TOKENS), 1)


def test_the_last_short_window_is_padded_with_the_end_token(shards: Path) -> None:
    config = TokensConfig(train="", val=str(shards / "train"), seq_len=SEQ_LEN)
    data = open_validation_data(config, seed=1)
    assert data is not None
    (batch,) = data.evaluation_batches(batch_size=188)
    assert batch["labels"][187].tolist() == stream()[2993:] + [IGNORE_INDEX] * 8
    assert batch["input_ids"][187].tolist() == stream()[2992:] + [0] * 7


@given(start=st.integers(0, 1000), steps=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_beginning_at_an_item_equals_going_on_to_it(shards: Path, start: int, steps: int) -> None:
    data = open_data(shards)
    went_on = list(islice(take(data, start % 4, start + 4 * steps), start // 4, None))
    assert same(went_on, take(data, start, start + 4 * steps))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["one pool", "weights", "epochs", "stages"])
def test_the_ranks_together_compute_the_batch(shards: Path, world_size: int, kind: str) -> None:
    train: list[object] = [str(shards / "train"), str(shards / "other/train")]
    if kind != "one pool":
        key = "epochs" if kind == "epochs" else "weight"
        train = [{"path": path, key: 2 - index} for index, path in enumerate(train)]
    keys: dict[str, Any] = {"train": train}
    if kind == "stages":
        keys["mixture"] = {"by": "documents", "max_epochs": 3, "stages": [{"from_step": 4, "weights": [0, 1]}]}

    def opened(**rank: int) -> TrainingSet:
        data = open_data(shards, **keys, **rank)
        return data.with_stages_at([57]) if kind == "stages" else data

    whole = take(opened(), 10, 10 + 7 * 12 + 2, batch=12, micro=3)
    ranks = [
        take(opened(rank=rank, world_size=world_size), 10, 10 + 7 * 12 + 2, batch=12, micro=3)
        for rank in range(world_size)
    ]
    assert [len(steps) for steps in ranks] == [len(whole)] * world_size == [8] * world_size
    for step, of_ranks in zip(whole, zip(*ranks, strict=True), strict=True):
        assert sorted(real_rows(step)) == sorted(row for rank in of_ranks for row in real_rows(rank))
        assert len({len(rank) for rank in of_ranks}) == 1


def test_a_rank_without_items_in_the_last_step_has_as_many_micro_batches_of_ignored_labels(shards: Path) -> None:
    steps = [take(open_data(shards, rank=rank, world_size=4), 0, 18, batch=16) for rank in range(4)]
    assert [[len(step) for step in rank] for rank in steps] == [[2, 1]] * 4
    assert [len(real_rows(rank[1])) for rank in steps] == [1, 1, 0, 0]
    empty = steps[3][1][0]
    assert empty["input_ids"].shape == (2, SEQ_LEN)
    assert bool((empty["labels"] == IGNORE_INDEX).all())


def test_changing_the_batch_size_on_the_way_keeps_the_sequence(shards: Path) -> None:
    data = open_data(shards)
    once = [row for step in take(data, 0, 300, batch=1, micro=1) for row in real_rows(step)]
    rows: list[list[int]] = []
    begin = 0
    for end, batch in ((40, 8), (70, 3), (198, 32), (300, 17)):
        for step in take(data, begin, end, batch=batch, micro=4):
            found = real_rows(step)
            assert sorted(found) == sorted(once[len(rows) : len(rows) + len(found)])
            rows += found
        begin = end
    assert len(rows) == 300


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_s_own_items_are_those_of_its_rows(shards: Path, rank: int) -> None:
    data, alone = open_data(shards, rank=rank, world_size=3), open_data(shards)
    (step,) = take(data, 10, 21, batch=11, micro=4)
    items = data.own_items(range(10, 21))
    rows = [row for item in items for row in real_rows(take(alone, item, item + 1, batch=1, micro=1)[0])]
    assert real_rows(step) == rows
    assert len(items) in (3, 4)


def test_an_epochs_last_batch_goes_on_into_the_next_epoch(shards: Path) -> None:
    steps = take(open_data(shards), 0, 3 * 188, batch=10, micro=10)
    assert [len(real_rows(step)) for step in steps] == [10] * 56 + [4]
    rows = Counter(tuple(row) for step in steps for row in real_rows(step))
    assert list(rows.values()) == [3] * 188


def test_every_epoch_has_its_own_order(shards: Path) -> None:
    rows = [tuple(real_rows(step)[0]) for step in take(open_data(shards), 0, 3 * 188, batch=1)]
    epochs = [rows[begin : begin + 188] for begin in (0, 188, 376)]
    assert [len(set(epoch)) for epoch in epochs] == [188] * 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert sum(map(tuple.__eq__, epochs[one], epochs[other])) < 10


def test_workers_and_no_workers_give_identical_batches(shards: Path) -> None:
    without, with_two = (take(open_data(shards, num_workers=n), 7, 250, batch=6, micro=4) for n in (0, 2))
    assert len(without) == 41
    assert same(without, with_two)


def test_another_seed_gives_another_order_of_the_same_rows(shards: Path) -> None:
    one, other = (take(open_data(shards, seed=seed), 0, 188) for seed in (1, 2))
    assert not same(one, other)
    assert sorted(row for step in one for row in real_rows(step)) == sorted(
        row for step in other for row in real_rows(step)
    )


def test_mixtures_draw_by_weight(shards: Path) -> None:
    train = [
        {"path": str(shards / "train"), "weight": 0.75},
        {"path": str(shards / "other/train"), "weight": 0.25},
    ]
    data = open_data(shards, train=train)
    assert data.items_per_epoch == 188 + 57
    assert data.facts.num_tokens == NUM_TOKENS + 900
    rows = [row for step in take(data, 0, 10_000, batch=500, micro=500) for row in real_rows(step)]
    of_other = sum(max(row[:SEQ_LEN]) > 10_000 for row in rows)
    assert (len(rows), of_other) == (10_000, 2_500)


def test_a_data_set_of_one_window_works(tmp_path: Path) -> None:
    write_token_shards(tmp_path, {"train": [[[[5, 6, 0]]]]})
    data = open_data(tmp_path)
    assert data.items_per_epoch == 1
    for step in take(data, 0, 9, batch=3, micro=3):
        (batch,) = step
        assert batch["input_ids"][:, :3].tolist() == [[5, 6, 0]] * 3
        assert batch["labels"][:, :4].tolist() == [[6, 0, IGNORE_INDEX, IGNORE_INDEX]] * 3


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_document_ids_equal_a_naive_count(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=5))
    expected = []
    for row in rows:
        number, numbers = 0, []
        for token in row:
            numbers.append(number)
            number += token == 2
        expected.append(numbers)
    found = document_ids(np.array(rows, dtype=np.int64), 2)
    assert found.tolist() == expected
    assert found.dtype == np.int32


def val_rows(data: ValidationSet, *, world_size: int, max_batches: int | None, batch: int = 4) -> list[list[list[int]]]:
    ranks = [
        list(data.evaluation_batches(batch_size=batch, max_batches=max_batches, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch_["input_ids"].shape == (batch, SEQ_LEN) for batches in ranks for batch_ in batches)
    return [real_rows(batches) for batches in ranks]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_evaluation_takes_each_window_once_whatever_the_ranks(shards: Path, world_size: int) -> None:
    config = TokensConfig(train=str(shards / "train"), val=str(shards / "val"), seq_len=SEQ_LEN)
    data = open_validation_data(config, seed=1)
    assert data is not None
    everything = val_rows(data, world_size=1, max_batches=None)[0]
    assert len(everything) == 44 == data.num_items
    assert [label for row in everything for label in row[SEQ_LEN:] if label != IGNORE_INDEX] == stream(700)[1:]
    assert [row for rank in val_rows(data, world_size=world_size, max_batches=None) for row in rank] == everything
    some = [row for rank in val_rows(data, world_size=world_size, max_batches=3) for row in rank]
    assert some == [everything[number * 44 // 12] for number in range(12)]
    assert [row for rank in val_rows(data, world_size=world_size, max_batches=100) for row in rank] == everything


def test_synthetic_items_are_a_pure_function_of_seed_and_item() -> None:
    config = SyntheticConfig(seq_len=SEQ_LEN, vocab_size=100, num_items=50, num_val_items=10)
    data, again, other = (open_training_data(config, seed=seed) for seed in (1, 1, 2))
    facts = data.facts
    assert (data.items_per_epoch, facts.vocab_size, facts.eos_id, facts.tokens_per_byte) == (50, 100, None, None)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    whole = [real_rows(step)[0] for step in take(data, 0, 100, batch=1, micro=1)]
    assert [real_rows(take(again, item, item + 1)[0])[0] for item in (0, 17, 99)] == [whole[n] for n in (0, 17, 99)]
    assert sorted(whole[:50]) == sorted(whole[50:])
    assert whole[:50] != whole[50:]
    assert real_rows(take(other, 0, 1)[0])[0] not in whole
    assert all(row[1:SEQ_LEN] == row[SEQ_LEN:-1] for row in whole)
    assert max(max(row) for row in whole) == 99
    assert "document_ids" not in take(data, 0, 1)[0][0]


def test_fingerprints_are_those_that_older_runs_recorded() -> None:
    """Else these could not be resumed."""
    synthetic = open_training_data(SyntheticConfig(seq_len=16, vocab_size=100, num_items=50), seed=1)
    assert synthetic.fingerprint == "edff1f46bc32ab11e95fcb6f7649d184a3fdb3108184b705b0eee101cae7143e"
    assert isinstance(synthetic.items, WindowItems)
    mixture = replace(
        synthetic.items, mixture=MixtureSpec(weights=(3.0, 1.0)), shuffle_chunks=8, content_sha256="0" * 64
    )
    assert mixture.fingerprint == "415c943956fb225e08aeacbb249ef48497d4f2e534ffe41a483531e2b8a4fc60"


def test_synthetic_validation_is_drawn_apart_from_training() -> None:
    config = SyntheticConfig(seq_len=SEQ_LEN, num_items=50, num_val_items=10)
    train, val = open_training_data(config, seed=1), open_validation_data(config, seed=1)
    assert val is not None
    held_out = val_rows(val, world_size=1, max_batches=None)[0]
    assert len({tuple(row) for row in held_out}) == 10
    assert not {tuple(row) for row in held_out} & {tuple(real_rows(s)[0]) for s in take(train, 0, 50, batch=1)}
    assert open_validation_data(config.model_copy(update={"num_val_items": 0}), seed=1) is None


def test_reading_is_faster_than_two_million_tokens_a_second(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 8192, 2_000_000)
    tokens[rng.random(len(tokens)) < 0.001] = 0
    write_token_shards(tmp_path, {"train": cut_stream(tokens.tolist(), group_tokens=1_000_000)}, vocab_size=8192)
    data = open_data(tmp_path, seq_len=256)
    speeds = []
    for _ in range(3):
        with closing(data.batches(start_item=5000, batch_size=16, end_item=10**9, micro_batch_size=16)) as batches:
            next(batches)
            begin = time.perf_counter()
            for _ in islice(batches, 500):
                pass
            speeds.append(500 * 16 * 256 / (time.perf_counter() - begin))
    assert max(speeds) > 2_000_000


def test_ten_billion_tokens_are_opened_anywhere_in_less_than_a_third_of_a_second() -> None:
    config = SyntheticConfig(seq_len=1024, num_items=10_000_000)
    data = open_training_data(config, seed=1)
    assert isinstance(data.items, WindowItems)
    data = replace(data, items=replace(data.items, shuffle_chunks=8))
    for item in (0, 5_000_000, 123_456_789):
        begin = time.process_time()
        with closing(
            data.batches(start_item=item, batch_size=16, end_item=item + 10**6, micro_batch_size=16)
        ) as batches:
            next(batches)
        assert time.process_time() - begin < 0.3


def test_sources_without_weights_are_one_pool_in_proportion_to_their_tokens(tmp_path: Path) -> None:
    sizes = {"large": 30_000, "small": 10_000}
    for number, (name, size) in enumerate(sizes.items(), 1):
        write_token_shards(tmp_path / name, {"train": cut_stream([*[number] * (size - 1), 0])})
    paths: list[Source] = [str(tmp_path / name / "train") for name in sizes]
    data = open_training_data(TokensConfig(train=paths, seq_len=10), seed=3)
    assert isinstance(data.items, WindowItems)
    assert (data.items.mixture, data.facts.num_tokens) == (None, 40_000)
    assert data.items_per_epoch == 4000
    seen = [
        int(batch["input_ids"][row, 4])
        for (batch,) in data.batches(start_item=0, batch_size=8, end_item=4000, micro_batch_size=8)
        for row in range(8)
    ]
    assert seen.count(1) == 3000
    for begin in range(0, 4000, 1000):
        assert 0.7 < seen[begin : begin + 1000].count(1) / 1000 < 0.8
