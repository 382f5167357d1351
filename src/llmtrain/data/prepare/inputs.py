"""Which files are the corpus: files, folders, globs and datasets of the config become one sorted list.

Reading them is `documents`. A new kind of file gets a `Format` here and a reader there; nothing else in `prepare` knows
of files.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Literal

from llmtrain.config.data import DatasetInput, PrepareConfig
from llmtrain.config.errors import ConfigError
from llmtrain.data.prepare.hugging_face import HUB, DatasetPart, is_saved_dataset, size_of_dataset

logger = logging.getLogger("llmtrain.prepare")

Format = Literal["text", "jsonl", "json", "parquet", "dataset"]
Compression = Literal["gzip", "zstd"]

_ROW_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_TEXT = """
.txt .text .md .markdown .rst .tex .org .adoc .html .htm .xml .svg .css .scss .csv .tsv
.py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .hxx .cu .cuh .cs .java .kt .kts .scala .groovy .go .rs .swift .m .mm
.js .jsx .mjs .cjs .ts .tsx .vue .rb .php .pl .pm .lua .r .jl .hs .ml .mli .fs .fsx .ex .exs .erl .hrl .clj .cljs
.el .lisp .scm .rkt .f .f90 .f95 .for .pas .d .dart .zig .nim .v .sv .vhd .vhdl .asm .s .sql .sh .bash .zsh .fish .ps1
.bat .cmake .mk .gradle .toml .ini .cfg .conf .yaml .yml .proto .graphql .tf .tcl .vim
"""
_TEXT_SUFFIXES = frozenset(_TEXT.split())
_NOT_READ = frozenset({".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".arrow"})


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus, or a part of a dataset."""

    path: str
    name: str
    """Relative to its input, with forward slashes."""
    format: Format
    compression: Compression | None = None
    dataset: DatasetPart | None = None
    """What is read in place of the file (format dataset)."""

    @property
    def label(self) -> str:
        """`name` as valid Unicode, for `source`: a file name may hold any bytes."""
        return os.fsencode(self.name).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Input:
    """One of the config's inputs and its files, sorted by name."""

    name: str
    """The last part of its folder's path, or as many as it takes to tell it from the other inputs; a dataset's name."""
    path: str
    """As the config gives it."""
    files: tuple[SourceFile, ...]


def find_inputs(options: PrepareConfig) -> list[Input]:
    """The files that `options.input` names, each once, in the order of the inputs and sorted by name in each.

    Of a folder: what `include` matches, or without it every file with a known suffix; hidden files
    and folders, what `exclude` matches and `options.output` are left out. What a glob matches is filtered by the same
    patterns; a file that is named outright is always taken. Raises ConfigError when an input has no files.
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
            real = file.dataset or os.path.realpath(file.path)
            if real not in taken:
                taken.add(real)
                files.append(file)
        path = source if isinstance(source, str) else _described(source)
        inputs.append(Input(name=name, path=path, files=tuple(files)))
    return inputs


def named_inputs(options: PrepareConfig) -> list[str | DatasetInput]:
    """The entries of `input`, with a section for every dataset."""
    given = options.input if isinstance(options.input, list) else [options.input]
    return [
        DatasetInput(path=source) if isinstance(source, str) and _is_dataset(source) else source for source in given
    ]


def _is_dataset(path: str) -> bool:
    return path.startswith(HUB) or is_saved_dataset(os.path.expanduser(path))


def _path_of(source: str | DatasetInput) -> str:
    return source if isinstance(source, str) else source.path


def _described(source: DatasetInput) -> str:
    return ", ".join(str(part) for part in _parts_of(source))


def _parts_of(source: DatasetInput) -> list[DatasetPart]:
    configs: list[str | None] = list(source.configs) or [None]
    return [DatasetPart(source.path, config, source.split, source.revision) for config in configs]


def size_of(file: SourceFile) -> int:
    """Bytes of the file on disk; 0 when it cannot be told. Raises ConfigError for a dataset that cannot be had."""
    if file.dataset is not None:
        return size_of_dataset(file.dataset)
    try:
        return os.stat(file.path).st_size
    except OSError:
        return 0  # reading it will say why


def total_size(inputs: Sequence[Input]) -> int:
    """Bytes of all files."""
    return sum(size_of(file) for source in inputs for file in source.files)


def inputs_are_here(options: PrepareConfig) -> bool:
    """Whether every input names something on this machine."""
    paths = [_path_of(source) for source in named_inputs(options)]
    return all(path.startswith(HUB) or os.path.lexists(os.path.expanduser(path)) or _glob(path) for path in paths)


def _files_of(source: str | DatasetInput, options: PrepareConfig, output: str) -> list[SourceFile]:
    if isinstance(source, DatasetInput):
        if not source.path.startswith(HUB) and not os.path.isdir(os.path.expanduser(source.path)):
            raise ConfigError(
                f"prepare.input: {source.path}: no such folder (looked in {os.getcwd()}); "
                f"for a dataset on the Hub write {HUB}{source.path}"
            )
        return [
            SourceFile(os.path.expanduser(source.path), part.config or "", "dataset", dataset=part)
            for part in _parts_of(source)
        ]
    path, expanded = source, os.path.expanduser(source)
    if os.path.isdir(expanded):
        return _files_of_folder(path, Path(expanded), options, output)
    if os.path.lexists(expanded):
        return [_source_file(expanded, os.path.basename(expanded))]
    if not glob.has_magic(expanded):
        raise ConfigError(f"prepare.input: {path}: no such file or folder (looked in {os.getcwd()})")
    base = _base(path)
    files = []
    for match in _glob(path):
        name = PurePosixPath(os.path.relpath(match, base)).as_posix()
        if _is_wanted(name, options) and not os.path.realpath(match).startswith(output + os.sep):
            files.append(_source_file(match, name))
    if not files:
        raise ConfigError(f"prepare.input: {path}: the glob matches no file{_patterns_said(options)}")
    return sorted(files, key=lambda file: file.name)


def _files_of_folder(path: str, folder: Path, options: PrepareConfig, output: str) -> list[SourceFile]:
    files: list[SourceFile] = []
    left_out: Counter[str] = Counter()
    for name in _walk(folder, options, output):
        suffix, compression = _suffixes(name)
        if options.include or suffix in _TEXT_SUFFIXES or suffix in _ROW_FORMATS:
            files.append(_source_file(str(folder / name), name))
        else:
            left_out[(suffix or "no suffix") + (compression or "")] += 1
    kinds = ", ".join(f"{suffix} ({count})" for suffix, count in left_out.most_common(5))
    if not files:
        others = f"; it has files of other kinds: {kinds}: name the wanted ones in prepare.include" if kinds else ""
        raise ConfigError(
            f"prepare.input: {path}: no files of text or rows in this folder{_patterns_said(options)}{others}"
        )
    if kinds:
        logger.info("%s: left out %d files of other kinds: %s", path, left_out.total(), kinds)
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path, options: PrepareConfig, output: str) -> Iterator[str]:
    """Names, relative to `folder`, of the files in it that the patterns leave; links to folders are not followed."""
    links = 0
    for root, subfolders, names in os.walk(folder, onerror=_raise_unreadable):
        relative = PurePosixPath(os.path.relpath(root, folder).replace(os.sep, "/"))
        kept = []
        for subfolder in subfolders:
            inside = os.path.join(root, subfolder)
            if subfolder.startswith(".") or _is_excluded((relative / subfolder).as_posix(), options):
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
        logger.warning("%s: %d links to folders are not followed; name their targets as inputs", folder, links)


def _raise_unreadable(error: OSError) -> None:
    raise ConfigError(f"prepare.input: {error.filename}: the folder cannot be read ({error.strerror})") from error


def _source_file(path: str, name: str) -> SourceFile:
    suffix, compression = _suffixes(name)
    if suffix in _NOT_READ:
        raise ConfigError(
            f"prepare.input: {path}: {suffix + (compression or '')} files are not read; give text, JSONL, JSON or "
            "Parquet (also .gz or .zst), or leave them out with prepare.exclude"
        )
    format_ = _ROW_FORMATS.get(suffix, "text")
    return SourceFile(path, name, format_, _COMPRESSIONS[compression] if compression else None)


def _suffixes(name: str) -> tuple[str, str | None]:
    """The suffix that says what a file holds, and the one that says how it is packed."""
    path = PurePosixPath(name.lower())
    if path.suffix in _COMPRESSIONS:
        return PurePosixPath(path.stem).suffix, path.suffix
    return path.suffix, None


def _is_wanted(name: str, options: PrepareConfig) -> bool:
    if options.include and not _matches(name, options.include):
        return False
    return not any(_is_excluded(part, options) for part in (name, *_parents(name)))


def _is_excluded(name: str, options: PrepareConfig) -> bool:
    return _matches(name, options.exclude)


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a pattern matches the whole relative path or one of its components (`*` matches slashes too)."""
    candidates = (name, *name.split("/"))
    return any(fnmatchcase(candidate, pattern) for pattern in patterns for candidate in candidates)


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in PurePosixPath(name).parents if parent.name]


def _glob(path: str) -> list[str]:
    return [match for match in glob.glob(os.path.expanduser(path), recursive=True) if not os.path.isdir(match)]


def _base(path: str) -> str:
    """The folder that names are relative to: the folder itself, a file's folder, a glob's part without wildcards.

    A name on the Hub stands for itself.
    """
    if path.startswith(HUB):
        return path
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return os.path.abspath(expanded)
    base = os.path.dirname(expanded)
    while not os.path.lexists(expanded) and glob.has_magic(base):
        base = os.path.dirname(base)
    return os.path.abspath(base)


def _distinct_names(folders: list[str]) -> list[str]:
    """For each folder the shortest end of its path that no other folder in the list has."""
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
    given = [
        f"{key} {patterns}"
        for key, patterns in (("include", options.include), ("exclude", options.exclude))
        if patterns
    ]
    return f" with {' and '.join(given)}" if given else ""
