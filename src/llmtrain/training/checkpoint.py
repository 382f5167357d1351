"""The checkpoint store: saves a run's state so that it survives a kill, a full disk or a flipped bit at any moment.

    save()      wait for the save before → copy the tensors aside → return          (the step waits for this much)
    in a thread temporary folder → every file fsynced → manifest, fsynced → rename → fsync of the parent
                → `latest`, `best`, `final` → delete what is old

What one checkpoint holds is in `checkpoint_files.py`, how several stand together in `checkpoint_shelf.py`; `verify`,
`newest_good`, `load_state` and `load_optimizer` come from there.

Where every rank holds all weights, one of them has a store. Where they are cut, each has one, and these work together
through a gang (`distributed/gang.py`): each copies, writes and hashes its own, rank 0 does what is done once, and after
each stage all know whether it went well on all.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmtrain.distributed.gang import ALONE, Gang
from llmtrain.distributed.sharding import Part, is_cut, part_of
from llmtrain.testing.faults import reach
from llmtrain.training.checkpoint_files import (
    CheckpointError,
    Records,
    SplitModel,
    WriteModel,
    begin_files,
    load_optimizer,
    load_state,
    render_json,
    verify,
    write_index,
    write_manifest,
    write_model_files,
    write_optimizer_files,
    write_state,
    write_weights_file,
)
from llmtrain.training.checkpoint_gather import Boxes, assemble, boxes_of, owners_of
from llmtrain.training.checkpoint_shelf import BEST, FINAL, LATEST, Shelf, newest_good, step_folder

__all__ = [
    "CheckpointError",
    "CheckpointStats",
    "CheckpointStore",
    "Snapshot",
    "SplitModel",
    "load_optimizer",
    "load_state",
    "newest_good",
    "verify",
]

T = TypeVar("T")

_SERIAL_NUMEL = 16384
"""Elements that torch adds up without waking its threads, which belong to the training step."""
_NICENESS = 10
_ADVICE = {
    errno.ENOSPC: "free some space, or lower trainer.keep_last",
    errno.EDQUOT: "free some space, or lower trainer.keep_last",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "make the folder writable for this user",
    errno.EPERM: "make the folder writable for this user",
}


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on from here."""

    step: int
    state: Mapping[str, Any]
    """Goes to state.json: numbers, strings, lists, dicts, None."""
    model: Mapping[str, Tensor]
    """By our names; tied weights may stand here several times, and `write_model` gets them tied."""
    optimizer: Mapping[str, Tensor]
    """`<parameter>/<state>` → tensor."""


@dataclass(frozen=True)
class _Copy:
    """What this rank holds of a snapshot, aside."""

    step: int
    state_json: str
    links: list[str]
    model: Mapping[str, Part]
    ties: Mapping[str, str]
    """Other names of tensors of `model` → the names that they stand under there."""
    optimizer: Mapping[str, Part]

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(part.local.nbytes for part in (*self.model.values(), *self.optimizer.values()))


@dataclass(frozen=True)
class _Begun:
    """What the ranks tell each other before they write."""

    temp: Path | None
    """Where to; None: the checkpoint stands already. From rank 0."""
    boxes: Boxes
    """Where this rank's parts of the weights lie."""
    optimizer_boxes: Boxes
    """And those of the optimizer's state."""


@dataclass
class CheckpointStats:
    """What saving cost so far."""

    stalled_seconds: float = 0.0
    """In save() and wait(): time that training stood still."""
    writing_seconds: float = 0.0
    """In the background."""
    num_saves: int = 0
    """Checkpoints written; those that only got a link are not counted."""


class CheckpointStore:
    """Writes the checkpoints of one run into `folder`, which it makes and tidies up.

    `resumed_step` is the step that this process went on from. A checkpoint that stands at the step of a save is taken
    to be this very state if this store wrote it or the run was resumed from it (when `resumed_step` is not given: if
    it is the newest), and only gets its links; any other is of a line that the run has left, and is replaced.

    `gang`: the ranks that save together. Each has a store, and calls the same methods with its parts of the tensors;
    an error on one of them is raised on all. Weights are written by rank 0 alone unless `split` says how to share that.

    Raises CheckpointError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        config_yaml: str,
        write_model: WriteModel,
        resumed_step: int | None = None,
        gang: Gang = ALONE,
        split: SplitModel | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least one checkpoint has to be kept")
        self.stats = CheckpointStats()
        self._folder = folder
        self._keep_last = keep_last
        self._config_yaml = config_yaml
        self._write_model = write_model
        self._own_steps = set() if resumed_step is None else {resumed_step}
        self._knows_its_line = resumed_step is not None
        self._staging = _Staging()
        self._pending: Future[None] | None = None
        self._gang = gang
        self._split = split if gang.size > 1 else None
        self._temp: Path | None = None
        self._shelf = Shelf(folder)
        try:
            if gang.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                self._shelf.tidy()
        except OSError as error:
            raise CheckpointError(_explain(error, f"checkpoints cannot be kept in {folder}")) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority)

    def save(self, snapshot: Snapshot, *, best: bool = False, final: bool = False) -> None:
        """Save in the background; afterwards the snapshot's tensors may change. `best`, `final`: links to move as well.

        Waits for the save before it, and raises CheckpointError if that one failed; this one is not begun then.
        Raises TypeError or ValueError if the state is nothing that JSON can hold.
        """
        self.wait()
        began = time.perf_counter()
        state_json = render_json(snapshot.state)
        reach("before-copy", step=snapshot.step)
        links = [LATEST, *([BEST] if best else []), *([FINAL] if final else [])]
        model, ties = self._staging.copy(snapshot.model, section="model", keep_ties=True)
        optimizer, _ = self._staging.copy(snapshot.optimizer, section="optimizer")
        self._staging.finish()
        reach("after-copy", step=snapshot.step)
        copy = _Copy(snapshot.step, state_json, links, model=model, ties=ties, optimizer=optimizer)
        self._pending = self._thread.submit(self._work, copy)
        self.stats.stalled_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Return when the save under way is on the disk. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        began = time.perf_counter()
        try:
            error = self._pending.exception()
            self._pending = None
        finally:
            self.stats.stalled_seconds += time.perf_counter() - began
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, then give back the thread and the memory. Raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.clear()

    def _work(self, copy: _Copy) -> None:
        """All that the background thread does for one save."""
        began = time.perf_counter()
        try:
            ranks = self._together(partial(self._begin, copy), copy)
            if (temp := ranks[0].temp) is not None:
                self._write(copy, temp, ranks)
            self._own_steps.add(copy.step)
            saved = f"step {copy.step} is saved, but {self._folder} could not be brought up to date"
            self._together(partial(self._tidy_up, copy), copy, failed=saved)
        finally:
            if self._temp is not None:  # it was not published
                shutil.rmtree(self._temp, ignore_errors=True)
                self._temp = None
            self.stats.writing_seconds += time.perf_counter() - began

    def _begin(self, copy: _Copy) -> _Begun:
        """On rank 0: the folder to write to, unless there is nothing to write. On all: are the tensors fit for it?"""
        if self._gang.is_main and self._stands_already(copy.step):
            return _Begun(None, {}, {})
        _refuse_non_finite(copy)
        if self._gang.is_main:
            self._temp = self._shelf.begin(copy.step)
            reach("temp-made", step=copy.step)
            begin_files(self._temp, config_yaml=self._config_yaml)
        return _Begun(self._temp, boxes_of(copy.model), boxes_of(copy.optimizer))

    def _write(self, copy: _Copy, temp: Path, ranks: list[_Begun]) -> None:
        """Every rank its own files, then rank 0 what belongs to all, and the checkpoint counts."""
        owners = self._owners(copy)
        weights = {name: part.local for name, part in copy.model.items()}
        if self._gang.size > 1:
            boxes = [rank.boxes for rank in ranks]
            weights = assemble(copy.model, boxes, owners=owners, unit_of=self._unit_of, gang=self._gang)
        weights |= {alias: weights[name] for alias, name in copy.ties.items() if name in weights}
        optimizer = self._own_optimizer(copy, [rank.optimizer_boxes for rank in ranks])
        written = self._together(partial(self._write_own, copy, temp, weights, optimizer, owners), copy)
        records = {name: record for records in written for name, record in records.items()}
        self._together(partial(self._publish, copy, temp, records), copy)
        self.stats.num_saves += 1

    def _write_own(
        self,
        copy: _Copy,
        temp: Path,
        weights: Mapping[str, Tensor],
        optimizer: Mapping[str, Part],
        owners: Mapping[str, int],
    ) -> Records:
        """The whole tensors that this rank owns, and its parts of the optimizer's state."""
        rank, step = self._gang.rank, copy.step
        records: Records = {}

        def write(path: Path) -> None:
            (self._write_model if self._split is None else self._split.write_weights)(path, weights)
            reach("model-written", step=step)

        writers = sorted(set(owners.values()))
        if self._split is None and self._gang.is_main:
            records |= write_model_files(temp, write)
        elif self._split is not None and rank in writers:
            name = f"model-{writers.index(rank) + 1:05d}-of-{len(writers):05d}.safetensors"
            records |= write_weights_file(temp, name, write)
        reach("model-synced", step=step)
        prefix = "shard_" if self._gang.size == 1 else f"rank_{rank:05d}_shard_"
        records |= write_optimizer_files(temp, optimizer, prefix=prefix)
        reach("optimizer-written", step=step)
        return records

    def _publish(self, copy: _Copy, temp: Path, records: Records) -> None:
        """On rank 0: what is written once, the manifest last; then the checkpoint gets its name."""
        if not self._gang.is_main:
            return
        if self._split is not None:
            split, dtype = self._split, next(iter(copy.model.values())).local.dtype
            records |= write_model_files(temp, lambda folder: split.write_rest(folder, dtype))
            records |= write_index(temp, records)
        write_state(temp, copy.state_json, step=copy.step)
        sequence = self._shelf.next_sequence()
        write_manifest(temp, step=copy.step, sequence=sequence, links=copy.links, records=records)
        self._shelf.publish(temp, copy.step)
        self._temp = None

    def _tidy_up(self, copy: _Copy) -> None:
        """On rank 0: the links, then what is old goes."""
        if self._gang.is_main:
            for name in copy.links:
                self._shelf.link(name, copy.step)
            self._shelf.delete_old(keep_last=self._keep_last, step=copy.step)

    def _owners(self, copy: _Copy) -> dict[str, int]:
        if self._split is None:
            return dict.fromkeys(copy.model, 0)
        return owners_of(copy.model, unit_of=self._unit_of, num_ranks=self._gang.size)

    def _unit_of(self, name: str) -> str:
        return name if self._split is None else self._split.unit_of(name)

    def _own_optimizer(self, copy: _Copy, boxes: list[Boxes]) -> dict[str, Part]:
        """What several ranks hold alike the first of them writes; empty parts nobody writes."""
        if self._gang.size == 1:
            return dict(copy.optimizer)
        before, own = boxes[: self._gang.rank], boxes[self._gang.rank]
        return {
            name: part
            for name, part in copy.optimizer.items()
            if part.local.numel() and all(other.get(name) != own[name] for other in before)
        }

    def _together(self, work: Callable[[], T], copy: _Copy, *, failed: str | None = None) -> list[T]:
        """What `work` gives on each rank, on every rank. If it fails on one, all raise CheckpointError."""
        failed = failed or f"the checkpoint of step {copy.step} could not be saved in {self._folder}"
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except (OSError, SafetensorError) as cause:
            why = _explain(cause, failed, needed_bytes=copy.num_bytes)
            error = CheckpointError(f"{why}. The earlier checkpoints are intact")
            error.__cause__ = cause
        except Exception as cause:
            error = cause
        if self._gang.size == 1:
            if error is not None:
                raise error
            return [cast(T, result)]
        outcomes = self._gang.gather((result, None if error is None else str(error) or type(error).__name__))
        if error is not None:
            raise error
        if faults := [f"rank {rank}: {fault}" for rank, (_, fault) in enumerate(outcomes) if fault is not None]:
            raise CheckpointError(faults[0])
        return [cast(T, value) for value, _ in outcomes]

    def _stands_already(self, step: int) -> bool:
        folder = step_folder(self._folder, step)
        if self._knows_its_line or self._own_steps:
            is_this_state = step in self._own_steps
        else:
            is_this_state = folder == self._shelf.newest()
        return is_this_state and folder.exists() and self._shelf.is_good(folder)


class _Staging:
    """Memory on the CPU into which tensors are copied before a save, kept from save to save.

    Copied always: an asynchronous write of a live CPU tensor stores what it holds later (pytorch#144657). Kept, because
    fresh memory costs several times as much as the copy, and pinned memory more still.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._devices: set[torch.device] = set()

    def copy(
        self, tensors: Mapping[str, Tensor], *, section: str, keep_ties: bool = False
    ) -> tuple[dict[str, Part], dict[str, str]]:
        """Name → contiguous copy of what this rank holds, complete after `finish`.

        With `keep_ties`, of the names of one tensor only the first has a copy; the others are told beside.
        """
        copies: dict[str, Part] = {}
        ties: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor in tensors.items():
            part = part_of(tensor)
            local = part.local
            place: tuple[object, ...] = (local.device, local.data_ptr(), local.dtype, local.shape, local.stride())
            if is_cut(tensor):  # a part may be empty here and not elsewhere, but all ranks have to find the same ties
                place = (id(tensor),)
            if keep_ties and tensor.numel() > 0 and place in seen:
                ties[name] = seen[place]
                continue
            seen[place] = name
            copies[name] = Part(self._copy_one((section, name), local), part.offset, part.shape)
        return copies, ties

    def finish(self) -> None:
        """Wait for the copies from GPUs."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self._devices.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _copy_one(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            # One thread fills the memory's bus; torch's threads would have to meet after every tensor, which takes
            # ten times as long once anything else runs on the machine.
            ctypes.memmove(buffer.data_ptr(), tensor.data_ptr(), tensor.nbytes)
        else:
            buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return buffer


def _refuse_non_finite(copy: _Copy) -> None:
    """A checkpoint that holds NaN would push out the good ones before it. Raises CheckpointError."""
    for kind, parts in (("weight", copy.model), ("optimizer state", copy.optimizer)):
        for name, part in parts.items():
            if not _is_finite(part.local):
                raise CheckpointError(
                    f"the checkpoint of step {copy.step} was not saved: {kind} {name} holds NaN or infinity. "
                    "The earlier checkpoints are intact"
                )


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are; by sums, which are far cheaper than a mask, and by a mask where a sum overflows."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _SERIAL_NUMEL):
        piece = flat[start : start + _SERIAL_NUMEL]
        if piece.dtype.itemsize == 1:
            piece = piece.float()
        if not math.isfinite(abs(piece.sum().item())) and not bool(torch.isfinite(piece).all()):
            return False
    return True


def _explain(error: OSError | SafetensorError, what: str, *, needed_bytes: int | None = None) -> str:
    """One message for people: what failed, why, where, and what to do about it."""
    if isinstance(error, OSError):
        number = error.errno
        why = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
    else:  # the writer of safetensors reports errors of the system as text
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
        why = os.strerror(number) if number is not None else str(error)
    message = f"{what}: {why}"
    if number in (errno.ENOSPC, errno.EDQUOT) and needed_bytes is not None:
        message += f"; it needs {needed_bytes / 1e6:.1f} MB"
    if number in _ADVICE:
        message += f". To go on, {_ADVICE[number]}"
    return message


def _lower_priority() -> None:
    """Let the training step go first. Linux alone gives threads a priority of their own."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS))
