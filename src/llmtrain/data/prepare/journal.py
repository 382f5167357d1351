"""Record which parts of a preparation are done, so that one that was killed goes on where it was.

    <partial>/journal.jsonl      one line for each thing done, on disk before the next is begun
        {"key": …}               what is being made: of which texts, with which options, by which version
        {"tokenizer": …}         the tokenizer is saved
        {"shard": …}             a shard is whole, with its record in the manifest

What is in the folder and not in the journal was begun and not finished, and is removed. A journal of something else
counts for nothing. It is taken away before the folder takes its place.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from llmtrain.data.manifest import Shard, TokenizerRecord
from llmtrain.faults import reach
from llmtrain.screen import counted

logger = logging.getLogger("llmtrain.prepare")

_NAME = "journal.jsonl"


class Journal:
    """The journal of a folder that is being made. Made by `open_journal`."""

    def __init__(self, folder: Path, entries: list[dict[str, Any]]) -> None:
        self._path = folder / _NAME
        self._entries = entries

    def tokenizer(self) -> TokenizerRecord | None:
        """Return the record of the tokenizer; None before it is saved."""
        found = (entry["tokenizer"] for entry in self._entries if "tokenizer" in entry)
        return next((TokenizerRecord.model_validate(record) for record in found), None)

    def add_tokenizer(self, record: TokenizerRecord) -> None:
        """Record that the tokenizer is saved, and on disk for good."""
        self._append({"tokenizer": record.model_dump(mode="json")})

    def shards(self) -> dict[str, list[Shard]]:
        """Return the shards that are whole, by their folder (train, train/<subset>, val …), in their order."""
        found: dict[str, list[Shard]] = {}
        for entry in self._entries:
            if "shard" in entry:
                shard = Shard.model_validate(entry["shard"])
                found.setdefault(shard.path.rpartition("/")[0], []).append(shard)
        return found

    def add_shard(self, shard: Shard) -> None:
        """Record that a shard is whole, and on disk for good."""
        reach("shard-written", path=shard.path)
        self._append({"shard": shard.model_dump(mode="json")})
        reach("shard-noted", path=shard.path)

    def remove(self) -> None:
        """All is done."""
        self._path.unlink()

    def _append(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._entries.append(entry)


def open_journal(folder: Path, *, key: object, keep: str) -> Journal:
    """Return the journal in `folder` if it is for `key`, with all else removed, or a new one in the emptied folder.

    `key` is anything that JSON can hold; the file `keep` stays in any case.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    entries = _read(folder / _NAME)
    if not entries or entries[0].get("key") != digest:
        _clear(folder, keep={keep})
        journal = Journal(folder, [])
        journal._append({"key": digest})
        return journal
    entries = _whole(folder, entries)
    shards = {entry["shard"]["path"] for entry in entries if "shard" in entry}
    tokenizers = {entry["tokenizer"]["path"] for entry in entries if "tokenizer" in entry}
    _clear(folder, keep={_NAME, keep, *shards, *tokenizers})
    (folder / _NAME).write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    logger.info("%s: going on where a preparation was cut off, with %s done", folder, counted(len(shards), "shard"))
    return Journal(folder, entries)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    entries = []
    for line in lines[:-1]:  # what stands after the last line end was cut off
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _whole(folder: Path, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries up to the first whose files are not there as they were written."""
    for index, entry in enumerate(entries):
        if "tokenizer" in entry and not (folder / entry["tokenizer"]["path"] / "tokenizer.json").is_file():
            return entries[:index]
        if "shard" in entry:
            path = folder / entry["shard"]["path"]
            if not path.is_file() or path.stat().st_size != entry["shard"]["size"]:
                return entries[:index]
    return entries


def _clear(folder: Path, *, keep: set[str]) -> None:
    """Remove all that is not in `keep` (paths in the folder; one of a folder stands for what is in it)."""
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if not path.is_dir():
            path.unlink()
        elif any(kept.startswith(path.name + "/") for kept in keep):
            _clear(path, keep={kept.removeprefix(path.name + "/") for kept in keep if kept.startswith(path.name + "/")})
        else:
            shutil.rmtree(path)
