"""The checkpoint store: saves a run's state so that it survives a kill, a full disk or a flipped bit at any moment.

    save()      wait for the save before → copy the tensors aside → return          (the step waits for this much)
    in a thread temporary folder → every file fsynced → manifest, fsynced → rename → fsync of the parent
                → `latest`, `best`, `final` → delete what is old

What one checkpoint holds is in `checkpoint_files.py`, how several stand together in `checkpoint_shelf.py`; `verify`,
`newest_good`, `load_state` and `load_optimizer` come from there. The thread uses no collectives, and in a run of
several processes only one of them has a store.
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
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmtrain.testing.faults import reach
from llmtrain.training.checkpoint_files import (
    CheckpointError,
    WriteModel,
    load_optimizer,
    load_state,
    render_json,
    verify,
    write_files,
    write_manifest,
)
from llmtrain.training.checkpoint_shelf import BEST, FINAL, LATEST, Shelf, newest_good, step_folder

__all__ = [
    "CheckpointError",
    "CheckpointStats",
    "CheckpointStore",
    "Snapshot",
    "load_optimizer",
    "load_state",
    "newest_good",
    "verify",
]

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
        self._shelf = Shelf(folder)
        try:
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
        copy = Snapshot(
            step=snapshot.step,
            state={},
            model=self._staging.copy(snapshot.model, section="model", keep_ties=True),
            optimizer=self._staging.copy(snapshot.optimizer, section="optimizer"),
        )
        self._staging.finish()
        reach("after-copy", step=snapshot.step)
        links = [LATEST, *([BEST] if best else []), *([FINAL] if final else [])]
        self._pending = self._thread.submit(self._work, copy, state_json, links)
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

    def _work(self, snapshot: Snapshot, state_json: str, links: list[str]) -> None:
        """All that the background thread does for one save."""
        began = time.perf_counter()
        failed = f"the checkpoint of step {snapshot.step} could not be saved in {self._folder}"
        try:
            if not self._stands_already(snapshot.step):
                self._write(snapshot, state_json, links)
            self._own_steps.add(snapshot.step)
            failed = f"step {snapshot.step} is saved, but {self._folder} could not be brought up to date"
            for name in links:
                self._shelf.link(name, snapshot.step)
            self._shelf.delete_old(keep_last=self._keep_last, step=snapshot.step)
        except (OSError, SafetensorError) as error:
            needed = sum(t.nbytes for t in (*snapshot.model.values(), *snapshot.optimizer.values()))
            why = _explain(error, failed, needed_bytes=needed)
            raise CheckpointError(f"{why}. The earlier checkpoints are intact") from error
        finally:
            self.stats.writing_seconds += time.perf_counter() - began

    def _stands_already(self, step: int) -> bool:
        folder = step_folder(self._folder, step)
        if self._knows_its_line or self._own_steps:
            is_this_state = step in self._own_steps
        else:
            is_this_state = folder == self._shelf.newest()
        return is_this_state and folder.exists() and self._shelf.is_good(folder)

    def _write(self, snapshot: Snapshot, state_json: str, links: list[str]) -> None:
        _refuse_non_finite(snapshot)
        published = False
        temp = self._shelf.begin(snapshot.step)
        try:
            reach("temp-made", step=snapshot.step)
            write_files(
                temp,
                config_yaml=self._config_yaml,
                state_json=state_json,
                model=snapshot.model,
                optimizer=snapshot.optimizer,
                write_model=self._write_model,
                step=snapshot.step,
            )
            write_manifest(temp, step=snapshot.step, sequence=self._shelf.next_sequence(), links=links)
            self._shelf.publish(temp, snapshot.step)
            published = True
        finally:
            if not published:
                shutil.rmtree(temp, ignore_errors=True)
        self.stats.num_saves += 1


class _Staging:
    """Memory on the CPU into which tensors are copied before a save, kept from save to save.

    Copied always: an asynchronous write of a live CPU tensor stores what it holds later (pytorch#144657). Kept, because
    fresh memory costs several times as much as the copy, and pinned memory more still.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._devices: set[torch.device] = set()

    def copy(self, tensors: Mapping[str, Tensor], *, section: str, keep_ties: bool = False) -> dict[str, Tensor]:
        """Name → contiguous copy, complete after `finish`. With `keep_ties`, names of one tensor get one copy."""
        copies: dict[str, Tensor] = {}
        seen: dict[tuple[object, ...], Tensor] = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if keep_ties and tensor.numel() > 0 and place in seen:
                copies[name] = seen[place]
                continue
            copies[name] = seen[place] = self._copy_one((section, name), tensor)
        return copies

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


def _refuse_non_finite(snapshot: Snapshot) -> None:
    """A checkpoint that holds NaN would push out the good ones before it. Raises CheckpointError."""
    for kind, tensors in (("weight", snapshot.model), ("optimizer state", snapshot.optimizer)):
        for name, tensor in tensors.items():
            if not _is_finite(tensor):
                raise CheckpointError(
                    f"the checkpoint of step {snapshot.step} was not saved: {kind} {name} holds NaN or infinity. "
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
