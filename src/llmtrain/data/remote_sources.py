"""Find the token shards at an address, by the manifest there, and check that the objects are those that it names.

    s3://bucket/prepared/train ─▶ s3://bucket/prepared/manifest.json ─▶ its shards in train ─▶ RemoteShard of each

For a manifest it takes three requests and one for each thousand shards: the manifest, once for all processes of a
machine; the tokenizer; the list of the objects. Shards on this machine are found in sources.py; remote_shards.py reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llmtrain.data.manifest import MANIFEST_NAME, SPLITS, Manifest, Shard, parse_manifest
from llmtrain.data.range_cache import RangeCache
from llmtrain.data.remote_shards import RemoteShard
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.models.fetch import fetch_tokenizer
from llmtrain.storage.address import Address
from llmtrain.storage.failures import NoObject
from llmtrain.storage.finding import find_places
from llmtrain.storage.store import Entry, Store, open_store


@dataclass(frozen=True)
class RemoteManifest:
    """A manifest that was found in a store."""

    manifest: Manifest
    folder: Address
    """The folder that it lies in."""
    sha256: str
    """Hash of the file."""


def find_remote_shards(
    path: str, cache: RangeCache, *, key: str
) -> Iterator[tuple[RemoteManifest, dict[RemoteShard, Shard]]]:
    """Yield for each manifest that covers a folder, a shard or a glob of these: itself, and its shards there.

    Raises ConfigError where there is no manifest or it is broken, where shards are of several splits, or the objects
    are not those of the manifest, and StorageError where the store fails.
    """
    by_folder: dict[str, list[Address]] = {}
    for place in find_places(path, suffix=".parquet"):
        folder = place.key.rpartition("/")[0] if place.key.endswith(".parquet") else place.key.strip("/")
        by_folder.setdefault(folder, []).append(place)
    by_manifest: dict[str, tuple[RemoteManifest, list[Address]]] = {}
    for places in by_folder.values():
        found = _find_manifest(places[0], cache, key=key)
        by_manifest.setdefault(str(found.folder), (found, []))[1].extend(places)
    for found, places in by_manifest.values():
        yield found, _remote_shards(found, places, cache, key=key)


def _find_manifest(place: Address, cache: RangeCache, *, key: str) -> RemoteManifest:
    """Read the manifest that covers the address: of its folder or, below <out>/train or <out>/val, of one above."""
    store = open_store(place)
    for folder in _folders(place):
        name = _below(folder.key, MANIFEST_NAME)
        try:
            entry = store.stat(name)
        except NoObject:
            continue
        content = _read_once(store, entry, cache)
        address = folder.joined(name).shown
        return RemoteManifest(parse_manifest(content, name=address), folder, hashlib.sha256(content).hexdigest())
    raise ConfigError(
        f"{key}: {place.shown}: no {MANIFEST_NAME} there or in the folder above, so there are no complete token "
        "shards: name a folder that `llmtrain prepare CONFIG` made and that was copied there, or correct the address"
    )


def _remote_shards(
    found: RemoteManifest, places: Sequence[Address], cache: RangeCache, *, key: str
) -> dict[RemoteShard, Shard]:
    """Return the manifest's shards that the places are or hold, in its order."""
    inside = {PurePosixPath(place.key.strip("/")).relative_to(found.folder.key) for place in places}
    chosen = {
        shard.path: (name, shard)
        for name, split in found.manifest.splits.items()
        for shard in split.shards
        if not inside.isdisjoint((path := PurePosixPath(shard.path), *path.parents))
    }
    check_one_split({name for name, _ in chosen.values()}, path=places[0].shown, key=key)
    if not chosen:
        name = found.folder.joined(_below(found.folder.key, MANIFEST_NAME)).shown
        raise ConfigError(f"{key}: {name} names no shards at {places[0].shown}: correct the address")
    if found.folder.scheme not in ("http", "https"):  # which list nothing; the footers will tell
        _check_objects(found, places, {path: shard for path, (_, shard) in chosen.items()})
    shards = {}
    for _, shard in chosen.values():
        address = found.folder.joined(_below(found.folder.key, shard.path))
        remote = RemoteShard(
            address=str(address),
            size=shard.size,
            rows=shard.rows,
            num_row_groups=len(shard.row_groups.tokens),
            sha256=shard.sha256,
            cache=cache,
        )
        shards[remote] = shard
    return shards


def fetch_tokenizer_folder(found: RemoteManifest) -> Path:
    """Return a folder on this machine with the tokenizer that made the shards.

    Raises ConfigError where there is none, or another one.
    """
    record = found.manifest.tokenizer
    address = found.folder.joined(_below(found.folder.key, record.path))
    folder = fetch_tokenizer(str(address), local_files_only=False)
    if (folder / "tokenizer.json").is_file() and load_tokenizer(folder).sha256 != record.sha256:
        raise ConfigError(
            f"{address.shown}: it is not the tokenizer that made the shards: copy the folder that "
            "`llmtrain prepare CONFIG` made there again"
        )
    return folder


def check_one_split(splits: Collection[str], *, path: str, key: str) -> None:
    """Raise ConfigError for shards of several splits."""
    if len(splits) > 1:
        raise ConfigError(
            f"{key}: {path} holds the splits {' and '.join(sorted(splits))}, which must not be mixed: "
            f"name one of them, such as {path.rstrip('/')}/{key.rsplit('.', 1)[-1]}"
        )


def _folders(place: Address) -> list[Address]:
    """Return the folders in which a manifest that covers the address may lie, the nearest first."""
    key = PurePosixPath(place.key.strip("/"))
    folders = (key, *key.parents[:3])
    parts = [(folder, key.relative_to(folder).parts) for folder in folders]
    return [place.joined(_below(str(folder))) for folder, below in parts if not below or below[0] in SPLITS]


def _below(folder: str, *names: str) -> str:
    """Return the key of something in a folder; a bucket has no name of its own."""
    return "/".join(part for part in (folder.strip("/"), *names) if part not in ("", "."))


def _read_once(store: Store, entry: Entry, cache: RangeCache) -> bytes:
    """Return an object's content, which the processes of a machine read once where the store says its version."""
    if entry.etag is None:
        return store.read(entry.key)
    version = hashlib.sha256(f"{store.root} {entry.key} {entry.etag} {entry.size}".encode()).hexdigest()
    return cache.get(f"object-{version[:32]}", lambda: store.read(entry.key))


def _check_objects(found: RemoteManifest, places: Sequence[Address], shards: Mapping[str, Shard]) -> None:
    """Raise ConfigError where an object is missing, has another size, or is not in the manifest."""
    folder, store = found.folder, open_store(found.folder)
    files = {place.key for place in places if place.key.endswith(".parquet")}
    folders = {place.key.strip("/") for place in places if place.key not in files}
    entries = [entry for one in folders for entry in store.list(one)]
    if len(files) == 1:
        entries += map(store.stat, files)
    else:  # to list their folders takes fewer requests
        parents = {file.rpartition("/")[0] for file in files}
        entries += [entry for one in parents for entry in store.list(one) if entry.key in files]
    sizes = {entry.key: entry.size for entry in entries}
    copy = "copy the folder that `llmtrain prepare CONFIG` made there again, with its manifest"
    for path, shard in shards.items():
        key = _below(folder.key, path)
        if key not in sizes:
            raise ConfigError(f"{folder.joined(key).shown}: the manifest names this shard, but it is missing: {copy}")
        if sizes[key] != shard.size:
            raise ConfigError(
                f"{folder.joined(key).shown}: has {sizes[key]} bytes, but the manifest says {shard.size}: it was cut "
                f"off or changed. {copy.capitalize()}"
            )
    known = {_below(folder.key, path) for path in shards}
    strangers = sorted(key for key in sizes if key.endswith(".parquet") and key not in known)
    if strangers:
        more = f" (and {len(strangers) - 1} more)" if len(strangers) > 1 else ""
        raise ConfigError(
            f"{folder.joined(strangers[0]).shown}{more} is not in its {MANIFEST_NAME}: left over from "
            "an earlier copy, or put there by hand. Remove it"
        )
