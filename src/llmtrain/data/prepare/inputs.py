"""Find the files of the corpus: files, folders, globs and datasets of the config become one sorted list.

What `data.files.find` knows of formats, taken for text: a file of no format of rows is one document. Reading the files
is `documents`.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from llmtrain.config.sections.data import DatasetInput, PrepareConfig
from llmtrain.data.files.datasets import (
    HUB,
    DatasetPart,
    RowDataset,
    hub_part,
    is_saved_dataset,
    open_dataset,
    saved_part,
)
from llmtrain.data.files.find import (
    COMPRESSIONS,
    ROW_FORMATS,
    TEXT_SUFFIXES,
    DataFile,
    Format,
    RowSource,
    objects_at,
    split_suffix,
)
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.address import is_remote, local_path, parse_address, shown
from llmtrain.storage.failures import StorageError
from llmtrain.storage.finding import StoredObject, find_objects, has_wildcard, is_one_object

logger = logging.getLogger("llmtrain.prepare")

_NOT_READ = frozenset({".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz"})


@dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus, or a part of a dataset."""

    name: str
    """Relative to its input, with forward slashes."""
    found: DataFile | DatasetPart

    @property
    def dataset(self) -> DatasetPart | None:
        """The part of a dataset, if it is one."""
        return self.found if isinstance(self.found, DatasetPart) else None

    @property
    def remote(self) -> StoredObject | None:
        """The object of a store, if it is one."""
        return self.found.remote if isinstance(self.found, DataFile) else None

    @property
    def path(self) -> str:
        """Path or address of the file, or the path of the dataset's folder."""
        return self.found.name if isinstance(self.found, DataFile) else str(self.found.folder)

    @property
    def format(self) -> Format | Literal["dataset"]:
        """Format of the content."""
        return self.found.format if isinstance(self.found, DataFile) else "dataset"

    @property
    def label(self) -> str:
        """`name` as valid Unicode, for `source`: a file name may hold any bytes."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")

    @property
    def size(self) -> int:
        """Bytes on disk; 0 when it cannot be told. Raises ConfigError for a dataset that cannot be had."""
        source = self.open()
        return (source.size or 0) if isinstance(source, DataFile) else source.num_bytes

    def open(self) -> RowSource:
        """Return what rows are read from. Raises ConfigError for a dataset that cannot be had."""
        return self.found if isinstance(self.found, DataFile) else RowDataset(str(self.found), open_dataset(self.found))


@dataclass(frozen=True)
class CorpusInput:
    """One of the config's inputs and its files, sorted by name."""

    name: str
    """The last part of its folder's path, or as many as it takes to tell it from the other inputs; a dataset's name."""
    path: str
    """Path as the config gives it."""
    files: tuple[CorpusFile, ...]


def find_inputs(options: PrepareConfig) -> list[CorpusInput]:
    """Find the files that `options.input` names, each once, in the order of the inputs and sorted by name in each.

    Of a folder: what `include` matches, or without it every file with a known suffix; hidden files and folders, what
    `exclude` matches and `options.output` are left out. What a glob matches is filtered by the same patterns; a file
    that is named outright is always taken. Raises ConfigError when an input has no files.
    """
    given = named_inputs(options)
    if not given:
        raise ConfigError("prepare.input is an empty list: name files, folders, globs or datasets")
    names = _distinct_names([_base(_path_of(source)) for source in given])
    output = os.path.realpath(os.path.expanduser(options.output))
    taken: set[object] = set()
    inputs = []
    for source, name in zip(given, names, strict=True):
        files = []
        for file in _files_of(source, options, output):
            real = file.dataset or file.remote or os.path.realpath(file.path)
            if real not in taken:
                taken.add(real)
                files.append(file)
        path = shown(source) if isinstance(source, str) else _described(source)
        inputs.append(CorpusInput(name=name, path=path, files=tuple(files)))
    return inputs


def named_inputs(options: PrepareConfig) -> list[str | DatasetInput]:
    """Return the entries of `input`, with a section for every dataset."""
    given = options.input if isinstance(options.input, list) else [options.input]
    return [_with_section(local_path(source)) if isinstance(source, str) else source for source in given]


def _with_section(path: str) -> str | DatasetInput:
    part = hub_part(path)
    if part is None and is_saved_dataset(os.path.expanduser(path)):
        part, _ = saved_part(path, key="prepare.input")
    if part is None:
        return path
    return DatasetInput(path=part.path, configs=[part.config] if part.config else [], split=part.split)


def _path_of(source: str | DatasetInput) -> str:
    return source if isinstance(source, str) else source.path


def _described(source: DatasetInput) -> str:
    return ", ".join(str(part) for part in _parts_of(source))


def _parts_of(source: DatasetInput) -> list[DatasetPart]:
    configs: list[str | None] = list(source.configs) or [None]
    return [DatasetPart(source.path, config, source.split, source.revision) for config in configs]


def total_size(inputs: Sequence[CorpusInput]) -> int:
    """Return the bytes of all files."""
    return sum(file.size for source in inputs for file in source.files)


def inputs_are_here(options: PrepareConfig) -> bool:
    """Return whether every input names something on this machine, or in a store that shows it."""
    return all(_is_here(_path_of(source)) for source in named_inputs(options))


def _is_here(path: str) -> bool:
    if hub_part(path):
        return True
    if not is_remote(path):
        return os.path.lexists(os.path.expanduser(path)) or bool(_glob(path))
    try:
        return bool(find_objects(path))
    except (StorageError, ConfigError) as error:
        logger.info("the shards are not compared with their input: %s", error)
        return False


def _files_of(source: str | DatasetInput, options: PrepareConfig, output: str) -> list[CorpusFile]:
    if isinstance(source, DatasetInput):
        if not source.path.startswith(HUB) and not os.path.isdir(os.path.expanduser(source.path)):
            raise ConfigError(
                f"prepare.input: {source.path}: no such folder (looked in {os.getcwd()}); "
                f"for a dataset on the Hub write {HUB}{source.path}"
            )
        return [CorpusFile(part.config or "", part) for part in _parts_of(source)]
    if is_remote(source):
        return _files_at_address(source, options)
    path, expanded = source, os.path.expanduser(source)
    if os.path.isdir(expanded):
        inside = ((name, str(Path(expanded) / name), None) for name in _walk(Path(expanded), options, output))
        return _files_of_folder(path, inside, options)
    if os.path.lexists(expanded):
        return [_corpus_file(expanded, os.path.basename(expanded))]
    if not glob.has_magic(expanded):
        raise ConfigError(f"prepare.input: {path}: no such file or folder (looked in {os.getcwd()})")
    base = _base(path)
    files = []
    for match in _glob(path):
        name = PurePosixPath(os.path.relpath(match, base)).as_posix()
        if _is_wanted(name, options) and not os.path.realpath(match).startswith(output + os.sep):
            files.append(_corpus_file(match, name))
    if not files:
        raise ConfigError(f"prepare.input: {path}: the glob matches no file{_patterns_said(options)}")
    return sorted(files, key=lambda file: file.name)


def _files_at_address(address: str, options: PrepareConfig) -> list[CorpusFile]:
    found = objects_at(address, "prepare.input", otherwise="name a file, a folder or a glob")
    if is_one_object(address, found):
        return [_corpus_file(found[0].name, found[0].inside, found[0])]
    wanted = [one for one in found if _is_wanted(one.inside, options)]
    if has_wildcard(address):
        if not wanted:
            raise ConfigError(f"prepare.input: {shown(address)}: the glob matches no object{_patterns_said(options)}")
        return [_corpus_file(one.name, one.inside, one) for one in wanted]
    return _files_of_folder(shown(address), ((one.inside, one.name, one) for one in wanted), options)


def _files_of_folder(
    path: str, inside: Iterable[tuple[str, str, StoredObject | None]], options: PrepareConfig
) -> list[CorpusFile]:
    """Choose the files of a folder by their suffixes; `inside`: name in the folder, path or address, object."""
    files: list[CorpusFile] = []
    left_out: Counter[str] = Counter()
    for name, where, remote in inside:
        suffix, packing = split_suffix(name)
        if options.include or suffix in TEXT_SUFFIXES or suffix in ROW_FORMATS:
            files.append(_corpus_file(where, name, remote))
        else:
            left_out[(suffix or "no suffix") + packing] += 1
    kinds = ", ".join(f"{suffix} ({count})" for suffix, count in left_out.most_common(5))
    if not files:
        others = f"; it has files of other kinds: {kinds}: name the wanted ones in prepare.include" if kinds else ""
        raise ConfigError(
            f"prepare.input: {path}: no files of text or rows in this folder{_patterns_said(options)}{others}"
        )
    if kinds:
        logger.info("%s: left out %s of other kinds: %s", path, counted(left_out.total(), "file"), kinds)
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path, options: PrepareConfig, output: str) -> Iterator[str]:
    """Yield the names in `folder` of the files that the patterns leave; links to folders are not followed."""
    links = 0
    for root, subfolders, names in os.walk(folder, onerror=_raise_unreadable):
        relative = PurePosixPath(os.path.relpath(root, folder).replace(os.sep, "/"))
        kept = []
        for subfolder in subfolders:
            inside = os.path.join(root, subfolder)
            if subfolder.startswith(".") or _matches((relative / subfolder).as_posix(), options.exclude):
                continue
            if os.path.islink(inside):
                links += 1
            elif os.path.realpath(inside) != output:
                kept.append(subfolder)
        subfolders[:] = kept
        for file in names:
            name = (relative / file).as_posix()
            is_special = os.path.exists(inside := os.path.join(root, file)) and not os.path.isfile(inside)
            if not file.startswith(".") and not is_special and _is_wanted(name, options):
                yield name
    if links:
        not_followed = counted(links, "link to a folder is", "links to folders are")
        logger.warning("%s: %s not followed; name the targets as inputs", folder, not_followed)


def _raise_unreadable(error: OSError) -> None:
    raise ConfigError(f"prepare.input: {error.filename}: the folder cannot be read ({error.strerror})") from error


def _corpus_file(path: str, name: str, remote: StoredObject | None = None) -> CorpusFile:
    suffix, packing = split_suffix(name)
    if suffix in _NOT_READ:
        raise ConfigError(
            f"prepare.input: {path}: {suffix + packing} files are not read; give text, JSONL, JSON, Parquet or "
            "Arrow (also .gz or .zst), or leave them out with prepare.exclude"
        )
    is_text = suffix in TEXT_SUFFIXES  # tables of CSV are text here
    kind = "text" if is_text else ROW_FORMATS.get(suffix, "text")
    return CorpusFile(name, DataFile(path, kind, COMPRESSIONS.get(packing), remote=remote))


def _is_wanted(name: str, options: PrepareConfig) -> bool:
    if options.include and not _matches(name, options.include):
        return False
    parents = (parent.as_posix() for parent in PurePosixPath(name).parents if parent.name)
    return not any(_matches(part, options.exclude) for part in (name, *parents))


def _matches(name: str, patterns: list[str]) -> bool:
    """Return whether a pattern matches the relative path or one of its components (`*` matches slashes too)."""
    candidates = (name, *name.split("/"))
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in candidates)


def _glob(path: str) -> list[str]:
    return [match for match in glob.glob(os.path.expanduser(path), recursive=True) if not os.path.isdir(match)]


def _base(path: str) -> str:
    """Return the folder that names are relative to: the folder itself, a file's folder, a glob's part before wildcards.

    A name on the Hub stands for itself.
    """
    if hub_part(path):
        return path
    if is_remote(path):
        place = parse_address(shown(path))
        key = place.key
        while glob.has_magic(key):
            key = key.rpartition("/")[0]
        if key == place.key and split_suffix(key)[0] in {*TEXT_SUFFIXES, *ROW_FORMATS}:
            key = key.rpartition("/")[0]
        return f"{place.root}{key}".rstrip("/")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return os.path.abspath(expanded)
    base = os.path.dirname(expanded)
    while not os.path.lexists(expanded) and glob.has_magic(base):
        base = os.path.dirname(base)
    return os.path.abspath(base)


def _distinct_names(folders: list[str]) -> list[str]:
    """Return for each folder the shortest end of its path that no other folder in the list has."""
    names = []
    for folder in folders:
        if folder.startswith(HUB):
            names.append(folder.removeprefix(HUB))
            continue
        parts = PurePosixPath(folder.replace(os.sep, "/")).parts
        others = [PurePosixPath(other.replace(os.sep, "/")).parts for other in folders if other != folder]
        depth = next(d for d in range(1, len(parts) + 1) if all(parts[-d:] != other[-d:] for other in others))
        names.append("/".join(parts[-depth:]))
    return names


def _patterns_said(options: PrepareConfig) -> str:
    given = {"include": options.include, "exclude": options.exclude}
    said = " and ".join(f"{key} {patterns}" for key, patterns in given.items() if patterns)
    return f" with {said}" if said else ""
