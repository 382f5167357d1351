"""A faster encoder that gives the same ids, for the tokenizers that have one.

    byte-level BPE ─→ tiktoken, with the merges as its ranks and the same pattern
    characters     ─→ a table from code points to ids

What a tokenizer.json says decides whether there is one. The claim that ids are the same is not taken on trust: whoever
wants the speed encodes a sample both ways first (`Tokenizer.speed_up`). Neither encoder holds the GIL while it works on
a text of some length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[str], NDArray[np.uint32]]

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""Pattern by which the `ByteLevel` pre-tokenizer of the tokenizers library splits when its `use_regex` is on."""

_NO_SPECIAL_TOKEN = "<|no special token|>"
"""tiktoken looks for special tokens even where none counts as one. A list of none at all would "match" at each byte, so
that it took five times as long."""


def fast_encoder(serialized: str) -> Encode | None:
    """Return the encoder for a tokenizer.json, without special tokens; None when it has a part that no fast one has."""
    parts = json.loads(serialized)
    model = parts["model"]
    if model.get("type") != "BPE" or parts.get("normalizer") or model.get("dropout"):
        return None
    if any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")):
        return None
    if any(not token["special"] for token in parts.get("added_tokens") or ()):
        return None  # these are found in a text before it is split
    if not model["merges"]:
        return _character_table(parts)
    pattern = _pattern(parts.get("pre_tokenizer"))
    return None if pattern is None else _tiktoken(model, pattern)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The pattern by which a text is split before its bytes are merged, where that is all that happens to it."""
    steps = [pre_tokenizer or {}]
    if steps[0].get("type") == "Sequence":
        steps = steps[0]["pretokenizers"]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return GPT2_PATTERN if last.get("use_regex", True) else None
    first = splits[0]
    if len(splits) > 1 or last.get("use_regex", True) or first.get("type") != "Split":
        return None
    if first.get("behavior") != "Isolated" or first.get("invert"):
        return None
    pattern: str | None = first["pattern"].get("Regex")
    return pattern


def _tiktoken(model: dict[str, Any], pattern: str) -> Encode | None:
    """Ranks are the order of the merges, which need not be that of the ids: a table leads from one to the other."""
    vocab: dict[str, int] = model["vocab"]
    try:
        import tiktoken
    except ImportError:  # on a machine without a package index: slower, and the same ids
        return None
    byte_of = _bytes_by_character()
    if any(character not in vocab for character in byte_of):
        return None
    merged = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    words = list(dict.fromkeys([*byte_of, *("".join(pair) for pair in merged)]))
    if any(word not in vocab for word in words):
        return None
    if model.get("ignore_merges") and len(vocab) > len(words) + 1:
        return None  # a word may be taken as a whole that no merge leads to
    try:
        ranks = {bytes(byte_of[character] for character in word): rank for rank, word in enumerate(words)}
        encoding = tiktoken.Encoding(
            "llmtrain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={_NO_SPECIAL_TOKEN: len(ranks)}
        )
    except (KeyError, ValueError):  # a token that is no bytes, or a pattern that tiktoken's library does not know
        return None
    ids = np.array([vocab[word] for word in words], np.uint32)

    def encode(text: str) -> NDArray[np.uint32]:
        found: NDArray[np.uint32] = ids[encoding.encode_to_numpy(text, disallowed_special=())]
        return found

    return encode


def _character_table(parts: dict[str, Any]) -> Encode | None:
    model = parts["model"]
    characters = {token: number for token, number in model["vocab"].items() if len(token) == 1}
    special = {token["content"] for token in parts.get("added_tokens") or ()}
    unknown = model["vocab"].get(model.get("unk_token"))
    if parts.get("pre_tokenizer") or unknown is None or model.get("fuse_unk"):
        return None
    if model["vocab"].keys() - characters.keys() - special:
        return None
    table = np.full(0x110000, unknown, np.uint32)
    for character, number in characters.items():
        table[ord(character)] = number

    def encode(text: str) -> NDArray[np.uint32]:
        return table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]

    return encode


def _bytes_by_character() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary: itself where it can be seen, else U+0100 on.

    Source: GPT-2's `bytes_to_unicode`.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}
