"""Tensors that lie in a checkpoint's files in pieces, one from each rank: how a file says so, and how they are read.

    file's metadata   cut: name → shape of the whole, offset of the piece     (only names that are in pieces)
    StoredTensor      a tensor by its shape, wherever its pieces lie; indexing it reads what the index covers

So a tensor that 4 ranks have written is read by 2, or by one, or by 3 whose rows lie across those of two others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

CUT = "cut"
"""The key of a safetensors file's metadata."""


@dataclass(frozen=True)
class Piece:
    """Where some of a tensor lies."""

    file: Path
    offset: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint's files, none of which is read yet."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    open_file: Callable[[Path], Any]

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def whole(self) -> Tensor:
        """All of it."""
        return self[tuple(slice(0, length) for length in self.shape)]

    def __getitem__(self, index: tuple[slice, ...]) -> Tensor:
        """The values of a box (slices with start and stop; () for a scalar), in memory of their own."""
        size = tuple(cut.stop - cut.start for cut in index)
        values: Tensor | None = None
        for piece in self.pieces:
            both = _overlap(index, piece)
            if both is None:
                continue
            there = tuple(slice(a - at, b - at) for (a, b), at in zip(both, piece.offset, strict=True))
            here = tuple(slice(a - cut.start, b - cut.start) for (a, b), cut in zip(both, index, strict=True))
            stored = self.open_file(piece.file)
            found: Tensor = stored.get_slice(self.name)[there] if there else stored.get_tensor(self.name)
            if values is None:
                values = torch.empty(size, dtype=found.dtype)
            values[here] = found  # safetensors maps the file, which may be deleted while the run goes on
        return torch.empty(size) if values is None else values


def _overlap(index: tuple[slice, ...], piece: Piece) -> list[tuple[int, int]] | None:
    """Start and end in each dimension of what a box and a piece have in common."""
    both = []
    for cut, at, length in zip(index, piece.offset, piece.size, strict=True):
        start, end = max(cut.start, at), min(cut.stop, at + length)
        if start >= end:
            return None
        both.append((start, end))
    return both


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of some safetensors files, whole or in pieces, by name."""
    handles: dict[Path, Any] = {}

    def open_file(path: Path) -> Any:
        if path not in handles:
            handles[path] = safe_open(path, framework="pt")
        return handles[path]

    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for path in files:
        file = open_file(path)
        cut = json.loads((file.metadata() or {}).get(CUT, "{}"))
        for name in file.keys():  # noqa: SIM118  # a handle, which only keys() goes over
            size = tuple(file.get_slice(name).get_shape())
            shapes[name] = tuple(cut[name]["shape"]) if name in cut else size
            offset = tuple(cut[name]["offset"]) if name in cut else (0,) * len(size)
            pieces.setdefault(name, []).append(Piece(path, offset, size))
    return {name: StoredTensor(name, shape, tuple(pieces[name]), open_file) for name, shape in shapes.items()}


def why_not_covered(files: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str | None:
    """What is wrong with tensors in pieces: a gap, an overlap, pieces of different wholes; None if nothing is.

    `files`: name of each file → its tensors → dtype, shape, and `of` and `offset` of a piece, as a manifest has them.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for tensors in files.values():
        for name, entry in tensors.items():
            if "of" in entry:
                found.setdefault(name, []).append(entry)
    for name, entries in found.items():
        wholes = {(entry["dtype"], *entry["of"]) for entry in entries}
        if len(wholes) > 1:
            return f"the pieces of {name} are of different tensors"
        boxes = [tuple(zip(entry["offset"], entry["shape"], strict=True)) for entry in entries]
        if not _covers(boxes, tuple(entries[0]["of"])):
            have = sum(prod(entry["shape"]) for entry in entries)
            return f"the pieces of {name} do not make up the whole: {have} elements of {prod(entries[0]['of'])}"
    return None


def _covers(boxes: list[tuple[tuple[int, int], ...]], shape: tuple[int, ...]) -> bool:
    """Whether boxes (offset and length in each dimension) fill a shape, none of them twice.

    Grids only, as ranks make them: along the first dimension the boxes' intervals are alike or apart.
    """
    if not shape:
        return len(boxes) == 1
    rows: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
    for box in boxes:
        rows.setdefault(box[0], []).append(box[1:])
    end = 0
    for offset, length in sorted(rows):
        if offset != end or not _covers(rows[offset, length], shape[1:]):
            return False
        end = offset + length
    return end == shape[0]
