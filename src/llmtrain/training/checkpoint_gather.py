"""From the parts of weights that each rank holds to whole tensors, spread over the ranks that write them.

    every rank: its rows of every tensor ─▶ unit by unit (a block, say) ─▶ the unit's owner: whole tensors

Units go to owners so that each writes about as many bytes. All of it is done off the training's thread, on copies on
the CPU; a rank sends each unit's bytes in one message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from llmtrain.distributed.gang import Gang
from llmtrain.distributed.sharding import Part


@dataclass(frozen=True)
class Box:
    """Where a rank's part lies in the whole tensor."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def index(self) -> tuple[slice, ...]:
        """Of the box, in the whole."""
        return tuple(slice(start, start + length) for start, length in zip(self.offset, self.size, strict=True))


Boxes = Mapping[str, Box]
"""Those of one rank, by the tensors' names."""


def boxes_of(parts: Mapping[str, Part]) -> dict[str, Box]:
    """Of this rank's parts."""
    return {name: Box(part.offset, tuple(part.local.shape)) for name, part in parts.items()}


def owners_of(parts: Mapping[str, Part], *, unit_of: Callable[[str], str], num_ranks: int) -> dict[str, int]:
    """For each tensor the rank that is to have it whole; alike on every rank.

    Tensors of one unit go to one rank; the largest units first, each to the rank that has the fewest bytes yet.
    """
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        sizes[unit_of(name)] = sizes.get(unit_of(name), 0) + prod(part.shape) * part.local.dtype.itemsize
    loads, owners = [0] * num_ranks, dict[str, int]()
    for unit in sorted(sizes, key=lambda unit: (-sizes[unit], unit)):
        owners[unit] = loads.index(min(loads))
        loads[owners[unit]] += sizes[unit]
    return {name: owners[unit_of(name)] for name in parts}


def assemble(
    parts: Mapping[str, Part],
    boxes: Sequence[Boxes],
    *,
    owners: Mapping[str, int],
    unit_of: Callable[[str], str],
    gang: Gang,
) -> dict[str, Tensor]:
    """The whole tensors that this rank owns. `boxes`: those of every rank. All ranks call it with the same names."""
    units: dict[str, list[str]] = {}
    for name in parts:
        units.setdefault(unit_of(name), []).append(name)
    owned: dict[str, Tensor] = {}
    for names in units.values():
        owner = owners[names[0]]
        if gang.rank != owner:
            if message := [_bytes_of(parts[name].local) for name in names if parts[name].local.numel()]:
                gang.send(torch.cat(message), to=owner)
            continue
        for name in names:
            part = parts[name]
            owned[name] = torch.empty(part.shape, dtype=part.local.dtype)
            owned[name][boxes[gang.rank][name].index] = part.local
        for sender in range(gang.size):
            if sender != owner:
                _receive({name: owned[name] for name in names}, boxes[sender], sender=sender, gang=gang)
    return owned


def _receive(tensors: Mapping[str, Tensor], boxes: Boxes, *, sender: int, gang: Gang) -> None:
    """Fill in what one rank holds of some tensors."""
    sizes = [prod(boxes[name].size) * tensor.dtype.itemsize for name, tensor in tensors.items()]
    if not sum(sizes):
        return
    message = torch.empty(sum(sizes), dtype=torch.uint8)
    gang.receive(message, sender=sender)
    for (name, tensor), piece in zip(tensors.items(), torch.split(message, sizes), strict=True):
        if piece.numel():
            tensor[boxes[name].index] = piece.clone().view(tensor.dtype).view(boxes[name].size)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
