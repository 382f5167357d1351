"""Tokenised rows on disk: written once, opened by every rank and worker through memory mapping, without torch.

    <folder>/manifest.json   the key, the counts, size and SHA-256 of each file; written last
    <folder>/input_ids.bin   int32, the tokens of all samples, one after the other
    <folder>/supervised.bin  bool, for each token whether the model learns to write it
    <folder>/starts.bin      int64 [num_samples + 1], where each sample begins in both, and the end of the last one
    <folder>/sources.txt     a line for each sample: `file:line` of its row

Integers are little-endian. The key says what the samples were made from (rows, tokenizer, template, options). Samples
of another key are rejected, or made again, and a message names what has changed. A folder is complete or not there
(`data.prepare.output`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.unused import Unused
from llmtrain.data.manifest import MANIFEST_NAME
from llmtrain.data.order import Ints
from llmtrain.data.prepare.output import output_lock, staged_output
from llmtrain.errors import ConfigError

logger = logging.getLogger("llmtrain.data")

FORMAT_VERSION: Final = 3
_FILES = ("input_ids.bin", "supervised.bin", "starts.bin", "sources.txt")
_MADE_BY_US = re.compile("|".join(map(re.escape, (MANIFEST_NAME, *_FILES))) + r"|manifest\.json\.(\d+\.)?tmp")
_OUTPUT_KEY = "data.cache_dir"
_FOLDER_PREFIX = "samples-"


class FileRecord(BaseModel):
    """Size and hash of one of the files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Account(BaseModel):
    """Counts and remarks from reading the rows. They are logged again wherever the samples are used."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = 0
    """Rows that were read, also those with faults and those that are left out."""
    notes: tuple[str, ...] = ()
    """Sentences about what was cut off and left out."""
    warnings: tuple[str, ...] = ()
    """Sentences about what is suspicious."""
    unused: dict[str, Unused] = {}
    """Unused values of the rows, by name."""


class SamplesManifest(BaseModel):
    """The metadata of a folder of samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[3] = 3
    about: str
    """The rows by name, in words that stay the same when their content, or what is made of them, changes."""
    key: dict[str, str]
    samples: int
    tokens: int
    supervised_tokens: int
    account: Account
    files: dict[str, FileRecord]


class SampleStore:
    """The samples of a folder, read from memory-mapped files. A copy in another process opens the files for itself."""

    def __init__(self, folder: Path, manifest: SamplesManifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> Sample:
        return Sample(*self.tokens(index), self.source(index))

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "manifest": self.manifest}

    def source(self, index: int) -> str:
        """Return `file:line` of the sample's row."""
        return self._sources[index]

    def tokens(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the sample's `input_ids` and `supervised`, both [n], as views of the files."""
        begin, end = self._starts[index : index + 2].tolist()
        return self._input_ids[begin:end], self._supervised[begin:end]

    @property
    def name(self) -> str:
        """Name of the data in messages."""
        return str(self.folder)

    @cached_property
    def lengths(self) -> Ints:
        """[num_samples] tokens of each sample."""
        return np.diff(self._starts)

    @cached_property
    def num_supervised(self) -> Ints:
        """[num_samples] supervised tokens of each sample."""
        return np.add.reduceat(self._supervised, self._starts[:-1], dtype=np.int64)

    @property
    def content_sha256(self) -> str:
        """Hash of the samples in their order, wherever the folder lies; names of files do not count."""
        names = ("input_ids.bin", "supervised.bin", "starts.bin")
        return sha256(" ".join(self.manifest.files[name].sha256 for name in names).encode()).hexdigest()

    @cached_property
    def _input_ids(self) -> NDArray[np.int32]:
        return self._map("input_ids.bin", "<i4")

    @cached_property
    def _supervised(self) -> NDArray[np.bool_]:
        return self._map("supervised.bin", "?")

    @cached_property
    def _starts(self) -> Ints:
        return self._map("starts.bin", "<i8")

    @cached_property
    def _sources(self) -> list[str]:
        text = (self.folder / "sources.txt").read_bytes().decode("utf-8", errors="surrogateescape")
        return text.split("\n")[:-1]

    def _map(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        # A plain view: slices of np.memmap are np.memmap again, which costs more than what is read here.
        return np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r"))


def samples_folder(cache_dir: Path, key: Mapping[str, str]) -> Path:
    """Return the folder in `cache_dir` for the samples of `key`."""
    return cache_dir / f"{_FOLDER_PREFIX}{sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]}"


def open_samples(folder: Path, *, key: Mapping[str, str]) -> SampleStore:
    """Open the samples in `folder`, and read all of it once to see that it is undamaged.

    Raises ConfigError when there are none, when they are damaged, or when they were made from something else than
    `key` says; the message names the parts of the key that differ.
    """
    manifest, problem = _inspect(folder, key)
    if manifest is None or problem is not None:
        raise ConfigError(f"{folder}: {problem}: make them again with `llmtrain prepare CONFIG`")
    return SampleStore(folder, manifest)


def ensure_samples(
    folder: Path,
    *,
    key: Mapping[str, str],
    make: Callable[[], Iterable[Sample]],
    about: str = "",
    account: Callable[[], Account] = Account,
) -> SampleStore:
    """Open the samples of `key` in `folder`, or write there what `make` yields if there are none.

    Any number of processes may call it at once: one makes them, the others wait for it. If there are samples of the
    same rows (`about`) with another key beside the folder, a message names what has changed. Raises what `make` raises,
    and then leaves the folder as it was; ConfigError when the folder cannot be written, RunError when the disk is full.
    """
    if _inspect(folder, key)[1] is not None:
        with output_lock(folder, key=_OUTPUT_KEY):
            problem = _inspect(folder, key)[1]
            if problem is not None:  # else another process has made them meanwhile
                if folder.exists():
                    logger.warning("%s: %s: making them again", folder, problem)
                elif outdated := _changed_since(folder, about=about, key=key):
                    logger.info("%s: %s changed since its rows were tokenised: tokenising them anew", about, outdated)
                _write(folder, make(), key=key, about=about, account=account)
    return open_samples(folder, key=key)


def _changed_since(folder: Path, *, about: str, key: Mapping[str, str]) -> str | None:
    """Name the parts of the key that differ from those of other samples of the same rows, in a folder beside this one.

    Of several such folders the one that differs least is compared. None where there is none.
    """
    differences = []
    for file in folder.parent.glob(f"{_FOLDER_PREFIX}*/{MANIFEST_NAME}"):
        manifest, problem = _read_manifest(file.parent)
        if manifest is not None and problem is None and manifest.about == about != "":
            differences.append([name for name in key if key[name] != manifest.key.get(name)])
    names = min(differences, key=len, default=[])
    return f"{_listed(names)} {'have' if len(names) > 1 or names[0].endswith('s') else 'has'}" if names else None


def _write(
    folder: Path, samples: Iterable[Sample], *, key: Mapping[str, str], about: str, account: Callable[[], Account]
) -> None:
    with staged_output(folder, key=_OUTPUT_KEY, made_by_us=_MADE_BY_US) as partial:
        with (
            (partial / "input_ids.bin").open("wb") as ids_file,
            (partial / "supervised.bin").open("wb") as supervised_file,
            (partial / "sources.txt").open("wb") as sources_file,
        ):
            starts, num_supervised = _write_tokens(samples, ids_file, supervised_file, sources_file)
        np.array(starts, dtype="<i8").tofile(partial / "starts.bin")
        manifest = SamplesManifest(
            about=about,
            key=dict(key),
            samples=len(starts) - 1,
            tokens=starts[-1],
            supervised_tokens=num_supervised,
            account=account(),
            files={name: _record(partial / name) for name in _FILES},
        )
        (partial / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _write_tokens(
    samples: Iterable[Sample], ids_file: BinaryIO, supervised_file: BinaryIO, sources_file: BinaryIO
) -> tuple[list[int], int]:
    """Write the samples; return where each begins and the last one ends, and the number of supervised tokens."""
    starts, num_supervised = [0], 0
    for sample in samples:
        assert len(sample.input_ids) == len(sample.supervised) > 0, sample.source
        ids_file.write(sample.input_ids.astype("<i4", copy=False).tobytes())
        supervised_file.write(sample.supervised.astype(np.bool_, copy=False).tobytes())
        sources_file.write(sample.source.replace("\n", " ").encode("utf-8", errors="surrogateescape") + b"\n")
        starts.append(starts[-1] + len(sample.input_ids))
        num_supervised += int(np.count_nonzero(sample.supervised))
    assert len(starts) > 1, "no sample to write"
    return starts, num_supervised


def _record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(size=path.stat().st_size, sha256=file_digest(file, "sha256").hexdigest())


def _inspect(folder: Path, key: Mapping[str, str]) -> tuple[SamplesManifest | None, str | None]:
    """Return the folder's manifest, and what is wrong with the folder."""
    manifest, problem = _read_manifest(folder)
    if manifest is None:
        return None, problem
    if changed := sorted(name for name in {*key, *manifest.key} if key.get(name) != manifest.key.get(name)):
        return manifest, f"the tokenised rows were made with other {_listed(changed)} than the config has now"
    for name in _FILES:
        path = folder / name
        if not path.is_file() or _record(path) != manifest.files.get(name):
            return manifest, f"the tokenised rows are damaged ({name} is not as it was written)"
    return manifest, None


def _read_manifest(folder: Path) -> tuple[SamplesManifest | None, str | None]:
    """Return the folder's manifest, or why it cannot be read."""
    try:
        document = json.loads((folder / MANIFEST_NAME).read_bytes())
    except OSError:  # none, or the folder cannot be looked into: who writes it says why
        return None, "holds no tokenised rows"
    except ValueError as error:
        return None, f"the manifest of the tokenised rows is damaged ({error})"
    if isinstance(document, dict) and document.get("format_version") != FORMAT_VERSION:
        return None, "the tokenised rows were written by another version of llmtrain"
    try:
        return SamplesManifest.model_validate(document), None
    except ValidationError as error:
        return None, f"the manifest of the tokenised rows is damaged ({error.errors()[0]['msg']})"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
