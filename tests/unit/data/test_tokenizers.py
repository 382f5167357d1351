"""Tokenizers: exact round trips, no special ids from text, Hugging Face format."""

from __future__ import annotations

import json
import os
import socket
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from llmtrain.data import tokenizers as ours
from llmtrain.data.hub_connection import hub_answers
from llmtrain.data.tokenizers import (
    END_OF_TEXT,
    Tokenizer,
    folder_fingerprint,
    library_threads,
    load_hf_tokenizer,
    load_tokenizer,
    train_bpe,
    train_characters,
)
from llmtrain.errors import ConfigError

SOURCES = [Path(textwrap.__file__).read_text(), Path(json.__file__).read_text(), Path(ours.__file__).read_text()]
BPE = train_bpe(SOURCES, vocab_size=600)


@given(st.text())
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@given(
    st.lists(st.sampled_from(["def f", "):\n", "\n    ", "12345", " 7", "é", "汉字。", "<|endoftext|>", "\t", "\r\n"]))
)
def test_code_like_text_survives_encoding_and_decoding(parts: list[str]) -> None:
    text = "".join(parts)
    assert BPE.decode(BPE.encode(text)) == text


def test_vocabulary_is_end_token_then_bytes_then_merges() -> None:
    assert (BPE.vocab_size, BPE.eos_id) == (600, 0)
    assert BPE.decode([0]) == END_OF_TEXT
    single = [BPE.encode(chr(byte)) for byte in range(128)]
    assert all(len(ids) == 1 and 1 <= ids[0] <= 256 for ids in single)
    assert len({ids[0] for ids in single}) == 128


def test_the_end_tokens_text_is_ordinary_text() -> None:
    ids = BPE.encode(f"the token {END_OF_TEXT} ends a document")
    assert BPE.eos_id not in ids
    assert BPE.decode(ids) == f"the token {END_OF_TEXT} ends a document"


def test_digits_are_in_groups_of_three_and_indentation_is_one_piece() -> None:
    split = pre_tokenizers.Split(tokenizers.Regex(ours.SPLIT_PATTERN), "isolated")
    pieces = split.pre_tokenize_str("x = 1234567\nif foo_bar(x):\n\n        return self.x\n")
    assert "|".join(text for text, _ in pieces) == (
        "x| =| 123|456|7|\n|if| foo|_bar|(x|):\n\n        |return| self|.x|\n"
    )


@settings(max_examples=50)
@given(st.lists(st.sampled_from([*SOURCES[0].split(" "), "汉字。", "한국 ", "\n\n", " x1 ", "\t"]), max_size=200))
def test_a_long_text_is_cut_without_changing_its_ids(words: list[str]) -> None:
    text = " ".join(words)
    whole = BPE.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_LONG_TEXT", 20)
        assert BPE.encode(text) == whole
        assert len(text) < 400 or len(list(ours._cut(text))) > 5


def test_cutting_long_texts_does_not_change_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_LONG_TEXT", 100)
    assert train_bpe(SOURCES, vocab_size=600).sha256 == BPE.sha256


def test_training_depends_neither_on_order_nor_on_threads() -> None:
    for enabled in (False, True):
        with library_threads(enabled):
            assert train_bpe(reversed(SOURCES), vocab_size=600).sha256 == BPE.sha256


def test_a_short_text_gives_a_small_vocabulary() -> None:
    tiny = train_bpe(["abab"], vocab_size=8192)
    assert tiny.vocab_size == 1 + 256 + 1
    assert train_bpe(["abab"], vocab_size=8192, min_frequency=3).vocab_size == 1 + 256


def test_encode_batch_gives_the_ids_of_each_text() -> None:
    texts = ["", "a", *SOURCES, ""]
    batch = BPE.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [BPE.encode(text) for text in texts]
    assert batch[0].dtype == np.uint32
    assert batch[0].size == 0


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    BPE.save(tmp_path / "first")
    loaded = load_tokenizer(tmp_path / "first")
    loaded.save(tmp_path / "second")
    again = load_tokenizer(tmp_path / "second")
    for tokenizer in (loaded, again):
        assert (tokenizer.sha256, tokenizer.vocab_size, tokenizer.eos_id) == (BPE.sha256, 600, 0)
        assert tokenizer.encode(SOURCES[0]) == BPE.encode(SOURCES[0])


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    BPE.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.eos_token, loaded.eos_token_id) == (600, END_OF_TEXT, 0)
    for text in SOURCES:
        ids = loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == BPE.encode(text)
        assert loaded.decode(ids) == text


def test_library_threads_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    with library_threads(False):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def _word_tokenizer(folder: Path, *, config: dict[str, object]) -> Path:
    """A small existing tokenizer, whose files would truncate to three tokens and pad."""
    backend = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "</s>": 3, "far": 70_000}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_an_existing_tokenizer_is_copied_and_never_truncates_or_pads(tmp_path: Path) -> None:
    source = _word_tokenizer(tmp_path / "source", config={"eos_token": "</s>"})
    loaded = load_hf_tokenizer(str(source))
    loaded.save(tmp_path / "copy")
    for tokenizer in (loaded, load_tokenizer(tmp_path / "copy"), load_tokenizer(source)):
        assert tokenizer.encode("a b a b") == [1, 2, 1, 2]
        assert tokenizer.eos_id == 3
        assert 3 not in tokenizer.encode("a </s> b")
        assert tokenizer.vocab_size == 70_001  # by the largest id, not by the number of tokens


def test_an_existing_tokenizer_needs_an_end_token(tmp_path: Path) -> None:
    source = _word_tokenizer(tmp_path / "source", config={})
    for load in (load_hf_tokenizer, load_tokenizer):
        with pytest.raises(ConfigError, match="eos_token"):
            load(str(source))


def test_an_unknown_end_token_is_an_error(tmp_path: Path) -> None:
    source = _word_tokenizer(tmp_path / "source", config={"eos_token": {"content": "<end>"}})
    with pytest.raises(ConfigError, match=r"tokenizer\.json: has no token '<end>'"):
        load_tokenizer(source)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "no-such-tokenizer-anywhere"])
def test_a_missing_tokenizer_is_a_clear_error(name: str) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer '{name}'"):
        load_hf_tokenizer(name)


@pytest.mark.parametrize("content", ["", "{}", "[1, 2", '{"model": {}}'])
def test_a_broken_tokenizer_is_a_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(ConfigError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError):
        load_hf_tokenizer(str(tmp_path))


def test_no_tokenizer_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer here"):
        load_tokenizer(tmp_path)


def test_a_changed_folder_has_another_fingerprint(tmp_path: Path) -> None:
    source = _word_tokenizer(tmp_path / "source", config={"eos_token": "</s>"})
    before = folder_fingerprint(str(source))
    assert before == folder_fingerprint(str(source))
    (source / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    assert folder_fingerprint(str(source)) not in (before, None)
    assert folder_fingerprint("gpt2-on-the-hub") is None


def test_a_tokenizer_takes_no_broken_text() -> None:
    with pytest.raises(ValueError, match="is no tokenizer"):
        Tokenizer("nothing", eos_token="x", write=lambda _: None)


def test_characters_are_tokens_and_any_other_one_is_unknown(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "hello  world\n\nab .  ,'s n't\té 🎉\r\n汉"
    tokenizer = train_characters([text])
    assert tokenizer.vocab_size == 2 + len(set(text))
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for example in (text, "", " ", "  \n", ".\r\n ,"):
        assert loaded.decode(loaded.encode(example)) == example
        assert theirs(example).input_ids == loaded.encode(example)
        assert theirs.decode(theirs(example).input_ids) == example
    assert theirs("heQQ👍").input_ids == loaded.encode("heQQ👍") == [*loaded.encode("he"), 1, 1, 1]
    assert theirs.decode(theirs("heQQ").input_ids) == "he<unk><unk>"
    assert loaded.eos_id == theirs.eos_token_id == 0
    assert theirs.unk_token_id == 1
    assert 0 not in loaded.encode(END_OF_TEXT)


def test_the_most_frequent_characters_stay() -> None:
    assert train_characters(["aab", "bcccd"]).decode([2, 3, 4, 5]) == "abcd"
    assert train_characters(["aab", "bcccd"], min_frequency=2).vocab_size == 2 + 3
    assert train_characters(["aab", "bcccd"], vocab_size=4).decode([2, 3]) == "ac"


def test_without_a_connection_a_name_is_one_quick_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "hub_answers", lambda: False)
    with pytest.raises(ConfigError, match=r"tokenizer 'nobody/nothing': .* no connection to the Hub"):
        load_hf_tokenizer("nobody/nothing")


def test_whether_the_hub_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers()
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert not hub_answers()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub_answers()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub_answers()
