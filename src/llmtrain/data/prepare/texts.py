"""Decode token shards into text again, for comparisons that need the text itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

from llmtrain.data.manifest import read_manifest
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.errors import ConfigError


def iter_split_texts(folder: str | os.PathLike[str], split: str) -> Iterator[str]:
    """Yield the documents of a split, in reading order, decoded from their tokens without the end token.

    With byte-level tokenizers (all that `prepare` trains) this is the text that was read; others may have normalised
    it. `folder` holds the manifest. Raises ConfigError when it has no such split.
    """
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise ConfigError(f"{folder}: has no split {split!r}, only {', '.join(manifest.splits)}")
    tokenizer = load_tokenizer(Path(folder) / manifest.tokenizer.path)
    for shard in manifest.splits[split].shards:
        with pq.ParquetFile(Path(folder) / shard.path) as file:
            for group in range(file.num_row_groups):
                for tokens in file.read_row_group(group, columns=["tokens"]).column("tokens"):
                    yield tokenizer.decode(tokens.values.to_numpy()[:-1].tolist())
