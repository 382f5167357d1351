"""Slices of tensors: which rank writes which, and how slices become full tensors again.

    weights           each rank's slices ─ gather_full ─▶ full tensors, each on the rank that writes it
    optimizer state   each rank's slices ─ parts_to_write ─▶ save_parts: the metadata says of which tensors
    reading           files ─ stored_tensors ─▶ StoredTensor: indexing it reads the slices that the index covers

So a tensor that 4 ranks wrote is read by 2 ranks, by one, or by 3 whose rows lie across those of the 4.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmtrain.distributed.group import RankGroup
from llmtrain.distributed.sharding import Part
from llmtrain.models.safetensors_header import read_header

_SLICES = "cut"
"""The key of a file's metadata: name of a slice → shape of its tensor, offset of the slice; only of sharded tensors."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Index = tuple[slice, ...]
"""A slice with start and stop for each dimension; () for a scalar."""


@dataclass(frozen=True)
class TensorSlice:
    """A box of a tensor, without its values: what one rank or one file holds. It may be the full tensor."""

    dtype: str
    """Name of the dtype in safetensors, such as F32 or BF16."""
    size: tuple[int, ...]
    offset: tuple[int, ...]
    """First index of the slice in the full tensor, one for each dimension."""
    shape: tuple[int, ...]
    """Shape of the full tensor."""

    @classmethod
    def of(cls, part: Part) -> TensorSlice:
        """Describe this rank's part of a tensor."""
        return cls(_DTYPE_NAMES[part.local.dtype], tuple(part.local.shape), part.offset, part.shape)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> TensorSlice:
        """Read what a manifest says of a tensor."""
        size = tuple(record["shape"])
        offset = tuple(record.get("offset", (0,) * len(size)))
        return cls(record["dtype"], size, offset, tuple(record.get("of", size)))

    def as_record(self) -> dict[str, Any]:
        """Return what a manifest says of the tensor."""
        record = {"dtype": self.dtype, "shape": list(self.size)}
        return record if self.is_full else record | {"of": list(self.shape), "offset": list(self.offset)}

    @property
    def is_full(self) -> bool:
        """True if the slice is the full tensor."""
        return self.size == self.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the slice's values."""
        return prod(self.size) * _DTYPES[self.dtype].itemsize

    @property
    def index(self) -> Index:
        """The slice as an index of the full tensor."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))

    def overlap(self, index: Index) -> Index | None:
        """Return what the slice and an index of the full tensor have in common; None if nothing."""
        pairs = zip(self.index, index, strict=True)
        common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in pairs)
        return None if any(part.start >= part.stop for part in common) else common


Slices = Mapping[str, TensorSlice]
"""Slices of one rank or one file, by the names of their tensors."""


def slices_of(parts: Mapping[str, Part]) -> dict[str, TensorSlice]:
    """Describe this rank's parts."""
    return {name: TensorSlice.of(part) for name, part in parts.items()}


# -- writing -----------------------------------------------------------------------------------------------------------


def owners_of(parts: Mapping[str, Part], *, unit_of: Callable[[str], str], num_ranks: int) -> dict[str, int]:
    """Return for each tensor the rank that writes it in full; the same on every rank.

    The tensors of a unit (a block, say) have one owner. The largest units come first, and each goes to the rank that
    has the fewest bytes so far, so that each rank writes about as many bytes.
    """
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        sizes[unit_of(name)] = sizes.get(unit_of(name), 0) + prod(part.shape) * part.local.dtype.itemsize
    loads, owners = [0] * num_ranks, dict[str, int]()
    for unit in sorted(sizes, key=lambda unit: (-sizes[unit], unit)):
        owners[unit] = loads.index(min(loads))
        loads[owners[unit]] += sizes[unit]
    return {name: owners[unit_of(name)] for name in parts}


def gather_full(
    parts: Mapping[str, Part],
    slices: Sequence[Slices],
    *,
    owners: Mapping[str, int],
    unit_of: Callable[[str], str],
    group: RankGroup,
) -> dict[str, Tensor]:
    """Return the full tensors that this rank owns. All ranks call it with the same names.

    `slices`: those of every rank. Each rank sends what it is the first to hold of a unit in one message.
    """
    if group.size == 1:
        return {name: part.local for name, part in parts.items()}
    first = first_held(slices)
    units: dict[str, list[str]] = {}
    for name in parts:
        units.setdefault(unit_of(name), []).append(name)
    full: dict[str, Tensor] = {}
    for names in units.values():
        owner = owners[names[0]]
        if group.rank != owner:
            if message := [_bytes_of(parts[name].local) for name in names if name in first[group.rank]]:
                group.send(torch.cat(message), to=owner)
            continue
        for name in names:
            full[name] = torch.empty(parts[name].shape, dtype=parts[name].local.dtype)
            full[name][slices[owner][name].index] = parts[name].local
        for sender in range(group.size):
            if sender != owner:
                sent = {name: full[name] for name in names if name in first[sender]}
                _receive(sent, slices[sender], sender=sender, group=group)
    return full


def _receive(tensors: Mapping[str, Tensor], slices: Slices, *, sender: int, group: RankGroup) -> None:
    """Fill in what another rank holds of some tensors."""
    if not tensors:
        return
    sizes = [slices[name].num_bytes for name in tensors]
    message = torch.empty(sum(sizes), dtype=torch.uint8)
    group.receive(message, sender=sender)
    for (name, tensor), received in zip(tensors.items(), torch.split(message, sizes), strict=True):
        tensor[slices[name].index] = received.clone().view(tensor.dtype).view(slices[name].size)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def parts_to_write(parts: Mapping[str, Part], slices: Sequence[Slices], *, rank: int) -> dict[str, Part]:
    """Return the parts that this rank writes: all if it is alone, else those that no rank before it holds as well.

    `slices`: those of every rank. With several ranks nobody writes an empty slice.
    """
    if len(slices) == 1:
        return dict(parts)
    first = first_held(slices)[rank]
    return {name: part for name, part in parts.items() if name in first}


def first_held(slices: Sequence[Slices]) -> list[set[str]]:
    """Return for each rank the names of its slices, without empty ones, that no rank before it holds as well.

    Ranks that share no matrix with each other, and those of other replicas, hold the same.
    """
    seen = set[tuple[str, TensorSlice]]()
    first: list[set[str]] = []
    for own in slices:
        new = {(name, held) for name, held in own.items() if held.num_bytes} - seen
        seen |= new
        first.append({name for name, _ in new})
    return first


def save_parts(file: Path, parts: Mapping[str, Part]) -> None:
    """Write this rank's parts of tensors into a safetensors file."""
    sharded = {name: part for name, part in slices_of(parts).items() if not part.is_full}
    about = {name: {"shape": part.shape, "offset": part.offset} for name, part in sharded.items()}
    tensors = {name: part.local for name, part in parts.items()}
    save_file(tensors, file, metadata={_SLICES: json.dumps(about)} if about else None)


# -- reading -----------------------------------------------------------------------------------------------------------


def slices_in(file: Path) -> dict[str, TensorSlice]:
    """Describe the tensors of a safetensors file, in its order."""
    header = read_header(file)
    sharded = json.loads(header.metadata.get(_SLICES, "{}"))
    found: dict[str, TensorSlice] = {}
    for name, stored in header.tensors.items():
        record: dict[str, Any] = {"dtype": stored.dtype, "shape": stored.shape}
        if name in sharded:
            record |= {"of": sharded[name]["shape"], "offset": sharded[name]["offset"]}
        found[name] = TensorSlice.from_record(record)
    return found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint's files, of which nothing is read yet."""

    name: str
    slices: tuple[tuple[Any, TensorSlice], ...]
    """Open files, each with the slice that lies in it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self.slices[0][1].shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def full(self) -> Tensor:
        """Read the full tensor."""
        return self[tuple(slice(0, length) for length in self.shape)]

    def __getitem__(self, index: Index) -> Tensor:
        """Read the values of an index into memory of their own: a run may delete the file while it is mapped."""
        starts = [part.start for part in index]
        values = torch.empty([part.stop - part.start for part in index], dtype=_DTYPES[self.slices[0][1].dtype])
        for file, stored in self.slices:
            if (common := stored.overlap(index)) is not None:
                there = _shifted(common, stored.offset)
                values[_shifted(common, starts)] = (
                    file.get_slice(self.name)[there] if there else file.get_tensor(self.name)
                )
        return values


def _shifted(index: Index, origin: Sequence[int]) -> Index:
    return tuple(slice(part.start - start, part.stop - start) for part, start in zip(index, origin, strict=True))


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return all tensors of some safetensors files, sharded or not, by name."""
    slices: dict[str, list[tuple[Any, TensorSlice]]] = {}
    for path in files:
        file = safe_open(path, framework="pt")
        for name, stored in slices_in(path).items():
            slices.setdefault(name, []).append((file, stored))
    return {name: StoredTensor(name, tuple(found)) for name, found in slices.items()}


def why_incomplete(sharded: Mapping[str, Sequence[TensorSlice]]) -> str | None:
    """Say what is wrong with the slices of sharded tensors: a gap, an overlap, different tensors; None if nothing."""
    for name, slices in sharded.items():
        if len({(stored.dtype, stored.shape) for stored in slices}) > 1:
            return f"the slices of {name} are of different tensors"
        boxes = [tuple(zip(stored.offset, stored.size, strict=True)) for stored in slices]
        if not _cover(boxes, slices[0].shape):
            have = sum(prod(stored.size) for stored in slices)
            return f"the slices of {name} do not make up the tensor: {have} elements of {prod(slices[0].shape)}"
    return None


def _cover(boxes: list[tuple[tuple[int, int], ...]], shape: tuple[int, ...]) -> bool:
    """Tell whether boxes (offset and length in each dimension) fill a shape, and no two overlap.

    Only for grids, as ranks make them: along the first dimension two boxes are at the same place or apart.
    """
    if not shape:
        return len(boxes) == 1
    rows: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
    for box in boxes:
        rows.setdefault(box[0], []).append(box[1:])
    end = 0
    for offset, length in sorted(rows):
        if offset != end or not _cover(rows[offset, length], shape[1:]):
            return False
        end = offset + length
    return end == shape[0]
