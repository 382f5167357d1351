"""Token shards in a store: the same tokens as on this machine, read once, and what happens when the store fails."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.data import TokensConfig
from llmtrain.data import remote_shards
from llmtrain.data.batches import Steps, TrainingSet
from llmtrain.data.range_cache import RangeCache
from llmtrain.data.remote_shards import Fetcher, RemoteShard
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.data.windows import WindowItems
from llmtrain.errors import ConfigError, Preempted
from llmtrain.storage._filesystem import FileSystemStore
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import forget_stores, open_store
from tests.support.counting_store import counted
from tests.support.token_shards import copy_to_store, cut_stream, write_token_shards
from tests.unit.data.test_shards import random_tokens

ADDRESS = "memory://shards/prepared"


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget the footers that tests have read at the same address, and what they copied."""
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path_factory.mktemp("copies")))
    yield
    remote_shards._read_footer.cache_clear()
    for entry in list(open_store(ADDRESS).list("prepared")):
        open_store(ADDRESS).delete(entry.key)
    forget_stores()


def make_shards(folder: Path, count: int = 5000, *, seed: int = 0) -> Path:
    train = cut_stream(random_tokens(count, seed=seed), group_tokens=300)
    write_token_shards(folder, {"train": train, "val": cut_stream(random_tokens(500, seed=seed + 1))})
    copy_to_store(folder, ADDRESS)
    return folder


def open_data(train: str | Path, cache: Path, **keys: Any) -> TrainingSet:
    rank, world_size = keys.pop("rank", 0), keys.pop("world_size", 1)
    config = TokensConfig(train=str(train), cache_dir=str(cache), **{"seq_len": 16, **keys})
    return open_training_data(config, seed=1, rank=rank, world_size=world_size)


def tokens_of(data: TrainingSet, *, start: int = 0, end: int = 64, batch_size: int = 8) -> list[Any]:
    batches = data.batches(start_item=start, batch_size=batch_size, end_item=end, micro_batch_size=4)
    with closing(batches):
        return [[micro["input_ids"].tolist(), micro["labels"].tolist()] for step in batches for micro in step]


@given(
    start=st.integers(0, 700),
    num_items=st.integers(1, 90),
    batch_size=st.integers(1, 20),
    cache_gb=st.sampled_from([0.0, 1e-9, 2e-6, 1.0]),
    shuffle_chunks=st.integers(1, 9),
    small=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_shards_in_a_store_are_read_as_the_same_shards_here_from_any_position_with_any_cache(
    tmp_path_factory: pytest.TempPathFactory,
    start: int,
    num_items: int,
    batch_size: int,
    cache_gb: float,
    shuffle_chunks: int,
    small: bool,
) -> None:
    folder = make_shards(tmp_path_factory.mktemp("here"))
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        if not small:
            patch.setattr("llmtrain.data.order.SMALL_TOKENS", 0)
            patch.setattr("llmtrain.data.order.CHUNK_TOKENS", 500)
        keys = {"cache_gb": cache_gb, "shuffle_chunks": shuffle_chunks}
        here, there = (open_data(train, cache, **keys) for train in (folder / "train", f"{ADDRESS}/train"))
        assert there.fingerprint == here.fingerprint
        for data in (here, there):
            assert data.items_per_epoch == 313
        wanted = {"start": start, "end": start + num_items, "batch_size": batch_size}
        assert tokens_of(there, **wanted) == tokens_of(here, **wanted)


def test_facts_and_validation_data_come_from_the_manifest_in_the_store(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "here")
    config = TokensConfig(
        train=f"{ADDRESS}/train", val=f"{ADDRESS}/val/", cache_dir=str(tmp_path / "cache"), seq_len=16
    )
    local = TokensConfig(train=str(folder / "train"), val=str(folder / "val"), seq_len=16)
    there, here = open_validation_data(config, seed=1), open_validation_data(local, seed=1)
    assert there is not None
    assert here is not None
    assert (there.facts.num_tokens, there.facts.num_bytes, there.facts.vocab_size) == (500, 1500, 256)
    batches = [list(data.evaluation_batches(batch_size=3, max_batches=5)) for data in (there, here)]
    assert [batch["input_ids"].tolist() for batch in batches[0]] == [
        batch["input_ids"].tolist() for batch in batches[1]
    ]


def test_a_file_a_list_and_weights_may_be_addresses_and_paths(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "here")
    train = sorted((folder / "train").iterdir())
    one = open_data(f"{ADDRESS}/train/{train[1].name}", tmp_path / "cache")
    assert tokens_of(one) == tokens_of(open_data(train[1], tmp_path / "cache"))
    first, second = train[:2]
    for mixed in ([f"{ADDRESS}/train/{first.name}", str(second)], [str(first), f"{ADDRESS}/train/{second.name}"]):
        config = TokensConfig(train=[*mixed], cache_dir=str(tmp_path / "cache"), seq_len=16)
        here = TokensConfig(train=[str(first), str(second)], seq_len=16)
        assert tokens_of(open_training_data(config, seed=1)) == tokens_of(open_training_data(here, seed=1))


def test_globs_of_folders_and_of_shards_are_those_of_the_same_files_here(tmp_path: Path) -> None:
    for name, seed in (("part-1", 0), ("part-2", 5)):
        make_shards(tmp_path / "prepared" / name, seed=seed)
        copy_to_store(tmp_path / "prepared" / name, f"{ADDRESS}/{name}")
    for pattern in ("part-*/train", "part-1/train/shard_0000[02].parquet", "**/shard_00001.parquet"):
        if pattern.startswith("**"):  # of both splits, so that one is named
            pattern = f"*/train/{pattern}"
        there = open_data(f"{ADDRESS}/{pattern}", tmp_path / "cache")
        here = open_data(f"{tmp_path}/prepared/{pattern}", tmp_path / "cache")
        assert there.fingerprint == here.fingerprint
        assert tokens_of(there) == tokens_of(here)
    with pytest.raises(ConfigError, match=r"data\.train: .* holds the splits train and val, which must not be mixed"):
        open_data(f"{ADDRESS}/part-1/*", tmp_path / "cache")


def test_a_glob_of_shards_takes_one_list_more_than_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "here")
    calls = Counter[str]()

    def count(name: str) -> None:
        call = getattr(FileSystemStore, name)

        def counting(store: FileSystemStore, key: str) -> Any:
            calls[name] += 1
            return call(store, key)

        monkeypatch.setattr(FileSystemStore, name, counting)

    count("list")
    count("stat")
    asked = []
    for place in ("train", "train/*.parquet"):
        calls.clear()
        open_data(f"{ADDRESS}/{place}", tmp_path / "cache")
        asked.append(dict(calls))
    assert asked[1] == {**asked[0], "list": asked[0]["list"] + 1}


def test_what_the_cache_holds_is_not_read_from_the_store_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "here")
    with counted(monkeypatch) as first:
        whole = tokens_of(open_data(f"{ADDRESS}/train", tmp_path / "cache"), end=313)
    remote_shards._read_footer.cache_clear()  # as in another process
    with counted(monkeypatch) as second:
        assert tokens_of(open_data(f"{ADDRESS}/train", tmp_path / "cache"), end=313) == whole
    assert max(Counter(first.ranges).values()) == 1
    assert len(first.ranges) > 10
    assert second.ranges == []


def test_a_damaged_entry_of_the_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "here")
    whole = tokens_of(open_data(f"{ADDRESS}/train", tmp_path / "cache"), end=313)
    entries = [path for path in (tmp_path / "cache").rglob("entries/*") if path.name[0] != "o"]
    for path in entries:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    remote_shards._read_footer.cache_clear()
    with counted(monkeypatch) as again:
        assert tokens_of(open_data(f"{ADDRESS}/train", tmp_path / "cache"), end=313) == whole
    assert len(again.ranges) == len(entries)


@pytest.mark.parametrize("change", ["other size", "missing", "stranger"])
def test_objects_that_are_not_those_of_the_manifest_are_found_at_the_start(tmp_path: Path, change: str) -> None:
    folder = make_shards(tmp_path / "here")
    store, key = open_store(ADDRESS), "prepared/train/shard_00001.parquet"
    content = (folder / "train/shard_00001.parquet").read_bytes()
    if change == "other size":
        store.write(key, content + b"x")
    elif change == "missing":
        store.delete(key)
    else:
        store.write("prepared/train/shard_00099.parquet", content)
    said = {
        "other size": rf"{ADDRESS}/train/shard_00001\.parquet: has \d+ bytes, but the manifest says {len(content)}",
        "missing": rf"{ADDRESS}/train/shard_00001\.parquet: the manifest names this shard, but it is missing",
        "stranger": rf"{ADDRESS}/train/shard_00099\.parquet is not in its manifest\.json",
    }
    with pytest.raises(ConfigError, match=said[change]) as caught:
        open_data(f"{ADDRESS}/train", tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["tokens", "footer", "another shard", "shorter", "gone"])
def test_a_shard_that_changes_while_it_is_read_is_one_message_and_its_remains_are_not_kept(
    tmp_path: Path, change: str
) -> None:
    folder = make_shards(tmp_path / "here")
    data = open_data(f"{ADDRESS}/train", tmp_path / "cache")
    store, key = open_store(ADDRESS), "prepared/train/shard_00001.parquet"
    content = (folder / "train/shard_00001.parquet").read_bytes()
    changed = bytearray(content)
    if change == "tokens":
        changed[4:600] = bytes(596)
    elif change == "footer":
        changed[-200:-8] = bytes(192)
    elif change == "another shard":
        other = (folder / "val/shard_00000.parquet").read_bytes()
        changed[-len(other) :] = other[-len(content) :]
    elif change == "shorter":
        changed = changed[:100]
    if change == "gone":
        store.delete(key)
    else:
        store.write(key, bytes(changed))
    with pytest.raises(ConfigError, match=rf"^{ADDRESS}/train/shard_00001\.parquet: ") as caught:
        tokens_of(data, end=313)
    assert "it is not the shard that its manifest.json describes. Copy the shards there again" in str(caught.value)
    store.write(key, content)
    remote_shards._read_footer.cache_clear()
    here = tokens_of(open_data(folder / "train", tmp_path / "cache"), end=313)
    assert tokens_of(open_data(f"{ADDRESS}/train", tmp_path / "cache"), end=313) == here


def test_a_store_that_fails_in_the_middle_ends_the_run_with_a_message_that_says_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "here")
    data = open_data(f"{ADDRESS}/train", tmp_path / "cache", cache_gb=0)
    with counted(monkeypatch) as store:
        store.fail_after = 5
        with pytest.raises(Preempted, match=r"the store fails\. Start the run again: it goes on") as caught:
            tokens_of(data, end=313)
    assert caught.value.exit_code == 75


@pytest.mark.parametrize("path", [f"{ADDRESS}/nothing", "memory://shards", f"{ADDRESS}/train/missing.parquet"])
def test_an_address_without_shards_names_it_and_the_command(tmp_path: Path, path: str) -> None:
    make_shards(tmp_path / "here")
    with pytest.raises(ConfigError, match=rf"^data\.train: .*{path}") as caught:
        open_data(path, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_both_splits_at_an_address_are_not_mixed(tmp_path: Path) -> None:
    make_shards(tmp_path / "here")
    with pytest.raises(ConfigError, match=f"{ADDRESS} holds the splits train and val.*such as {ADDRESS}/train"):
        open_data(ADDRESS, tmp_path / "cache")


def test_a_fetcher_returns_each_thing_once_and_the_error_of_what_failed() -> None:
    calls: list[int] = []
    started = threading.Event()

    def fetch(number: int) -> bytes:
        calls.append(number)
        started.set()
        if number == 3:
            raise StorageError("no")
        return bytes([number])

    fetcher = Fetcher(fetch, num_threads=2)
    for number in (1, 2, 3, 1):
        fetcher.request(number)
    assert started.wait(10)
    assert (fetcher.take(2), fetcher.take(1)) == (b"\x02", b"\x01")
    with pytest.raises(StorageError, match="no"):
        fetcher.take(3)
    assert sorted(calls) == [1, 2, 3]
    assert not fetcher.is_requested(1)


class VirtualFetcher:
    """Fetches as a store with 50 ms of latency and 200 MB/s would, by a clock that only its owner moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited = 0.0
        self.num_fetched = 0
        self._ready: dict[int, float] = {}
        self._free = [0.0] * remote_shards.NUM_FETCHES
        """Time at which each thread has done what it was asked for."""

    def request(self, number: int) -> None:
        thread = self._free.index(min(self._free))
        seconds = 0.05 + ROW_GROUP_BYTES / (200e6 / remote_shards.NUM_FETCHES)
        self._free[thread] = self._ready[number] = max(self._free[thread], self.now) + seconds
        self.num_fetched += 1

    def is_requested(self, number: int) -> bool:
        return number in self._ready

    def take(self, number: int) -> None:
        wait = max(0.0, self._ready.pop(number) - self.now)
        self.now += wait
        self.waited += wait


ROW_GROUP_BYTES = 40_000


def decode_zeros(stream: TokenStream, index: int, fetched: bytes | None = None) -> Any:
    return np.zeros(stream.token_start[index + 1] - stream.token_start[index], np.uint8)


@pytest.mark.parametrize(
    ("batch_size", "step_seconds"),
    [
        pytest.param(16, 0.45, id="14M on two cores, 4,096 tokens in 0.45 s"),
        pytest.param(512, 4.0, id="on a fast GPU, 130,000 tokens/s"),
    ],
)
def test_training_waits_less_than_a_hundredth_of_its_time_for_a_store_of_50_ms(
    monkeypatch: pytest.MonkeyPatch, batch_size: int, step_seconds: float
) -> None:
    shard = RemoteShard("memory://x/y", size=1, rows=1, num_row_groups=1, sha256="", cache=RangeCache(Path(), 0))
    stream = TokenStream.of([(shard, [32_000] * 100)] * 50)
    monkeypatch.setattr(TokenStream, "decode", decode_zeros)
    fetcher = VirtualFetcher()
    monkeypatch.setattr("llmtrain.data.shards.Fetcher", lambda fetch: fetcher)
    items = WindowItems(
        sources=[ShardWindows(stream, 1024 if batch_size > 16 else 256)],
        mixture=None,
        shuffle_chunks=8,
        seed=1,
        seq_len=1024 if batch_size > 16 else 256,
        pad_id=0,
        end_id=None,
        content_sha256="",
    )
    num_steps = items.num_items // batch_size // (4 if batch_size > 16 else 20)
    steps = Steps(
        items=items,
        start_item=12_345,
        end_item=12_345 + num_steps * batch_size,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        rank=0,
        world_size=1,
    )
    read = steps.open()
    for step in range(num_steps):
        read(step)
        fetcher.now += step_seconds
    assert num_steps >= 75
    assert fetcher.num_fetched >= 500
    assert 0 < fetcher.waited < 0.01 * fetcher.now
