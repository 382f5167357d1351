"""Batches of rows: what is in them, on which rank, from which item on; and that packing changes no loss."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.contracts import IGNORE_INDEX, PADDING_DOCUMENT, Batch, Model, TrainingData
from llmtrain.data.batches import DataFacts, TrainingSet, ValidationSet
from llmtrain.data.chat.cache import SampleStore, ensure_samples
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.sample import Sample
from llmtrain.data.mixture import MixtureSpec
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.training.step import agree, compute_gradients
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_decoder
from tests.support.tiny_huggingface import tiny_huggingface

SEQ_LEN = 48
PAD = 3
"""A token that rows use as well."""
NUM_ROWS = 150


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SampleStore:
    return ensure_samples(tmp_path_factory.mktemp("cache") / "samples", key={}, make=lambda: make_samples(NUM_ROWS))


def make_samples(num_rows: int, *, name: str = "rows", seed: int = 0) -> list[Sample]:
    """Rows of 2 to SEQ_LEN random tokens, most of them short; the second half of each is supervised, and some more."""
    generator = np.random.default_rng(seed)
    samples = []
    for number in range(num_rows):
        length = int(np.clip(generator.lognormal(2.2, 0.8), 2, SEQ_LEN))
        supervised = (np.arange(length) >= length // 2) | (generator.random(length) < 0.1)
        ids = generator.integers(0, TINY_VOCAB_SIZE, length, dtype=np.int32)
        samples.append(Sample(ids, supervised, f"{name}.jsonl:{number + 1}"))
    return samples


def make_items(*stores: SampleStore, **keys: Any) -> RowItems:
    settings: dict[str, Any] = {"mixture": None, "seed": 1, "packing": True, "mask_documents": True}
    return RowItems(stores=stores, seq_len=SEQ_LEN, pad_id=PAD, **(settings | keys))


def make_facts(*stores: SampleStore) -> DataFacts:
    return DataFacts(
        name="rows",
        vocab_size=TINY_VOCAB_SIZE,
        eos_id=PAD,
        num_tokens=sum(store.manifest.tokens for store in stores),
        num_bytes=None,
        tokenizer=None,
        tokenizer_sha256=None,
    )


def make_data(
    *stores: SampleStore, rank: int = 0, world_size: int = 1, num_workers: int = 0, **keys: Any
) -> TrainingSet:
    return TrainingSet(
        facts=make_facts(*stores),
        items=make_items(*stores, **keys),
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )


def make_validation(store: SampleStore, *, packing: bool) -> ValidationSet:
    return ValidationSet(facts=make_facts(store), items=make_items(store, packing=packing))


def take(data: TrainingSet, start: int, end: int, *, batch: int = 8, micro: int = 2) -> list[list[Batch]]:
    with closing(data.batches(start_item=start, batch_size=batch, end_item=end, micro_batch_size=micro)) as batches:
        return list(batches)


def same(one: Sequence[Sequence[Batch]], other: Sequence[Sequence[Batch]]) -> bool:
    if list(map(len, one)) != list(map(len, other)):
        return False
    pairs = [(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)]
    return all(a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) for a, b in pairs)  # type: ignore[literal-required]


def sequences(micro_batches: Sequence[Batch]) -> Counter[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Inputs and labels of the sequences that are not padding alone, without the padding at their ends."""
    found: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    for batch in micro_batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            supervised = (labels != IGNORE_INDEX).nonzero()
            if len(supervised):
                end = int(supervised[-1]) + 2
                found[tuple(ids[:end].tolist()), tuple(labels[:end].tolist())] += 1
    return found


def expected_labels(sample: Sample) -> list[int]:
    following = zip(sample.input_ids[1:].tolist(), sample.supervised[1:].tolist(), strict=True)
    return [token if supervised else IGNORE_INDEX for token, supervised in following] + [IGNORE_INDEX]


def test_a_training_set_of_rows_meets_the_contract(store: SampleStore) -> None:
    data: TrainingData = make_data(store)
    packs, rows = make_data(store), make_data(store, packing=False)
    assert data.items_per_epoch == packs.items_per_epoch < rows.items_per_epoch == NUM_ROWS
    assert packs.facts.num_tokens == store.manifest.tokens


def test_workers_that_read_ahead_import_no_torch() -> None:
    program = "import sys, llmtrain.data.chat.items; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_packs_hold_each_row_once_with_labels_that_never_cross_rows(store: SampleStore) -> None:
    data = make_data(store)
    seen: Counter[str] = Counter()
    steps = take(data, 0, data.items_per_epoch, batch=1, micro=1)
    for item, (batch,) in enumerate(steps):
        assert {name: tensor.dtype for name, tensor in batch.items()} == {  # type: ignore[attr-defined]
            "input_ids": torch.int64,
            "labels": torch.int64,
            "document_ids": torch.int32,
            "cu_seqlens": torch.int32,
            "lengths": torch.int64,
            "supervised": torch.int64,
        }
        begin = 0
        sources = data.rows_of(item)
        for document, source in enumerate(sources):
            sample = store[int(source.split(":")[1]) - 1]
            assert sample.source == source
            end = begin + len(sample.input_ids)
            assert batch["input_ids"][0, begin:end].tolist() == sample.input_ids.tolist()
            assert batch["labels"][0, begin:end].tolist() == expected_labels(sample)
            assert set(batch["document_ids"][0, begin:end].tolist()) == {document}
            assert batch["cu_seqlens"][document : document + 2].tolist() == [begin, end]
            begin = end
        assert batch["input_ids"].shape == (1, SEQ_LEN)
        assert batch["lengths"].tolist() == [begin]
        assert set(batch["cu_seqlens"][len(sources) + 1 :].tolist()) <= {SEQ_LEN}
        assert set(batch["input_ids"][0, begin:].tolist()) <= {PAD}
        assert set(batch["labels"][0, begin:].tolist()) <= {IGNORE_INDEX}
        assert set(batch["document_ids"][0, begin:].tolist()) <= {PADDING_DOCUMENT}
        seen.update(sources)
    assert seen == dict.fromkeys((f"rows.jsonl:{number + 1}" for number in range(NUM_ROWS)), 1)


@pytest.mark.parametrize(("micro", "multiple"), [(5, 8), (4, 2), (8, 1)])
def test_single_rows_are_padded_to_the_longest_of_the_micro_batch(
    store: SampleStore, micro: int, multiple: int
) -> None:
    """And until there are a multiple of 8 tokens."""
    data = make_data(store, packing=False)
    positions, seen = 0, Counter[tuple[tuple[int, ...], tuple[int, ...]]]()
    for micro_batches in take(data, 0, NUM_ROWS, batch=3 * micro, micro=micro):
        for batch in micro_batches:
            assert batch.keys() == {"input_ids", "labels", "lengths", "supervised"}  # a row is one document
            width = batch["input_ids"].shape[1]
            last = [(labels != IGNORE_INDEX).nonzero()[-1:].flatten() for labels in batch["labels"]]
            longest = max(int(each) + 2 for each in torch.cat(last))  # the last token of a row is supervised
            assert longest <= width < longest + multiple
            assert width % multiple == 0
            positions += batch["labels"].numel()
        seen += sequences(micro_batches)
    expected = Counter((tuple(one.input_ids.tolist()), tuple(expected_labels(one))) for one in samples_of(store))
    assert {ids for ids, _ in seen} == {ids for ids, _ in expected}
    assert seen.total() == NUM_ROWS
    assert positions < 1.6 * store.manifest.tokens  # rounding up to 8 is most of it: rows have 10 tokens


def samples_of(store: SampleStore) -> list[Sample]:
    return [store[index] for index in range(len(store))]


def test_a_pad_token_that_rows_use_is_supervised_where_they_do(store: SampleStore) -> None:
    learned = sum(int((sample.input_ids[1:][sample.supervised[1:]] == PAD).sum()) for sample in samples_of(store))
    assert learned > 5
    for packing in (True, False):
        data = make_data(store, packing=packing)
        steps = take(data, 0, data.items_per_epoch)
        assert sum(int((batch["labels"] == PAD).sum()) for step in steps for batch in step) == learned


@given(start=st.integers(0, 400), steps=st.integers(1, 4), packing=st.booleans())
@settings(max_examples=20, deadline=None)
def test_beginning_at_an_item_equals_going_on_to_it(store: SampleStore, start: int, steps: int, packing: bool) -> None:
    data = make_data(store, packing=packing)
    went_on = list(islice(take(data, start % 8, start + 8 * steps), start // 8, None))
    assert same(went_on, take(make_data(store, packing=packing), start, start + 8 * steps))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_s_own_items_are_those_of_its_sequences(store: SampleStore, rank: int) -> None:
    data, alone = make_data(store, rank=rank, world_size=3), make_data(store)
    (step,) = take(data, 5, 16, batch=11)
    items = data.own_items(range(5, 16))
    assert sequences(step) == sum((sequences(take(alone, i, i + 1, batch=1, micro=1)[0]) for i in items), Counter())
    assert len(items) in (3, 4)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_compute_the_batch_in_as_many_micro_batches(
    store: SampleStore, world_size: int, packing: bool
) -> None:
    whole = take(make_data(store, packing=packing), 5, 5 + 8 * 9 + 3)
    ranks = [
        take(make_data(store, packing=packing, rank=rank, world_size=world_size), 5, 5 + 8 * 9 + 3)
        for rank in range(world_size)
    ]
    assert len(whole) == 10
    for step, (expected, *parts) in enumerate(zip(whole, *ranks, strict=True)):
        assert len({len(part) for part in parts}) == 1
        merged = sum((sequences(part) for part in parts), Counter())
        assert merged == sequences(expected)
        assert merged.total() == (3 if step == 9 else 8)
        sizes = [sequences(part).total() for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("packing", [True, False])
def test_the_items_do_not_depend_on_the_batch_size_or_the_workers(store: SampleStore, packing: bool) -> None:
    data = make_data(store, packing=packing)
    found = [
        sum((sequences(step) for step in take(data, 0, 48, batch=batch, micro=micro)), Counter())
        for batch, micro in ((1, 1), (6, 2), (16, 8), (48, 48))
    ]
    assert all(each == found[0] for each in found)
    in_thread = take(data, 0, 48)
    assert same(in_thread, take(replace(data, num_workers=2), 0, 48))


def test_an_epoch_goes_on_into_the_next(store: SampleStore) -> None:
    data = make_data(store, packing=False)
    rows = sum((sequences(step) for step in take(data, 0, 2 * NUM_ROWS, batch=16, micro=4)), Counter())
    assert rows.total() == 2 * NUM_ROWS
    first = sum((sequences(step) for step in take(data, 0, NUM_ROWS)), Counter())
    assert rows == first + first
    assert len(take(data, 0, 2 * NUM_ROWS, batch=16, micro=4)) == 19


def test_weighted_lists_are_mixed_and_named(store: SampleStore, tmp_path: Path) -> None:
    other = ensure_samples(tmp_path / "other", key={}, make=lambda: make_samples(40, name="other", seed=1))
    data = make_data(store, other, mixture=MixtureSpec(weights=(1.0, 3.0)), packing=False)
    assert data.items_per_epoch == NUM_ROWS + 40
    names = Counter(data.rows_of(item)[0].split(".")[0] for item in range(2000))
    assert names["other"] == pytest.approx(1500, abs=60)
    ((batch,),) = take(data, 7, 8, batch=1, micro=1)
    name, line = data.rows_of(7)[0].split(".jsonl:")
    sample = {"rows": store, "other": other}[name][int(line) - 1]
    assert batch["labels"][0, : len(sample.input_ids)].tolist() == expected_labels(sample)


def test_the_fingerprint_says_whether_an_item_is_still_the_same(store: SampleStore, tmp_path: Path) -> None:
    data = make_data(store)
    other = ensure_samples(tmp_path / "other", key={}, make=lambda: make_samples(NUM_ROWS, seed=1))
    moved = ensure_samples(tmp_path / "moved", key={}, make=lambda: make_samples(NUM_ROWS, name="elsewhere/rows"))
    assert data.fingerprint == make_data(moved).fingerprint == make_data(store, rank=1, world_size=2).fingerprint
    changed = [
        make_data(other),
        make_data(store, packing=False),
        make_data(store, other, mixture=MixtureSpec(weights=(1.0, 1.0))),
    ]
    assert len({data.fingerprint, *(each.fingerprint for each in changed)}) == 4


@pytest.mark.parametrize(
    ("packing", "golden"),
    [
        (True, "347d2d185f7e35428ab9d099aa1fed6d3e8d341bad6b50b743c433074ab3e1ec"),
        (False, "7f22eabf50f0d7f43f23d5c7bd73363e563476d52289a80ff3567ab75710813c"),
    ],
)
def test_the_fingerprint_is_the_one_that_older_runs_recorded(packing: bool, golden: str, tmp_path: Path) -> None:
    """Else these could not be resumed."""

    def samples(first: int) -> list[Sample]:
        return [
            Sample(np.arange(first, first + size, dtype=np.int32), np.arange(size) > 0, f"rows.jsonl:{size}")
            for size in (2, 3, 5)
        ]

    stores = [ensure_samples(tmp_path / str(first), key={}, make=lambda f=first: samples(f)) for first in (1, 7)]  # type: ignore[misc]
    assert make_data(*stores, mixture=MixtureSpec(weights=(1.0, 2.5)), packing=packing).fingerprint == golden


def test_packs_are_made_once_for_all_readers(store: SampleStore) -> None:
    items = make_items(store)
    packs = items.packs
    items.open(shuffled=True)
    assert items.packs is packs
    assert pickle.loads(pickle.dumps(items)).__dict__["packs"][0].slots.tolist() == packs[0].slots.tolist()


# -- validation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_has_each_row_once_over_all_ranks(store: SampleStore, world_size: int, packing: bool) -> None:
    data = make_validation(store, packing=packing)
    ranks = [
        list(data.evaluation_batches(batch_size=4, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    learned = Counter(label for batches in ranks for batch in batches for label in batch["labels"].flatten().tolist())
    del learned[IGNORE_INDEX]
    expected = Counter(label for sample in samples_of(store) for label in expected_labels(sample))
    del expected[IGNORE_INDEX]
    assert learned == expected
    if not packing:
        assert sum((sequences(batches) for batches in ranks), Counter()).total() == data.num_items == NUM_ROWS


@pytest.mark.parametrize("packing", [True, False])
def test_a_part_of_the_validation_is_the_same_for_any_number_of_ranks(store: SampleStore, packing: bool) -> None:
    data = make_validation(store, packing=packing)
    found = []
    for world_size in (1, 2):
        batches = [
            batch
            for rank in range(world_size)
            for batch in data.evaluation_batches(batch_size=4, max_batches=4, rank=rank, world_size=world_size)
        ]
        assert len(batches) == 4
        found.append(sequences(batches))
    assert found[0] == found[1]
    assert found[0].total() == 16


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_of(model: Model, steps: Sequence[Sequence[Batch]]) -> tuple[float, int]:
    with torch.no_grad():
        results = [model(batch) for step in steps for batch in step]
    return sum(float(loss) for loss, _ in results), sum(int(count) for _, count in results)


@pytest.mark.parametrize("encoding", ["rope", "alibi", "none"])
@pytest.mark.parametrize(
    "attention",
    [
        {"variant": "mha"},
        {"variant": "gqa", "num_kv_heads": 2},
        {"variant": "mqa"},
        {"variant": "complex"},
        {"variant": "mha", "mask": "sliding_window", "window": 5},
    ],
    ids=["mha", "gqa", "mqa", "complex", "window"],
)
def test_the_loss_with_packing_equals_the_loss_without(
    store: SampleStore, encoding: str, attention: dict[str, Any]
) -> None:
    model = tiny_decoder(attention=attention, positional={"encoding": encoding})
    packs, rows = make_data(store), make_data(store, packing=False)
    packed = loss_of(model, take(packs, 0, packs.items_per_epoch, batch=4, micro=4))
    single = loss_of(model, take(rows, 0, NUM_ROWS, batch=10, micro=10))
    alone = loss_of(model, take(rows, 0, NUM_ROWS, batch=1, micro=1))
    assert packed[1] == single[1] == alone[1]
    assert packed[0] / packed[1] == pytest.approx(alone[0] / alone[1], abs=1e-5)
    assert single[0] / single[1] == pytest.approx(alone[0] / alone[1], abs=1e-5)
    together = make_data(store, mask_documents=False)
    seen = loss_of(model, take(together, 0, together.items_per_epoch, batch=4, micro=4))
    assert abs(seen[0] / seen[1] - alone[0] / alone[1]) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_model_of_transformers_has_the_same_loss_with_packing(
    store: SampleStore, family: str, attention: str
) -> None:
    model = tiny_huggingface(family, attention=attention)
    packs, rows = make_data(store), make_data(store, packing=False)
    packed = loss_of(model, take(packs, 0, packs.items_per_epoch, batch=4, micro=4))
    alone = loss_of(model, take(rows, 0, NUM_ROWS, batch=1, micro=1))
    single = loss_of(model, take(rows, 0, NUM_ROWS, batch=10, micro=10))
    assert packed[1] == single[1] == alone[1]
    assert packed[0] / packed[1] == pytest.approx(alone[0] / alone[1], abs=1e-5)
    assert single[0] / single[1] == pytest.approx(alone[0] / alone[1], abs=1e-5)


@pytest.fixture(scope="module")
def engine() -> Engine:
    distributed = DistributedConfig()
    resolved = resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)
    return Engine(resolved, distributed=distributed)


@pytest.mark.parametrize("packing", [True, False])
def test_16_by_1_equals_1_by_16_with_rows_of_unequal_length_and_a_short_last_step(
    store: SampleStore, engine: Engine, packing: bool
) -> None:
    data = make_data(store, packing=packing)
    end = 2 * 16 + 5
    found = []
    for micro in (16, 1, 3):
        model = engine.setup(tiny_decoder().train())
        losses, gradients = [], []
        for micro_batches in take(data, 0, end, batch=16, micro=micro):
            num_tokens = agree(micro_batches, engine=engine, stop_requested=False).num_tokens
            loss_sum = compute_gradients(model, micro_batches, engine=engine, num_tokens=num_tokens)
            losses.append(loss_sum.item() / num_tokens)
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
            model.zero_grad()
        found.append((losses, gradients))
    (expected, expected_gradients), *others = found
    assert len(expected) == 3
    for losses, gradients in others:
        assert losses == pytest.approx(expected, abs=1e-5)
        for left, right in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_reads_each_token_of_the_rows_and_no_padding(
    store: SampleStore, engine: Engine, packing: bool
) -> None:
    data = make_data(store, packing=packing)
    steps = take(data, 0, data.items_per_epoch, batch=5, micro=2)
    agreed = [agree(micro_batches, engine=engine, stop_requested=False) for micro_batches in steps]
    assert sum(one.num_read for one in agreed) == int(store.lengths.sum())
    assert sum(one.num_tokens for one in agreed) < int(store.lengths.sum())
