"""Copies of the tensors of a snapshot in CPU memory, so that training may change them while they are written.

tensor on a CPU ────────────────────────────────────▶ its copy
tensor on a GPU ─ piece by piece ─▶ two pinned buffers ─▶ its copy, in ordinary memory
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmtrain.distributed.sharding import Part, is_sharded, part_of
from llmtrain.training.checkpoint.format import CheckpointError

_SERIAL_NUMEL = 16384
"""Elements that torch adds up without waking its threads, which belong to the training step."""
PINNED_BYTES = 256 << 20
"""Page-locked memory, in two buffers. torch rounds each pinned tensor up to a power of two and keeps it."""


@dataclass(frozen=True)
class Copies:
    """Copies of the tensors of a snapshot that this rank holds."""

    model: Mapping[str, Part]
    ties: Mapping[str, str]
    """Further names of the tensors in `model` → their name there."""
    optimizer: Mapping[str, Part]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.local.nbytes for part in (*self.model.values(), *self.optimizer.values()))

    def non_finite(self) -> str | None:
        """Name the first tensor that holds NaN or infinity."""
        for kind, parts in (("weight", self.model), ("optimizer state", self.optimizer)):
            for name, part in parts.items():
                if not _is_finite(part.local):
                    return f"{kind} {name}"
        return None


class Staging:
    """The memory for the copies, kept from save to save.

    Tensors are always copied: an asynchronous write of a live CPU tensor stores what it holds later (pytorch#144657).
    The memory is kept, because fresh memory costs several times as much as the copy, and pinned memory more still.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._from_gpu: PinnedTransfer | None = None

    def copy(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> Copies:
        """Copy what this rank holds, into contiguous memory. The copies hold until the next call."""
        ties = _ties_of(model)
        untied = {name: tensor for name, tensor in model.items() if name not in ties}
        return Copies(self._copy_all(untied, "model"), ties, self._copy_all(optimizer, "optimizer"))

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
        self._from_gpu = None

    def _copy_all(self, tensors: Mapping[str, Tensor], section: str) -> dict[str, Part]:
        parts = {name: part_of(tensor) for name, tensor in tensors.items()}
        copies = {
            name: Part(self._copy_one((section, name), part.local), part.offset, part.shape)
            for name, part in parts.items()
        }
        if self._from_gpu is not None:
            self._from_gpu.finish()
        return copies

    def _copy_one(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            self._buffers.pop(key, None)
            buffer = _host_memory(tensor) if tensor.is_cuda else torch.empty(tensor.shape, dtype=tensor.dtype)
            self._buffers[key] = buffer
        if tensor.is_cuda:
            if self._from_gpu is None:
                self._from_gpu = PinnedTransfer()
            self._from_gpu.copy(tensor, buffer)
        elif tensor.device.type == "cpu" and tensor.is_contiguous():
            # One thread fills the memory's bus; torch's threads would have to meet after every tensor, which takes
            # ten times as long once anything else runs on the machine.
            ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        else:
            buffer.copy_(tensor)
        return buffer


def _host_memory(tensor: Tensor) -> Tensor:
    """Return memory of the host for a tensor on a GPU. Raises CheckpointError if there is none."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    except RuntimeError as error:
        raise _no_host_memory(tensor.nbytes, error) from error


def _pinned(num_bytes: int) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise _no_host_memory(num_bytes, error) from error


def _no_host_memory(num_bytes: int, error: RuntimeError) -> CheckpointError:
    """Name the memory that is too small: CUDA's message about pinned memory sounds as if it were the GPU's."""
    return CheckpointError(
        f"the machine's own memory (not the GPU's) has no {num_bytes / 1e6:,.0f} MB for the copy of a checkpoint, from "
        "which it is written while training goes on: give the job more memory (`resources.limits.memory` of a pod), or "
        f"shard the model over more machines ({str(error).splitlines()[0]})"
    )


@dataclass
class _PinnedBuffer:
    """Page-locked memory, and the piece of a copy that is on its way through it."""

    memory: Tensor
    arrived: torch.cuda.Event | None = None
    target: Tensor | None = None

    def send(self, piece: Tensor, target: Tensor) -> None:
        """Start to copy `piece`, bytes on a device, in the order of the device's current work."""
        self.deliver()
        self.memory[: len(piece)].copy_(piece, non_blocking=True)
        self.target = target
        if piece.is_cuda:
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record(torch.cuda.current_stream(piece.device))

    def deliver(self) -> None:
        """Wait for the piece, and move it to its target."""
        if self.arrived is not None:
            self.arrived.synchronize()
        if self.target is not None:
            ctypes.memmove(self.target.data_ptr(), self.memory.data_ptr(), self.target.nbytes)
        self.arrived = self.target = None


@dataclass
class PinnedTransfer:
    """Copies from a GPU into ordinary memory: while one pinned buffer is emptied, the other one fills.

    A pinned copy of each tensor would be page-locked for good, and rounded up to a power of two: some 20 GB for the
    first save of a 1.3B model with AdamW's state.
    """

    num_bytes: int = PINNED_BYTES
    allocate: Callable[[int], Tensor] = _pinned
    _buffers: list[_PinnedBuffer] = field(default_factory=list)
    _next: int = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy `source` to `target`, contiguous and of its shape and dtype. Call `finish` before it is read."""
        if source.numel() == 0:
            return
        if not self._buffers:
            self._buffers = [_PinnedBuffer(self.allocate(self.num_bytes // 2)) for _ in range(2)]
        size, from_bytes, to_bytes = self.num_bytes // 2, _bytes_of(source.detach().contiguous()), _bytes_of(target)
        for start in range(0, len(from_bytes), size):
            self._buffers[self._next].send(from_bytes[start : start + size], to_bytes[start : start + size])
            self._next = 1 - self._next

    def finish(self) -> None:
        """Return when all copies are complete."""
        for buffer in self._buffers:
            buffer.deliver()


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a view of a contiguous tensor as its bytes, [num_bytes]."""
    return tensor.view(-1).view(torch.uint8)


def _ties_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the further names of tensors that have several, each with the first name."""
    ties: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        place: tuple[object, ...] = (id(tensor),)  # where it is sharded, since all ranks have to find the same ties
        if not is_sharded(tensor):
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place in seen:
            ties[name] = seen[place]
        else:
            seen[place] = name
    return ties


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all elements are finite: by sums, far cheaper than a mask, and by a mask where a sum overflows."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _SERIAL_NUMEL):
        chunk = flat[start : start + _SERIAL_NUMEL]
        if chunk.dtype.itemsize == 1:
            chunk = chunk.float()
        if not math.isfinite(abs(chunk.sum().item())) and not bool(torch.isfinite(chunk).all()):
            return False
    return True
