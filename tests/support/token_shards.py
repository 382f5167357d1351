"""Token shards made by hand: documents of chosen tokens, cut into row groups and files as a test wants them.

Real shards are made by `llmtrain prepare`; these have the same form and a manifest, but no tokenizer beside them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmtrain.data.manifest import Counts, Manifest, RowGroups, Shard, Split, TokenizerRecord, write_manifest
from llmtrain.storage.store import locate

Document = Sequence[int]
Cut = Sequence[Sequence[Sequence[Document]]]
"""Shards, each of them row groups, each of them documents, with their end tokens."""


def write_token_shards(
    folder: Path, splits: Mapping[str, Cut], *, vocab_size: int = 256, eos_id: int = 0, tokenizer_sha256: str = "0" * 64
) -> Manifest:
    """Write `folder`/<split>/shard_00000.parquet … and the manifest. A token counts as three bytes of text."""
    written = {
        name: _split([_shard(folder, f"{name}/shard_{index:05}.parquet", groups) for index, groups in enumerate(cut)])
        for name, cut in splits.items()
    }
    num_documents = {name: split.documents for name, split in written.items()}
    manifest = Manifest(
        tool_version="test",
        options={},
        inputs=(),
        tokenizer=TokenizerRecord(
            kind="bpe", path="tokenizer", sha256=tokenizer_sha256, vocab_size=vocab_size, eos_id=eos_id
        ),
        token_dtype="uint16",
        counts=Counts(
            read=sum(num_documents.values()),
            train=num_documents.get("train", 0),
            val=num_documents.get("val", 0),
            dropped=0,
            empty=0,
            errors=0,
        ),
        splits=written,
    )
    write_manifest(folder, manifest)
    return manifest


def cut_stream(
    tokens: Sequence[int], *, eos_id: int = 0, group_tokens: int = 1000, shard_groups: int = 3
) -> list[list[list[list[int]]]]:
    """A stream's documents, in row groups of at least `group_tokens` tokens, in shards of `shard_groups` of them."""
    documents: list[list[int]] = [[]]
    for token in tokens:
        documents[-1].append(int(token))
        if token == eos_id:
            documents.append([])
    groups: list[list[list[int]]] = [[]]
    for document in filter(None, documents):
        if sum(map(len, groups[-1])) >= group_tokens:
            groups.append([])
        groups[-1].append(document)
    return [groups[begin : begin + shard_groups] for begin in range(0, len(groups), shard_groups)]


def _shard(folder: Path, path: str, groups: Sequence[Sequence[Document]]) -> Shard:
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("source", pa.string()), ("length", pa.int32()), ("tokens", pa.list_(pa.uint16()))])
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for documents in groups:
            columns = [
                [f"test:{index}" for index in range(len(documents))],
                list(map(len, documents)),
                list(map(list, documents)),
            ]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=max(1, len(documents)))
    content = file.read_bytes()
    tokens = tuple(sum(map(len, documents)) for documents in groups)
    row_groups = RowGroups(
        documents=tuple(map(len, groups)), tokens=tokens, bytes=tuple(3 * of_group for of_group in tokens)
    )
    return Shard(
        path=path,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        rows=sum(row_groups.documents),
        tokens=sum(row_groups.tokens),
        bytes=sum(row_groups.bytes),
        row_groups=row_groups,
    )


def _split(shards: Sequence[Shard]) -> Split:
    return Split(
        documents=sum(shard.rows for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )


def copy_to_store(folder: Path, address: str) -> None:
    """Copy a folder of shards, with its manifest, to an address, and files of a tokenizer, which nobody can load."""
    store, prefix = locate(address)
    store.write(f"{prefix}/tokenizer/tokenizer_config.json", b"{}")
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            store.write(f"{prefix}/{file.relative_to(folder).as_posix()}", file.read_bytes())
