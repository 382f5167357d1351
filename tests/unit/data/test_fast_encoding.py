"""The fast encoders give the same ids as the tokenizers library, or there is none."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from llmtrain.data.fast_encoding import _NO_SPECIAL_TOKEN, fast_encoder
from llmtrain.data.tokenizers import END_OF_TEXT, Tokenizer, train_bpe, train_characters

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = sorted(file for file in STDLIB.rglob("*.py") if "site-packages" not in file.parts)
TEXTS = [file.read_text(encoding="utf-8", errors="replace") for file in FILES[::40]]
CODE_POINTS = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def _gpt2_like(**pre_tokenizer: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **pre_tokenizer})
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS[:10], trainer)
    return Tokenizer(backend.to_str(), eos_token=END_OF_TEXT, write=lambda folder: None)


TOKENIZERS = {
    "bpe": train_bpe(TEXTS[:10], vocab_size=2000),
    "gpt2": _gpt2_like(),
    "characters": train_characters(TEXTS[:10]),
}


def _same(tokenizer: Tokenizer, texts: list[str]) -> bool:
    fast = fast_encoder(tokenizer._serialized)
    assert fast is not None
    slow = tokenizer._encode_slowly(texts)
    return all(np.array_equal(fast(text), ids) for text, ids in zip(texts, slow, strict=True))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_the_same_on_source_code(name: str) -> None:
    assert _same(TOKENIZERS[name], TEXTS)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=4))
def test_ids_are_the_same_on_any_text(name: str, texts: list[str]) -> None:
    assert _same(TOKENIZERS[name], texts)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.sampled_from(["def", " ", "  ", "\n", "\r\n", "\t", "aaa", "'s", "_", "12345", "\u3000", "é"]))
)
def test_ids_are_the_same_on_text_like_code(name: str, parts: list[str]) -> None:
    assert _same(TOKENIZERS[name], ["".join(parts)])


@pytest.mark.parametrize("around", ["a%sb", "1%s1", " %s.", "\n%s "])
def test_both_libraries_put_every_code_point_into_the_same_class(around: str) -> None:
    joined = [
        "".join(around % point for point in CODE_POINTS[start : start + 512])
        for start in range(0, len(CODE_POINTS), 512)
    ]
    assert _same(TOKENIZERS["bpe"], joined[:: 1 if around == "a%sb" else 8])


def test_text_that_looks_like_a_special_token_is_text() -> None:
    for name in TOKENIZERS:
        assert _same(TOKENIZERS[name], [f"a{_NO_SPECIAL_TOKEN} b {END_OF_TEXT}{END_OF_TEXT}", _NO_SPECIAL_TOKEN])


def test_what_the_fast_one_cannot_take_is_encoded_as_before() -> None:
    tokenizer = train_bpe(TEXTS[:3], vocab_size=400)
    blanks = " " * 1_000_000
    expected = tokenizer.encode(blanks)
    assert tokenizer.speed_up(["one text"])
    with pytest.raises(ValueError, match="stack size"):
        fast_encoder(tokenizer._serialized)(blanks)  # type: ignore[misc]
    assert tokenizer.encode(blanks) == expected
    assert tokenizer.decode(expected) == blanks


def test_a_fast_one_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe(TEXTS[:3], vocab_size=400)
    expected = tokenizer.encode("some text")
    monkeypatch.setattr(
        "llmtrain.data.tokenizers.fast_encoder", lambda serialized: lambda text: np.array([1], np.uint32)
    )
    assert not tokenizer.speed_up(["some text"])
    assert tokenizer.encode("some text") == expected


def _changed(**parts: Any) -> str:
    document = json.loads(TOKENIZERS["bpe"]._serialized)
    model = parts.pop("model", {})
    return json.dumps({**document, **parts, "model": {**document["model"], **model}})


@pytest.mark.parametrize(
    "serialized",
    [
        _changed(normalizer=json.loads(normalizers.NFC().__getstate__())),
        _changed(model={"dropout": 0.1}),
        _changed(model={"byte_fallback": True}),
        _changed(model={"type": "Unigram"}),
        _changed(pre_tokenizer={"type": "Whitespace"}),
        _changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        _changed(pre_tokenizer=None),
        _changed(added_tokens=[{"id": 5, "content": "  ", "special": False}]),
    ],
)
def test_tokenizers_with_other_parts_have_no_fast_one(serialized: str) -> None:
    assert fast_encoder(serialized) is None
