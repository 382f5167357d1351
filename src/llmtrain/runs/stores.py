"""Runs in a store: the folder of this machine in which each is kept, and what is fetched into it.

    s3://bucket/runs/RUN  ⇄  <cache>/runs/s3/bucket/runs/RUN

A run is always written in its folder here, and `upload` copies it to the store. What others uploaded is fetched: the
records of runs (all but checkpoints) to list and report them, checkpoints to resume or use them. The file `.store.json`
in the folder says what the copy is. Where it holds what the store lacks, the copy is the run; else the store is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from filelock import FileLock

from llmtrain.atomic import follow, point, replacing, write_json
from llmtrain.errors import ConfigError
from llmtrain.local_paths import STORE, STORES_OF_RUNS, checked_path
from llmtrain.storage.address import is_remote, local_path, parse_address
from llmtrain.storage.failures import AccessDenied, NoObject, StorageError
from llmtrain.storage.local_copies import cache_folder, write_stream
from llmtrain.storage.store import Entry, Store, locate

log = logging.getLogger("llmtrain.store")

CHECKPOINTS: Final = "checkpoints/"
MANIFEST: Final = "MANIFEST.json"
"""The file that makes a checkpoint count: it comes last, and goes first."""
POINTERS: Final = ("latest", "best", "final")
UPLOAD: Final = "upload.json"
"""Names the process that uploads the run, or did so last; in the store alone."""
COPY_RECORD: Final = ".store.json"
_MODEL_ONLY: Final = ".fetched.json"
"""The manifest of a checkpoint of which all but the optimizer was fetched."""


@dataclass
class CopyRecord:
    """Content of a copy's `.store.json`."""

    known: list[str] = field(default_factory=list)
    """Attempts that the copy continues, the last one first. Any other attempt is another course of the run."""
    pending: bool = False
    """True if the copy may hold what the store lacks."""
    etags: dict[str, str | None] = field(default_factory=dict)
    """Etag of each record when it was fetched."""
    bytes: int = 0
    """Size of the run in the store."""

    @classmethod
    def of(cls, run: Path) -> CopyRecord:
        """Read the record of a copy; an empty one without it."""
        try:
            return cls(**json.loads((run / COPY_RECORD).read_bytes()))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, run: Path) -> None:
        """Write the record. Raises OSError."""
        write_json(run / COPY_RECORD, asdict(self))


@dataclass(frozen=True)
class StoredRun:
    """The objects of a run."""

    store: Store
    key: str
    """The key of its folder, without a slash at the end."""
    entries: dict[str, Entry]
    """Objects by their path in the run."""

    @classmethod
    def at(cls, address: str) -> StoredRun:
        """List the objects of the run at an address. Raises StorageError, and ConfigError as `open_store` does."""
        store, key = locate(address.rstrip("/"))
        found = store.list(key)
        return cls(store, key, {entry.key.removeprefix(f"{key}/"): entry for entry in found})

    @property
    def is_run(self) -> bool:
        """Return whether a run is there."""
        return {"config.yaml", "meta.json"} <= self.entries.keys()

    def read(self, name: str) -> bytes:
        """Return an object. Raises StorageError."""
        return self.store.read(f"{self.key}/{name}")

    def checkpoints(self) -> list[str]:
        """Return the names of checkpoints whose manifest is there, those of the highest number first."""
        ends = f"/{MANIFEST}"
        names = [name[len(CHECKPOINTS) : -len(ends)] for name in self.entries if name.endswith(ends)]
        return sorted(names, key=lambda name: self._sequence(name), reverse=True)

    def _sequence(self, name: str) -> tuple[int, str]:
        manifest = parsed(self.read(f"{CHECKPOINTS}{name}/{MANIFEST}"))
        return (int(manifest.get("sequence", 0)), name)


# -- names -------------------------------------------------------------------------------------------------------------


def runs_folder(root_dir: str) -> Path:
    """Return the folder of runs that `root_dir` names: itself, or for an address the one that mirrors it.

    Raises ConfigError for a store in which no run can be kept.
    """
    if not is_remote(root_dir):
        return Path(local_path(root_dir))
    place = parse_address(checked_path(root_dir, STORE))
    parts = [part for part in f"{place.bucket}/{place.key}".split("/") if part]
    if ".." in parts:
        raise ConfigError(f"{place.shown} has .. in it: write the address without")
    return _mirrors().joinpath(place.scheme, *parts)


def address_of(folder: Path) -> str | None:
    """Return the address of a folder below one that `runs_folder` returned for an address; None for any other."""
    try:
        parts = folder.absolute().relative_to(_mirrors()).parts
    except ValueError:
        return None
    return f"{parts[0]}://{'/'.join(parts[1:])}" if len(parts) > 1 else None


def _mirrors() -> Path:
    return cache_folder().resolve() / "runs"


# -- fetching ----------------------------------------------------------------------------------------------------------


def fetched_runs(root_dir: str, only: str | None = None) -> Path:
    """Return the folder of `root_dir`; at an address, first fetch the records of its runs.

    `only`: the one that is wanted, an id or latest; any other text wants all. Raises ConfigError and StorageError.
    """
    root = runs_folder(root_dir)
    if not is_remote(root_dir) or (only is not None and (is_remote(only) or "/" in only)):
        return root
    root.mkdir(parents=True, exist_ok=True)
    latest = _latest(root_dir, root) if only in (None, "latest") else None
    only = latest if only == "latest" else only
    if only is None or fetch_run(f"{root_dir.rstrip('/')}/{only}") is None:
        found = {run.key.rpartition("/")[2]: run for run in _list_runs(root_dir)}
        for name, run in found.items():
            fetch_records(root / name, run)
        latest = latest if latest in found else max(found, default=None)
    if latest is not None and not CopyRecord.of(follow(root / "latest")).pending:
        point(root / "latest", latest)
    return root


def fetch_run(address: str) -> tuple[Path, Path | None] | None:
    """Fetch the records of the run at an address; of a checkpoint's address, those of its run and all of it.

    Return the folder of the run here, and that of the checkpoint; None if there is no run. Where the store fails, a
    copy that holds what the store lacks is enough. Raises StorageError, and ConfigError as `open_store` does.
    """
    if parse_address(address).scheme not in STORES_OF_RUNS:
        return None
    before, _, inside = address.rstrip("/").partition(f"/{CHECKPOINTS}")
    parent, _, last = before.removesuffix("/model").rpartition("/")
    run_address = f"{parent}/{(_pointer(parent, last) or last) if last == 'latest' else last}"
    run = runs_folder(run_address)
    try:
        stored = StoredRun.at(run_address)
        if stored.is_run:
            fetch_records(run, stored)
    except StorageError as error:
        if not CopyRecord.of(run).pending:
            raise ConfigError(str(error)) if isinstance(error, AccessDenied | NoObject) else error from error
        log.warning("%s: going by the copy in %s, which is the newest", error, run)
    if not (run / "config.yaml").is_file():
        return None
    if not inside:
        return run, None
    checkpoint = follow(run / CHECKPOINTS / inside.split("/")[0])
    if not (checkpoint / MANIFEST).is_file() and not fetch_checkpoint(checkpoint):
        raise ConfigError(f"{address}: the run has no such checkpoint in the store that is as it was written")
    return run, checkpoint


def fetch_records(run: Path, stored: StoredRun) -> None:
    """Bring a run's folder here up to what is in the store, without checkpoints; those that are gone there are deleted.

    A copy that may hold what the store lacks stays as it is, unless the run was continued elsewhere since: then it is
    set aside. Raises StorageError and OSError.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    with _locked_copy(run):
        kept = CopyRecord.of(run)
        theirs = parsed(stored.read(UPLOAD)).get("attempt") if UPLOAD in stored.entries else None
        if kept.pending:
            if theirs is None or theirs in kept.known:
                return
            aside = cache_folder().resolve() / "left" / f"{run.name}-{time.time_ns()}"
            aside.parent.mkdir(exist_ok=True)
            os.rename(run, aside)
            log.warning("%s was continued elsewhere: what was not uploaded from here is in %s", run.name, aside)
            kept = CopyRecord()
        etags = {}
        for name, entry in stored.entries.items():
            inside = name.removeprefix(CHECKPOINTS)
            if inside != name and inside not in POINTERS:
                continue
            etags[name] = entry.etag
            if (run / name).exists() and entry.etag is not None and kept.etags.get(name) == entry.etag:
                continue
            content = stored.read(name)
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            if inside in POINTERS and inside != name:
                point(run / name, content.decode().strip())
            else:
                with replacing(run / name) as file:
                    file.write(content)
        _delete_stale_checkpoints(run, stored)
        size = sum(entry.size for entry in stored.entries.values())
        CopyRecord([theirs] if theirs else [], False, etags, size).write(run)


def fetch_newest(run: Path) -> None:
    """Fetch what a resume needs: the newest complete checkpoint, and those that `best` and `final` mean.

    A checkpoint that is damaged in the store is passed over, with a warning. Raises StorageError and OSError.
    """
    address = address_of(run)
    if address is None or CopyRecord.of(run).pending:
        return
    stored = StoredRun.at(address)
    with _locked_copy(run):
        names = stored.checkpoints()
        for name in names:
            if _fetch(stored, name, run, _everything):
                break
        for pointer in ("best", "final"):
            target = follow(run / CHECKPOINTS / pointer).name
            if target in names:
                _fetch(stored, target, run, _everything)


def fetch_checkpoint(folder: Path) -> bool:
    """Fetch a whole checkpoint of a run in a store into its folder. Return whether it is there, and as it was written.

    Raises StorageError and OSError.
    """
    return _fetch_into(folder, _everything)


def has_model(checkpoint: Path) -> bool:
    """Return whether a checkpoint is there; of a run in a store, once all but its optimizer is fetched."""
    return checkpoint.exists() or _fetch_into(checkpoint, lambda name: not name.startswith("optimizer/"))


def _fetch_into(folder: Path, wanted: Callable[[str], bool]) -> bool:
    run = folder.parent.parent
    address = address_of(run)
    if address is None:
        return False
    stored = StoredRun.at(address)
    with _locked_copy(run):
        return f"{CHECKPOINTS}{folder.name}/{MANIFEST}" in stored.entries and _fetch(stored, folder.name, run, wanted)


def _everything(_: str) -> bool:
    return True


def _fetch(stored: StoredRun, name: str, run: Path, wanted: Callable[[str], bool]) -> bool:
    """Fetch the files of a checkpoint, each checked by the manifest. Return False if the store's are not as it says."""
    folder, here = f"{CHECKPOINTS}{name}", run / CHECKPOINTS / name
    manifest = stored.read(f"{folder}/{MANIFEST}")
    if same_files(manifest, manifest_in(here)):
        with replacing(here / MANIFEST) as file:  # its number may have changed
            file.write(manifest)
        return True
    temporary = run / CHECKPOINTS / f".fetched-{name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        log.info("%s: fetching %s into %s", run.name, name, here.parent)
        files = {path: about for path, about in files_in(manifest).items() if wanted(path)}
        for path, about in files.items():
            if not _fetch_file(stored, f"{folder}/{path}", temporary / path, about):
                log.warning("%s in the store is damaged: %s is not as %s says", run.name, f"{folder}/{path}", MANIFEST)
                return False
        is_complete = len(files) == len(files_in(manifest))
        (temporary / (MANIFEST if is_complete else _MODEL_ONLY)).write_bytes(manifest)
        shutil.rmtree(here, ignore_errors=True)
        os.rename(temporary, here)
        return bool(files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch_file(stored: StoredRun, name: str, path: Path, about: Mapping[str, Any]) -> bool:
    """Fetch one file. Return whether it has the size and the sha256 that `about` says."""
    entry = stored.entries.get(name)
    if entry is None or entry.size != about["size"]:
        return False
    return bool(write_stream(stored.store.open(entry.key, size=entry.size), path) == about["sha256"])


def _delete_stale_checkpoints(run: Path, stored: StoredRun) -> None:
    """Delete the checkpoints here that the store no longer has, or has with other files."""
    for folder in (run / CHECKPOINTS).glob("[!.]*/"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        name = f"{CHECKPOINTS}{folder.name}/{MANIFEST}"
        here = manifest_in(folder) or manifest_in(folder, _MODEL_ONLY)
        if name not in stored.entries or not same_files(stored.read(name), here):
            shutil.rmtree(folder, ignore_errors=True)


# -- what is in the store ----------------------------------------------------------------------------------------------


def check_store(root_dir: str, run_id: str | None) -> None:
    """Ask whether a new run can be kept in the store. Raises ConfigError where it cannot, or has the id already.

    A store that does not answer is a warning: the run is uploaded when it does.
    """
    try:
        store, key = locate(root_dir.rstrip("/"))
        if run_id is not None and StoredRun.at(f"{root_dir.rstrip('/')}/{run_id}").is_run:
            address = f"{root_dir.rstrip('/')}/{run_id}"
            raise ConfigError(
                f"{address} exists already: give another output.run_id, or go on with that run: "
                f"llmtrain train --resume {address}"
            )
        if run_id is None:
            next(iter(store.list(f"{key}/.none" if key else ".none")), None)
    except (AccessDenied, NoObject) as error:
        raise ConfigError(f"output.root_dir: {error}") from error
    except StorageError as error:
        log.warning("%s. The run begins all the same, and is uploaded when the store answers", error)


def delete_run(address: str) -> None:
    """Delete a run in a store, first what makes it a run. Raises StorageError."""
    stored = StoredRun.at(address)
    first = ("config.yaml", "meta.json")
    for name in (*first, *(name for name in stored.entries if name not in first)):
        stored.store.delete(f"{stored.key}/{name}")


def parsed(content: bytes | None) -> dict[str, Any]:
    """Return a JSON object; {} for anything else."""
    try:
        found = json.loads(content or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def manifest_in(folder: Path, name: str = MANIFEST) -> bytes | None:
    """Return the manifest of a checkpoint here; None if it cannot be read."""
    try:
        return (folder / name).read_bytes()
    except OSError:
        return None


def files_in(manifest: bytes | None) -> dict[str, Any]:
    """Return what a checkpoint's manifest says of its files; {} for what is no manifest."""
    found = parsed(manifest).get("files")
    return found if isinstance(found, dict) else {}


def same_files(manifest: bytes | None, other: bytes | None) -> bool:
    """Return whether two manifests are of the same files, though the checkpoint may have another number."""
    return bool(files_in(manifest)) and files_in(manifest) == files_in(other)


def _list_runs(root_dir: str) -> Iterator[StoredRun]:
    everything = StoredRun.at(root_dir)
    found: dict[str, dict[str, Entry]] = {}
    for name, entry in everything.entries.items():
        run, slash, inside = name.partition("/")
        if slash:
            found.setdefault(run, {})[inside] = entry
    for name, entries in found.items():
        stored = StoredRun(everything.store, f"{everything.key}/{name}" if everything.key else name, entries)
        if stored.is_run:
            yield stored


def _latest(root_dir: str, root: Path) -> str | None:
    """Return the id of the newest run; where the store fails, that of the copies here, if it is not uploaded yet."""
    try:
        return _pointer(root_dir, "latest")
    except StorageError:
        here = follow(root / "latest")
        if not CopyRecord.of(here).pending:
            raise
        return here.name


def _pointer(folder: str, name: str) -> str | None:
    store, key = locate(f"{folder.rstrip('/')}/{name}")
    try:
        target = store.read(key).decode().strip()
    except NoObject:
        return None
    return target if "/" not in target else None


@contextmanager
def _locked_copy(run: Path) -> Iterator[None]:
    """Let one process of this machine fetch at a time; the others wait."""
    with FileLock(run.with_name(f".{run.name}.lock")):
        yield
