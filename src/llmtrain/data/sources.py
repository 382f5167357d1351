"""Turn the paths of a config into checked token shards: find the files of a source and compare them with manifests.

A shard is read only if a manifest lists it and its size is the one that was written. A folder has to hold all the
shards that its manifest names and no others, so that files of an earlier `prepare` never mix in. Shards without a
manifest, as other tools write them, are read when the config names the tokenizer that made them. shards.py reads the
tokens.
"""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from llmtrain.data.footers import read_footers
from llmtrain.data.manifest import SPLITS, Manifest, Shard, TokenizerRecord, find_manifest, read_manifest
from llmtrain.data.prepare.output import resolve_cache_dir
from llmtrain.data.range_cache import RangeCache
from llmtrain.data.remote_shards import RemoteShard
from llmtrain.data.remote_sources import check_one_split, fetch_tokenizer_folder, find_remote_shards
from llmtrain.data.shards import TokenStream
from llmtrain.data.tokenizers import Tokenizer, load_hf_tokenizer, load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.address import is_remote

PREPARE = "`llmtrain prepare CONFIG`"


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """Token shards that are read one after the other, as one stream."""

    name: str
    """Name in messages: the paths as they were given."""
    stream: TokenStream
    num_documents: int
    num_bytes: int | None
    """UTF-8 bytes of the text that the tokens were made from; None where they are not known."""
    tokenizer: TokenizerRecord
    tokenizer_folder: Path
    content_sha256: str
    """Hash of the shards' hashes, in their order."""


@dataclass(frozen=True)
class GivenTokenizer:
    """The tokenizer of shards that have no manifest, which the config names."""

    record: TokenizerRecord
    folder: Path
    cache_dir: Path
    """Folder for the index of these shards, where it cannot lie beside them."""


def open_given_tokenizer(name_or_path: str, *, cache_dir: str) -> GivenTokenizer:
    """Open the tokenizer in a folder, or one of the Hub (a copy is kept in `cache_dir`).

    Raises ConfigError when there is none, or it has no end token.
    """
    cache = resolve_cache_dir(cache_dir)
    folder = Path(os.path.abspath(os.path.expanduser(name_or_path)))
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = load_hf_tokenizer(name_or_path)
        folder = _keep(tokenizer, cache)
    record = TokenizerRecord(
        kind="hf", path=str(folder), sha256=tokenizer.sha256, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    return GivenTokenizer(record, folder, cache)


def _keep(tokenizer: Tokenizer, cache: Path) -> Path:
    """Save the tokenizer in the cache, completely or not at all; if that is read-only, in a temporary folder."""
    folder = cache / "tokenizers" / tokenizer.sha256[:32]
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError:
        temporary = Path(tempfile.mkdtemp(prefix="llmtrain-tokenizer-"))
        tokenizer.save(temporary)
        return temporary
    tokenizer.save(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(temporary)
    return folder


def open_source(
    paths: str | Sequence[str], *, key: str, given: GivenTokenizer | None = None, cache: RangeCache | None = None
) -> ShardSource:
    """Open the shards at `paths`: folders (recursive), files or globs of these, here or at addresses.

    `key` is the config's, for messages. Shards without a manifest were made by the `given` tokenizer. `cache` keeps
    what is read of stores. Raises ConfigError when there are no shards, when they are not those that a manifest
    describes, when they were made with different tokenizers, or when they hold fewer than two tokens; StorageError when
    a store fails.
    """
    paths = [os.path.expanduser(path) for path in ([paths] if isinstance(paths, str) else paths)]
    found: dict[Path | RemoteShard, Shard] = {}
    tokenizers: list[tuple[str, TokenizerRecord, Path]] = []
    for path in paths:
        for tokenizer, folder, shards in _found_at(path, key=key, given=given, cache=cache):
            tokenizers.append((path, tokenizer, folder))
            for file, shard in shards.items():
                if file in found:
                    raise ConfigError(f"{key}: {file} is named twice; its tokens would come twice in an epoch")
                found[file] = shard
    name = ", ".join(paths)
    first_path, tokenizer, tokenizer_folder = tokenizers[0]
    if given is not None and (given.record.vocab_size, given.record.eos_id) != (tokenizer.vocab_size, tokenizer.eos_id):
        check_same_tokenizer(tokenizer, given.record, names=(first_path, f"data.tokenizer ({given.folder})"), key=key)
    for path, other, _ in tokenizers[1:]:
        check_same_tokenizer(tokenizer, other, names=(first_path, path), key=key)
    stream = TokenStream.of([(file, shard.row_groups.tokens) for file, shard in found.items()])
    if stream.num_tokens < 2:
        raise ConfigError(
            f"{key}: {name} holds {counted(stream.num_tokens, 'token')}: there is nothing to predict; prepare more"
        )
    return ShardSource(
        name=name,
        stream=stream,
        num_documents=sum(shard.rows for shard in found.values()),
        num_bytes=None
        if any(shard.tokens and not shard.bytes for shard in found.values())
        else sum(shard.bytes for shard in found.values()),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        content_sha256=sha256(" ".join(shard.sha256 for shard in found.values()).encode()).hexdigest(),
    )


def check_same_tokenizer(one: TokenizerRecord, other: TokenizerRecord, *, names: tuple[str, str], key: str) -> None:
    """Raise ConfigError unless the two sources were made with the same tokenizer."""
    if (one.sha256, one.vocab_size, one.eos_id) != (other.sha256, other.vocab_size, other.eos_id):
        raise ConfigError(
            f"{key}: {names[0]} and {names[1]} were made with different tokenizers (vocabularies of {one.vocab_size} "
            f"and {other.vocab_size}): prepare one of them again with the tokenizer of the other"
        )


def _found_at(
    path: str, *, key: str, given: GivenTokenizer | None, cache: RangeCache | None
) -> Iterator[tuple[TokenizerRecord, Path, Mapping[Path, Shard] | Mapping[RemoteShard, Shard]]]:
    """Yield for each manifest that covers `path`: its tokenizer, the tokenizer's folder, and the shards by file."""
    if is_remote(path):
        assert cache is not None, "a store's shards need a cache"
        for found, shards in find_remote_shards(path, cache, key=key):
            yield found.manifest.tokenizer, fetch_tokenizer_folder(found), shards
        return
    for folder, tokenizer, named in _shards_at(path, key=key, given=given):
        files = {folder / shard.path: shard for shard in named}
        for file, shard in files.items():
            _check_size(file, shard)
        yield tokenizer, folder / tokenizer.path, files


def _shards_at(
    path: str, *, key: str, given: GivenTokenizer | None
) -> Iterator[tuple[Path, TokenizerRecord, list[Shard]]]:
    """Yield for each manifest that covers `path`: its folder, its tokenizer, and those of its shards that `path` names.

    Then yield the same of the shards without a manifest.
    """
    named = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
    folders = [Path(os.path.abspath(entry)) for entry in named if os.path.isdir(entry)]
    files = {Path(os.path.abspath(entry)) for entry in named if entry.endswith(".parquet") and os.path.isfile(entry)}
    for folder in folders:
        files.update(folder.rglob("*.parquet"))
    owners = {folder: find_manifest(folder) for folder in {*folders, *(file.parent for file in files)}}
    bare = sorted(file for file in files if owners[file.parent] is None)
    if bare and given is None:
        raise ConfigError(
            f"{key}: {bare[0]} belongs to no manifest.json, so it is no complete output of `llmtrain prepare`: "
            f"make the shards with {PREPARE}, or name the tokenizer that made them in data.tokenizer"
        )
    chosen: list[tuple[Path, TokenizerRecord, list[Shard]]] = []
    for owner in sorted({owner for owner in owners.values() if owner is not None}):
        manifest = read_manifest(owner)
        shards = _chosen_shards(owner, manifest, path=path, folders=folders, files=files, key=key)
        _check_strangers(owner, manifest, [file for file in files if owners[file.parent] == owner])
        if shards:
            chosen.append((owner, manifest.tokenizer, shards))
    if bare and given is not None:
        _check_one_split(path, folders, bare, key=key)
        shards = read_footers(bare, vocab_size=given.record.vocab_size, key=key, cache_dir=given.cache_dir)
        chosen.append((given.folder, given.record, shards))  # their paths are absolute, like the tokenizer's
    if not chosen:
        raise ConfigError(f"{key}: there are no token shards at {path}: make them with {PREPARE}, or correct the path")
    yield from chosen


def _chosen_shards(
    owner: Path, manifest: Manifest, *, path: str, folders: list[Path], files: set[Path], key: str
) -> list[Shard]:
    """Return those of the manifest's shards that are in the folders or among the files, in the manifest's order."""
    chosen: list[Shard] = []
    splits: set[str] = set()
    for name, split in manifest.splits.items():
        for shard in split.shards:
            file = owner / shard.path
            if file in files or any(folder in file.parents for folder in folders):
                chosen.append(shard)
                splits.add(name)
    check_one_split(splits, path=path, key=key)
    return chosen


def _check_one_split(path: str, folders: list[Path], files: list[Path], *, key: str) -> None:
    """Raise ConfigError when a folder holds a training and a validation split, by the names of its folders."""
    for folder in folders:
        below = {file.relative_to(folder).parts[0] for file in files if folder in file.parents}
        if below >= set(SPLITS):
            check_one_split(SPLITS, path=path, key=key)


def _check_strangers(owner: Path, manifest: Manifest, files: list[Path]) -> None:
    known = {owner / shard.path for split in manifest.splits.values() for shard in split.shards}
    strangers = sorted(set(files) - known)
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise ConfigError(
            f"{strangers[0]}{more} is not in {owner / 'manifest.json'}: left over from an earlier run, or put there by "
            f"hand. Remove it, or make the shards again with {PREPARE}"
        )


def _check_size(file: Path, shard: Shard) -> None:
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        raise ConfigError(f"{file}: the manifest names this shard, but it is missing: make it with {PREPARE}") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    if size != shard.size:
        what = "is empty" if size == 0 else f"has {size} bytes"
        raise ConfigError(
            f"{file}: {what}, but the manifest says {shard.size}: it was cut off or changed. "
            f"Copy it again, or make it with {PREPARE}"
        )
