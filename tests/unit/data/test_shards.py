"""Token shards: the stream that they make, its windows, and what is rejected."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.data import PrepareConfig, TokensConfig
from llmtrain.data.manifest import read_manifest
from llmtrain.data.mixture import ItemOrder
from llmtrain.data.order import SMALL_TOKENS, WindowOrder, rank_share
from llmtrain.data.prepare.shard_plan import ROW_GROUP_TOKENS, ShardPlan
from llmtrain.data.prepare.shard_writer import ShardWriter, document_table, write_encoded
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.sources import open_source
from llmtrain.data.tokens import open_training_data, open_validation_data, reading_advice
from llmtrain.errors import ConfigError
from tests.support.token_shards import cut_stream, write_token_shards


def random_tokens(count: int, *, seed: int = 0, documents: int = 50) -> list[int]:
    """Tokens of [0, 256), of which about every `documents`-th is the end token 0."""
    rng = np.random.default_rng(seed)
    return [int(token) for token in np.where(rng.random(count) < 1 / documents, 0, rng.integers(1, 256, count))]


def make_shards(folder: Path, count: int = 5000, *, seed: int = 0) -> list[int]:
    tokens = random_tokens(count, seed=seed)
    write_token_shards(folder, {"train": cut_stream(tokens), "val": cut_stream(random_tokens(500, seed=seed + 1))})
    return tokens


def windows_of(folder: Path, seq_len: int) -> tuple[ShardWindows, np.ndarray[tuple[int, int], np.dtype[np.int64]]]:
    """The source, and all of its windows in their order; -1 where the last one has no token."""
    source = ShardWindows(open_source(str(folder), key="data.train").stream, seq_len)
    out = np.full((source.num_windows, seq_len + 1), -1, dtype=np.int64)
    source.open(None).read(np.arange(source.num_windows), out)
    return source, out


def order_of(source: ShardWindows, *, shuffle_chunks: int) -> ItemOrder[WindowOrder]:
    order = WindowOrder(source.num_windows, seq_len=source.seq_len, shuffle_chunks=shuffle_chunks, seed=1, source=0)
    return ItemOrder([order], None, seed=1)


@given(data=st.data(), seq_len=st.integers(1, 70))
@settings(max_examples=25, deadline=None)
def test_windows_equal_slices_of_the_concatenated_documents(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seq_len: int
) -> None:
    document = st.lists(st.integers(1, 255), max_size=40).map(lambda tokens: [*tokens, 0])
    shards = data.draw(
        st.lists(
            st.lists(st.lists(document, min_size=1, max_size=4), min_size=1, max_size=3), min_size=1, max_size=4
        ).filter(lambda shards: sum(len(d) for s in shards for g in s for d in g) > 1)
    )
    folder = tmp_path_factory.mktemp("shards")
    write_token_shards(folder, {"train": shards})
    stream = list(chain.from_iterable(d for shard in shards for group in shard for d in group))
    source, windows = windows_of(folder / "train", seq_len)
    assert source.num_windows == -(-(len(stream) - 1) // seq_len)
    for index, window in enumerate(windows):
        expected = stream[index * seq_len : index * seq_len + seq_len + 1]
        assert window.tolist() == expected + [-1] * (seq_len + 1 - len(expected))
        assert len(expected) >= 2


def test_reading_in_any_order_with_few_row_groups_in_memory_gives_the_same_windows(tmp_path: Path) -> None:
    make_shards(tmp_path)
    source, windows = windows_of(tmp_path / "train", 33)
    order = np.random.default_rng(0).permutation(source.num_windows)
    out = np.full_like(windows, -1)
    reader = source.open(None)
    lengths = reader.read(order, out)
    assert np.array_equal(out, windows[order])
    assert sorted(set(lengths.tolist())) == [(5000 - 1) % 33 + 1, 34]


def test_the_row_groups_of_open_chunks_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, 60_000)
    monkeypatch.setattr("llmtrain.data.order.SMALL_TOKENS", 0)
    monkeypatch.setattr("llmtrain.data.order.CHUNK_TOKENS", 1000)
    source, _ = windows_of(tmp_path / "train", 16)
    order = order_of(source, shuffle_chunks=4)
    reader = source.open(order.sources[0])
    out = np.empty((8, 17), dtype=np.int64)
    for start in range(0, source.num_windows - 8, 8):
        reader.read(order.locate(np.arange(start, start + 8)).sequence, out)
    num_chunks, num_row_groups = order.sources[0].num_chunks, source.stream.num_row_groups
    assert (num_chunks, num_row_groups) == (60, 57)
    assert reader.max_row_groups == 4 * 2 + 2
    # Each chunk of 1000 tokens lies in one or two row groups of a little more.
    assert num_row_groups <= reader.num_decoded <= 2 * num_chunks


def test_a_small_source_is_decoded_once_in_all(tmp_path: Path) -> None:
    make_shards(tmp_path, 20_000)
    source, _ = windows_of(tmp_path / "train", 16)
    order = order_of(source, shuffle_chunks=4)
    reader = source.open(order.sources[0])
    out = np.empty((10, 17), dtype=np.int64)
    for start in range(0, 3 * source.num_windows, 10):
        reader.read(order.locate(np.arange(start, start + 10)).sequence, out)
    assert source.stream.num_tokens < SMALL_TOKENS
    assert reader.num_decoded == source.stream.num_row_groups == 20


def test_a_folder_a_glob_a_list_and_a_file_name_the_same_tokens(tmp_path: Path) -> None:
    tokens = make_shards(tmp_path)
    folder = str(tmp_path / "train")
    files = sorted(str(path) for path in (tmp_path / "train").iterdir())
    assert len(files) == 2
    for paths in (folder, [folder], f"{folder}/*.parquet", f"{tmp_path}/tr*", f"{tmp_path}/**/train/*.parquet", files):
        assert open_source(paths, key="data.train").stream.num_tokens == len(tokens)
    one = open_source(files[1], key="data.train")
    assert one.stream.decode(0).tolist() == tokens[-one.stream.num_tokens :][: len(one.stream.decode(0))]


def test_sources_without_weights_are_one_stream_in_the_order_given(tmp_path: Path) -> None:
    first = make_shards(tmp_path / "b", seed=1)
    second = make_shards(tmp_path / "a", 3000, seed=2)
    source = open_source([str(tmp_path / "b/train"), str(tmp_path / "a/train")], key="data.train")
    stream = [source.stream.decode(index).tolist() for index in range(source.stream.num_row_groups)]
    assert list(chain.from_iterable(stream)) == first + second
    assert source.num_bytes == 3 * 8000


def test_facts_come_from_the_manifest(tmp_path: Path) -> None:
    make_shards(tmp_path)
    config = TokensConfig(train=str(tmp_path / "train"), val=str(tmp_path / "val"), seq_len=10)
    train, val = open_training_data(config, seed=1), open_validation_data(config, seed=1)
    assert val is not None
    facts = train.facts
    assert (facts.vocab_size, facts.eos_id, facts.num_tokens, facts.num_bytes) == (256, 0, 5000, 15000)
    assert (val.facts.num_tokens, val.facts.num_bytes, val.num_items) == (500, 1500, 50)
    assert val.facts.tokens_per_byte == 1 / 3
    assert (train.name, facts.tokenizer) == (str(tmp_path / "train"), tmp_path / "tokenizer")
    assert train.items_per_epoch == 500
    assert open_validation_data(TokensConfig(train="x"), seed=1) is None


def test_the_fingerprint_changes_with_other_tokens_and_another_order_but_not_another_place(tmp_path: Path) -> None:
    for name, seed in (("here", 0), ("there", 0), ("other", 1)):
        make_shards(tmp_path / name, seed=seed)
    configs = [TokensConfig(train=str(tmp_path / name / "train")) for name in ("here", "there", "other")]
    configs.append(configs[0].model_copy(update={"shuffle_chunks": 4}))
    configs.append(configs[0].model_copy(update={"mask_documents": False, "num_workers": 2}))
    here, there, other, four_chunks, same_order = (open_training_data(c, seed=1).fingerprint for c in configs)
    assert here == there == same_order
    assert len({here, other, four_chunks}) == 3


def rejection(*paths: str | Path, key: str = "data.train") -> str:
    with pytest.raises(ConfigError) as caught:
        open_source([str(path) for path in paths], key=key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_shards_names_the_path_and_the_command(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "*.parquet", tmp_path / "shard.parquet"):
        message = rejection(path)
        assert message.startswith(f"data.train: there are no token shards at {path}:")
        assert "llmtrain prepare" in message


def test_shards_without_a_manifest_are_rejected(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "manifest.json").unlink()
    message = rejection(tmp_path / "train")
    assert f"{tmp_path}/train/shard_00000.parquet belongs to no manifest.json" in message
    assert "llmtrain prepare" in message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_shards(tmp_path)
    lost = tmp_path / "train/shard_00001.parquet"
    lost.unlink()
    assert rejection(tmp_path / "train").startswith(f"{lost}: the manifest names this shard, but it is missing")
    shutil.rmtree(tmp_path / "val")
    (tmp_path / "val").mkdir()
    assert "val/shard_00000.parquet: the manifest names this shard" in rejection(tmp_path / "val", key="data.val")


@pytest.mark.parametrize(("keep", "said"), [(0, "is empty"), (100, "has 100 bytes")])
def test_an_empty_or_truncated_shard_is_named_with_both_sizes(tmp_path: Path, keep: int, said: str) -> None:
    make_shards(tmp_path)
    path = tmp_path / "train/shard_00000.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:keep])
    assert rejection(tmp_path / "train").startswith(f"{path}: {said}, but the manifest says {size}:")


def test_a_stale_shard_of_an_earlier_run_is_rejected(tmp_path: Path) -> None:
    make_shards(tmp_path)
    stranger = tmp_path / "train/shard_00009.parquet"
    shutil.copy(tmp_path / "train/shard_00000.parquet", stranger)
    assert rejection(tmp_path / "train").startswith(f"{stranger} is not in {tmp_path}/manifest.json")
    assert open_source(str(tmp_path / "train/shard_00000.parquet"), key="data.train").stream.num_tokens > 0


def test_training_and_held_out_shards_are_not_mixed(tmp_path: Path) -> None:
    make_shards(tmp_path)
    message = rejection(tmp_path)
    assert message.startswith(f"data.train: {tmp_path} holds the splits train and val")
    assert f"{tmp_path}/train" in message


def test_a_shard_named_twice_is_rejected(tmp_path: Path) -> None:
    make_shards(tmp_path)
    assert "shard_00000.parquet is named twice" in rejection(tmp_path / "train", tmp_path / "train/shard_00000.parquet")


def test_different_tokenizers_are_rejected(tmp_path: Path) -> None:
    make_shards(tmp_path / "a")
    other = {"train": cut_stream(random_tokens(900)), "val": cut_stream(random_tokens(900))}
    write_token_shards(tmp_path / "b", other, tokenizer_sha256="1" * 64, vocab_size=300)
    a, b = tmp_path / "a/train", tmp_path / "b/train"
    expected = f"data.train: {a} and {b} were made with different tokenizers (vocabularies of 256 and 300)"
    assert rejection(a, b).startswith(expected)
    weighted = [{"path": str(a), "weight": 1}, {"path": str(b), "weight": 1}]
    with pytest.raises(ConfigError, match="different tokenizers"):
        open_training_data(TokensConfig.model_validate({"train": weighted}), seed=1)
    config = TokensConfig(train=str(a), val=str(tmp_path / "b/val"))
    with pytest.raises(ConfigError, match=r"data\.val: .*another tokenizer"):
        open_validation_data(config, seed=1, training=open_training_data(config, seed=1))


def test_too_few_tokens_to_predict_one_are_rejected(tmp_path: Path) -> None:
    write_token_shards(tmp_path, {"train": [[[[0]]]]})
    assert "holds 1 token" in rejection(tmp_path / "train")


def test_damage_inside_a_shard_is_named_when_it_is_read(tmp_path: Path) -> None:
    make_shards(tmp_path)
    path = tmp_path / "train/shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    path.write_bytes(content)
    stream = open_source(str(tmp_path / "train"), key="data.train").stream
    with pytest.raises(ConfigError, match=r"shard_00000.parquet: row group \d cannot be read"):
        list(map(stream.decode, range(stream.num_row_groups)))
    counts = [stream.token_start[1] - 1, *np.diff(stream.token_start)[1:3]]
    with pytest.raises(ConfigError, match=r"row group 0 holds \d+ tokens, but \d+ are expected"):
        TokenStream.of([(tmp_path / "val/shard_00000.parquet", counts)]).decode(0)


def test_each_of_64_ranks_reads_no_more_than_a_tenth_over_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts bytes of row groups and footers, by those of a shard that is written; 64 ranks and 64 open chunks."""
    config = PrepareConfig(input="x", output="y")
    rng = np.random.default_rng(0)
    plan = ShardPlan("train", shard_size=config.shard_size)
    frequent = np.minimum(rng.zipf(1.2, 2_000_000), 8191).astype(np.uint16)
    sources = [f"text/{number // 100:04}.jsonl:{number}" for number in range(2000)]
    write_encoded(tmp_path, "0.arrow", document_table(sources, np.split(frequent, 2000), dtype="uint16"))
    plan.add("0.arrow", lengths=[1000] * 2000, num_bytes=[4000] * 2000)
    [planned] = plan.close()
    shard = ShardWriter(tmp_path, tmp_path)(planned)
    footer = pq.read_metadata(tmp_path / shard.path)
    footer_bytes = footer.serialized_size / footer.num_row_groups * config.shard_size / ROW_GROUP_TOKENS
    token_bytes = (shard.size - footer.serialized_size) / shard.tokens
    sizes = (ROW_GROUP_TOKENS - rng.integers(0, 2000, config.shard_size // ROW_GROUP_TOKENS)).tolist()
    stream = TokenStream.of([(Path(f"shard_{index}"), sizes) for index in range(180)])
    source = ShardWindows(stream, 4096)
    order = order_of(source, shuffle_chunks=64)
    assert order.sources[0].num_chunks == 512

    touched: list[Counter[int]] = [Counter() for _ in range(64)]
    decoded_by = 0

    def decode(stream: TokenStream, index: int, fetched: bytes | None = None) -> np.ndarray[Any, Any]:
        touched[decoded_by][index] += 1
        return np.broadcast_to(np.uint8(0), stream.token_start[index + 1] - stream.token_start[index])

    monkeypatch.setattr(TokenStream, "decode", decode)
    readers = [source.open(order.sources[0], world_size=64) for _ in range(64)]
    shares = np.zeros(64)
    out = np.empty((8, 4097), dtype=np.int64)
    for begin in range(0, source.num_windows - 512, 512):
        places = order.locate(np.arange(begin, begin + 512))
        for rank, reader in enumerate(readers):
            decoded_by = rank
            windows = places.sequence[rank_share(places, rank=rank, world_size=64)]
            reader.read(windows, out)
            shares[rank] += len(windows) * 4096
    fetched = np.array(
        [
            sum(times * int(np.diff(stream.token_start[index : index + 2])[0]) for index, times in of_rank.items())
            + len({int(stream.shard[index]) for index in of_rank}) * footer_bytes / token_bytes
            for of_rank in touched
        ]
    )
    assert shares.min() > 8_000_000
    assert (fetched / shares).max() <= 1.1
    assert max(reader.max_row_groups for reader in readers) < 75  # 2.5M tokens


def test_processes_that_share_chunks_are_told_to_open_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path)

    def advice(**keys: int) -> str | None:
        config = TokensConfig(train=str(tmp_path / "train"), seq_len=10, shuffle_chunks=keys["chunks"])
        return reading_advice(config, open_training_data(config, seed=1, world_size=keys["world_size"]))

    assert advice(chunks=8, world_size=64) is None  # kept in memory as a whole
    monkeypatch.setattr("llmtrain.data.order.SMALL_TOKENS", 0)
    said = advice(chunks=8, world_size=64)
    assert said is not None
    assert said.startswith("data.shuffle_chunks is 8, and 64 processes read")
    assert "about 8 times its part" in said
    assert "data.shuffle_chunks to 64, a multiple" in said
    assert "data.shuffle_chunks to 96" in str(advice(chunks=64, world_size=48))
    assert [advice(chunks=8, world_size=size) for size in (1, 2, 4, 8)] == [None] * 4


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    make_shards(tmp_path)
    expected = read_manifest(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_text())
    document["format_version"] = 1
    for split in document["splits"].values():
        for shard in split["shards"]:
            columns = shard["row_groups"]
            shard["row_groups"] = [
                dict(zip(columns, group, strict=True)) for group in zip(*columns.values(), strict=True)
            ]
    assert document["splits"]["train"]["shards"][0]["row_groups"][0].keys() == {"documents", "tokens", "bytes"}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    assert read_manifest(tmp_path).splits == expected.splits
    document["splits"]["train"]["shards"][0]["row_groups"] = {"documents": [1], "tokens": [1, 2], "bytes": [1]}
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"splits\.train\.shards\.0\.row_groups: .*of different lengths"):
        read_manifest(tmp_path)
    document["splits"]["train"]["shards"][0]["row_groups"] = [{"documents": 1}]
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"splits\.train\.shards\.0\.row_groups"):
        read_manifest(tmp_path)


def test_a_stream_of_ten_billion_tokens_is_searched_at_once() -> None:
    shards = [(Path(f"shard_{index}"), [1_000_000 + index % 7] * 50) for index in range(200)]
    source = ShardWindows(TokenStream.of(shards), 1024)
    assert source.stream.num_tokens > 10_000_000_000
    for token in (0, 999_999, 1_000_000, 5_000_000_000):
        index = int(source.stream.find(token))
        assert source.stream.token_start[index] <= token < source.stream.token_start[index + 1]
    order = order_of(source, shuffle_chunks=8)
    assert source.open(order.sources[0]).max_row_groups == 8 * 3 + 2
