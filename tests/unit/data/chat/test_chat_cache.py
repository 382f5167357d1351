"""Tokenised rows on disk: what comes out is what went in; what is stale or damaged is noticed."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.chat import key as key_module
from llmtrain.data.chat.cache import Account, ensure_samples, open_samples, samples_folder
from llmtrain.data.chat.key import samples_key
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.datasets import RowDataset
from llmtrain.data.files.find import find_rows
from llmtrain.errors import ConfigError
from tests.support.chat import CHATML, QWEN3, tiny_chat_tokenizer

KEY = {"rows": "a", "tokenizer": "b", "template": "c", "options": "d"}


def make_samples(lengths: list[int], *, seed: int = 0) -> list[Sample]:
    generator = np.random.default_rng(seed)
    return [
        Sample(
            generator.integers(0, 2**31 - 1, length, dtype=np.int32),
            generator.random(length) < 0.5,
            f"größe/rows.jsonl:{number + 1}",
        )
        for number, length in enumerate(lengths)
    ]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30))
@settings(max_examples=20, deadline=None)
def test_samples_come_back_as_they_were_written(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    samples = make_samples(lengths)
    store = ensure_samples(
        tmp_path_factory.mktemp("cache") / "samples",
        key=KEY,
        make=lambda: samples,
        account=lambda: Account(rows=9, notes=("2 cut",)),
    )
    assert len(store) == len(samples)
    assert store.lengths.tolist() == lengths
    assert store.num_supervised.tolist() == [int(sample.supervised.sum()) for sample in samples]
    assert store.manifest.tokens == sum(lengths)
    assert store.manifest.supervised_tokens == store.num_supervised.sum()
    assert store.manifest.account == Account(rows=9, notes=("2 cut",))
    for again in (store, pickle.loads(pickle.dumps(store))):
        for number, sample in enumerate(samples):
            found = again[number]
            assert np.array_equal(found.input_ids, sample.input_ids)
            assert np.array_equal(found.supervised, sample.supervised)
            assert found.source == again.source(number) == sample.source
            assert (found.input_ids.dtype, found.supervised.dtype) == (np.int32, np.bool_)


def test_a_store_that_is_sent_to_a_worker_takes_no_tokens_along(tmp_path: Path) -> None:
    store = ensure_samples(tmp_path / "samples", key=KEY, make=lambda: make_samples([1000] * 100))
    assert store.lengths.sum() == 100_000
    assert len(pickle.dumps(store)) < 2000


@pytest.mark.parametrize("changed", KEY)
def test_what_was_made_from_something_else_is_rejected_and_the_difference_named(tmp_path: Path, changed: str) -> None:
    folder = tmp_path / "samples"
    ensure_samples(folder, key=KEY, make=lambda: make_samples([3, 4]))
    other = {**KEY, changed: "x"}
    with pytest.raises(ConfigError, match=f"made with other {changed} than .*llmtrain prepare"):
        open_samples(folder, key=other)
    assert samples_folder(tmp_path, other) != samples_folder(tmp_path, KEY)
    assert len(ensure_samples(folder, key=other, make=lambda: make_samples([5]))) == 1
    assert open_samples(folder, key=other).lengths.tolist() == [5]


@pytest.mark.parametrize("name", ["input_ids.bin", "supervised.bin", "starts.bin", "sources.txt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_noticed_and_mended(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "samples"
    samples = make_samples([7, 4])
    ensure_samples(folder, key=KEY, make=lambda: samples)
    content = (folder / name).read_bytes()
    if damage == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-1] + (bytes([content[-1] ^ 4]) if damage == "flip" else b""))
    with pytest.raises(ConfigError, match=rf"damaged \({name}.*llmtrain prepare"):
        open_samples(folder, key=KEY)
    ensure_samples(folder, key=KEY, make=lambda: samples)
    assert (folder / name).read_bytes() == content
    assert "making them again" in caplog.text


def test_a_broken_manifest_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    with pytest.raises(ConfigError, match="holds no tokenised rows"):
        open_samples(folder, key=KEY)
    ensure_samples(folder, key=KEY, make=lambda: make_samples([7]))
    text = (folder / "manifest.json").read_text()
    for broken, message in [
        (text[:-9], "manifest .* is damaged"),
        (text.replace('"samples"', '"rows"'), "manifest .* is damaged"),
        (text.replace('"format_version": 3', '"format_version": 1'), "another version"),
    ]:
        (folder / "manifest.json").write_text(broken)
        with pytest.raises(ConfigError, match=message):
            open_samples(folder, key=KEY)


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    def fails() -> Iterator[Sample]:
        yield from make_samples([5])
        raise ConfigError("rows.jsonl:2: is no JSON")

    folder = tmp_path / "samples"
    ensure_samples(folder, key=KEY, make=lambda: make_samples([3, 4]))
    with pytest.raises(ConfigError, match="is no JSON"):
        ensure_samples(folder, key={**KEY, "rows": "new"}, make=fails)
    assert open_samples(folder, key=KEY).lengths.tolist() == [3, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".samples.lock", "samples"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    left = tmp_path / ".samples.partial"
    left.mkdir()
    for name in ("input_ids.bin", "supervised.bin", "starts.bin", "sources.txt", "manifest.json"):
        (left / name).write_bytes(b"left" * 1000)
    store = ensure_samples(tmp_path / "samples", key=KEY, make=lambda: make_samples([3, 4]))
    assert np.array_equal(store[1].input_ids, make_samples([3, 4])[1].input_ids)
    assert not left.exists()


def test_a_folder_with_files_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"data\.cache_dir.*thesis\.txt"):
        ensure_samples(tmp_path, key=KEY, make=lambda: make_samples([3]))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def ensure_and_count(folder: Path) -> None:
    def make() -> list[Sample]:
        with (folder.parent / "made").open("a") as file:
            file.write("x")
        return make_samples([10] * 1000)

    assert len(ensure_samples(folder, key=KEY, make=make)) == 1000


def test_of_many_processes_one_makes_the_samples(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ensure_and_count, args=(tmp_path / "samples",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "made").read_text() == "x"


# -- the key -----------------------------------------------------------------------------------------------------------


def test_the_key_names_what_has_changed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')

    def key(template: ChatTemplate, **options: object) -> dict[str, str]:
        return samples_key(find_rows(str(rows), key="data.train"), template=template, options=options)

    def changed(other: dict[str, str]) -> list[str]:
        return [name for name in before if before[name] != other[name]]

    template = ChatTemplate(tiny_chat_tokenizer(CHATML))
    before = key(template, seq_len=8)
    assert key(ChatTemplate(tiny_chat_tokenizer(CHATML)), seq_len=8) == before
    assert before.keys() == {"rows", "tokenizer", "template", "options", "code"}
    assert changed(key(template, seq_len=9)) == ["options"]
    assert changed(key(ChatTemplate(tiny_chat_tokenizer(QWEN3)), seq_len=8)) == ["template"]
    assert changed(key(ChatTemplate(tiny_chat_tokenizer(CHATML, adds_bos=True)), seq_len=8)) == ["tokenizer"]
    rows.write_text('{"text": "b"}\n')
    assert changed(key(template, seq_len=8)) == ["rows"]


def test_the_key_changes_with_the_code_and_the_libraries_that_render(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    package = tmp_path / "package"
    (package / "chat").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr("llmtrain.data.__file__", str(package / "__init__.py"))
    template = ChatTemplate(tiny_chat_tokenizer(CHATML))
    codes = []
    for source, release in (("a", "1"), ("a", "1"), ("b", "1"), ("b", "2")):
        (package / "chat" / "encoding.py").write_text(source)
        monkeypatch.setattr(key_module, "version", lambda name, release=release: release)
        key_module._code.cache_clear()
        found = find_rows(str(rows), key="data.train")
        codes.append(samples_key(found, template=template, options={})["code"])
    key_module._code.cache_clear()
    assert codes[0] == codes[1]
    assert len(set(codes)) == 3


def test_the_key_of_a_dataset_changes_with_it(tmp_path: Path) -> None:
    template = ChatTemplate(tiny_chat_tokenizer(CHATML))
    keys = []
    for number, text in enumerate(["a", "a", "b"]):
        Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / str(number))
        source = RowDataset("rows", load_from_disk(tmp_path / str(number)))
        keys.append(samples_key([source], template=template, options={})["rows"])
    assert keys[0] == keys[1] != keys[2]
