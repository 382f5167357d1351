"""The checkpoint store: copies a run's state and writes it in the background while training goes on.

    save()      wait for the save before ─▶ copy the tensors ─▶ return
    thread      prepare ─▶ each rank writes its files ─▶ rank 0 writes the manifest and publishes ─▶ links, deletion

What a checkpoint holds is in `format.py`, what stands beside it in `directory.py`.

Where every rank holds all weights, rank 0 has a store. Where they are sharded, every rank has one, and the stores work
together through a group (`distributed/group.py`): each copies, writes and hashes its own slices, rank 0 does what is
done once, and after each stage every rank knows whether it went well on all.
"""

from __future__ import annotations

import errno
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
from typing import Any, NamedTuple, TypeVar, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmtrain.distributed.group import ALONE, RankGroup
from llmtrain.faults import reach
from llmtrain.training.checkpoint.directory import BEST, FINAL, LATEST, CheckpointDirectory, step_folder, step_of
from llmtrain.training.checkpoint.format import (
    MODEL,
    CheckpointError,
    Records,
    SaveFailed,
    begin_files,
    finish_files,
    finish_model_files,
    render_json,
    write_index,
    write_manifest,
    write_optimizer_files,
    write_state,
)
from llmtrain.training.checkpoint.slices import Slices, gather_full, owners_of, parts_to_write, slices_of
from llmtrain.training.checkpoint.staging import Copies, Staging

T = TypeVar("T")

_NICENESS = 10
_ADVICE = {
    errno.ENOSPC: "Free some space, or lower trainer.keep_last",
    errno.EDQUOT: "Free some space, or lower trainer.keep_last",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Make the folder writable for this user",
    errno.EPERM: "Make the folder writable for this user",
}

NoteSaved = Callable[..., None]
"""Called as `(step, best=…)` by the thread that saves, on rank 0, once a checkpoint and its links are on the disk."""
WriteModel = Callable[[Path, Mapping[str, Tensor]], None]
"""Writes model files into an existing, empty folder. Must keep no tensor that it got: the next save overwrites them."""


@dataclass(frozen=True)
class SplitModel:
    """Assignment of a model's weights to ranks that write them together, each rank some full tensors."""

    unit_of: Callable[[str], str]
    """Names the unit of a tensor; the tensors of a unit are in one file."""
    write_weights: WriteModel
    """Writes some units into one safetensors file."""
    write_rest: Callable[[Path, torch.dtype], None]
    """Writes all of `model/` but the weights, which have that dtype."""


@dataclass(frozen=True)
class Snapshot:
    """State from which a run goes on: tensors and plain values."""

    step: int
    state: Mapping[str, Any]
    """Values of state.json: numbers, strings, lists, dicts, None."""
    model: Mapping[str, Tensor]
    """Weights by llmtrain's names. Tied weights may have several names here; `write_model` gets them tied."""
    optimizer: Mapping[str, Tensor]
    """`<parameter>/<state>` → tensor."""


@dataclass
class CheckpointStats:
    """Number, bytes and seconds of the saves so far."""

    stalled_seconds: float = 0.0
    """Time that training stood still, in save() and wait()."""
    writing_seconds: float = 0.0
    """Time that the thread worked in the background."""
    num_saves: int = 0
    """Checkpoints written, without those that only got a link."""


@dataclass(frozen=True)
class _Save:
    """A save under way."""

    step: int
    state_json: str
    links: list[str]
    copies: Copies


@dataclass(frozen=True)
class _Prepared:
    """Message that a rank sends to the others before they write."""

    temp: Path | None
    """Temporary folder, made by rank 0; None if the checkpoint exists already."""
    model: Slices
    optimizer: Slices


class _Fault(NamedTuple):
    """Error of a rank, as the others are told of it."""

    message: str
    can_go_on: bool
    """The error is that of a file system: see SaveFailed."""


class CheckpointStore:
    """Writes the checkpoints of one run into `folder`, which it makes and cleans up.

    `resumed_from` is the checkpoint that this process goes on from; it becomes the newest. A checkpoint that exists at
    the step of a save is taken to be this very state if this store wrote it or the run was resumed from it (if
    `resumed_from` is not given: if it is the newest), and only gets its links. Any other was saved by an earlier course
    of the run, and is replaced.

    `group`: the ranks that save together. Each has a store, and calls the same methods with its parts of the tensors;
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
        resumed_from: Path | None = None,
        group: RankGroup = ALONE,
        split: SplitModel | None = None,
        saved: NoteSaved | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, but at least one checkpoint has to be kept")
        self.stats = CheckpointStats()
        self._folder = folder
        self._keep_last = keep_last
        self._config_yaml = config_yaml
        self._write_model = write_model
        self._note_saved = saved
        self._saved_steps: set[int] = set() if resumed_from is None else {step_of(resumed_from)}
        self._staging = Staging()
        self._pending: Future[None] | None = None
        self._group = group
        self._split = split if group.size > 1 else None
        self._temp: Path | None = None
        self._directory = CheckpointDirectory(folder)
        try:
            if group.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                self._directory.clean_up()
                if resumed_from is not None:
                    self._directory.go_on_from(resumed_from)
        except OSError as error:
            raise CheckpointError(_explain(error, f"checkpoints cannot be kept in {folder}")) from error
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_lower_priority)

    def save(self, snapshot: Snapshot, *, best: bool = False, final: bool = False) -> None:
        """Save in the background; afterwards the snapshot's tensors may change. `best`, `final`: links to move as well.

        Waits for the save before it, and raises CheckpointError if that one failed (SaveFailed for reasons of the file
        system); this one is not begun then.
        Raises TypeError or ValueError if the state is nothing that JSON can hold.
        """
        self.wait()
        began = time.perf_counter()
        state_json = render_json(snapshot.state)
        reach("before-copy", step=snapshot.step)
        links = [LATEST, *([BEST] if best else []), *([FINAL] if final else [])]
        copies = self._staging.copy(snapshot.model, snapshot.optimizer)
        reach("after-copy", step=snapshot.step)
        save = _Save(snapshot.step, state_json, links, copies)
        self._pending = self._thread.submit(self._write_in_background, save)
        self.stats.stalled_seconds += time.perf_counter() - began

    def wait(self) -> None:
        """Return when the save under way is on the disk. Raises CheckpointError if it failed, as `save` does."""
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

    def _write_in_background(self, save: _Save) -> None:
        """Do all that the thread does for one save."""
        began = time.perf_counter()
        try:
            ranks = self._on_all_ranks(partial(self._prepare, save), save)
            if (temp := ranks[0].temp) is not None:
                records = self._write(save, temp, ranks)
                self._on_all_ranks(partial(self._publish, save, temp, records), save)
                self.stats.num_saves += 1
            self._saved_steps.add(save.step)
            saved = f"step {save.step} is saved, but {self._folder} could not be brought up to date"
            self._on_all_ranks(partial(self._update_directory, save), save, failed=saved)
            if self._note_saved is not None and self._group.is_main:
                self._note_saved(save.step, best=BEST in save.links)
        finally:
            if self._temp is not None:  # it was not published
                shutil.rmtree(self._temp, ignore_errors=True)
                self._temp = None
            self.stats.writing_seconds += time.perf_counter() - began

    def _prepare(self, save: _Save) -> _Prepared:
        """Check the tensors; on rank 0 make the temporary folder, unless the checkpoint exists already."""
        if self._group.is_main and self._exists_already(save.step):
            return _Prepared(None, {}, {})
        if (tensor := save.copies.non_finite()) is not None:  # such a checkpoint would push out the good ones
            raise CheckpointError(
                f"the checkpoint of step {save.step} was not saved: {tensor} holds NaN or infinity. "
                "The earlier checkpoints are intact"
            )
        if self._group.is_main:
            self._temp = self._directory.begin(save.step, is_best=BEST in save.links)
            reach("temp-made", step=save.step)
            begin_files(self._temp, config_yaml=self._config_yaml)
        return _Prepared(self._temp, slices_of(save.copies.model), slices_of(save.copies.optimizer))

    def _write(self, save: _Save, temp: Path, ranks: list[_Prepared]) -> Records:
        """Let every rank write its files, and describe those of all ranks."""
        copies, group = save.copies, self._group
        unit_of: Callable[[str], str] = str if self._split is None else self._split.unit_of
        owners = owners_of(copies.model, unit_of=unit_of, num_ranks=1 if self._split is None else group.size)
        slices = [rank.model for rank in ranks]
        weights = gather_full(copies.model, slices, owners=owners, unit_of=unit_of, group=group)
        weights |= {alias: weights[name] for alias, name in copies.ties.items() if name in weights}
        optimizer = parts_to_write(copies.optimizer, [rank.optimizer for rank in ranks], rank=group.rank)

        def write() -> Records:
            records = self._write_weights(temp, weights, writers=sorted(set(owners.values())), step=save.step)
            reach("model-synced", step=save.step)
            prefix = "shard_" if group.size == 1 else f"rank_{group.rank:05d}_shard_"
            records |= write_optimizer_files(temp, optimizer, prefix=prefix)
            reach("optimizer-written", step=save.step)
            return records

        written = self._on_all_ranks(write, save)
        return {name: record for records in written for name, record in records.items()}

    def _write_weights(self, temp: Path, weights: Mapping[str, Tensor], *, writers: list[int], step: int) -> Records:
        """Write the full tensors that this rank owns."""
        if self._split is None and self._group.is_main:
            self._write_model(temp / MODEL, weights)
            reach("model-written", step=step)
            return finish_model_files(temp, known={})
        if self._split is not None and self._group.rank in writers:
            number = writers.index(self._group.rank) + 1
            name = f"{MODEL}/model-{number:05d}-of-{len(writers):05d}.safetensors"
            self._split.write_weights(temp / name, weights)
            reach("model-written", step=step)
            return finish_files(temp, [name])
        return {}

    def _publish(self, save: _Save, temp: Path, records: Records) -> None:
        """Write on rank 0 the files that exist once, the manifest last; then give the checkpoint its name."""
        if not self._group.is_main:
            return
        if self._split is not None:
            self._split.write_rest(temp / MODEL, next(iter(save.copies.model.values())).local.dtype)
            records |= finish_model_files(temp, known=records)
            records |= write_index(temp, records)
        write_state(temp, save.state_json, step=save.step)
        newest = self._directory.newest()
        sequence = 1 if newest is None else newest[1].sequence + 1
        write_manifest(temp, step=save.step, sequence=sequence, links=save.links, records=records)
        self._directory.publish(temp, save.step, is_best=BEST in save.links)
        self._temp = None

    def _update_directory(self, save: _Save) -> None:
        """Move the links on rank 0, then delete old checkpoints."""
        if self._group.is_main:
            for name in save.links:
                self._directory.link(name, save.step)
            self._directory.delete_old(keep_last=self._keep_last, step=save.step, course=self._saved_steps)

    def _on_all_ranks(self, work: Callable[[], T], save: _Save, *, failed: str | None = None) -> list[T]:
        """Return on every rank what `work` returns on each. If it fails on one, all raise CheckpointError."""
        failed = failed or f"the checkpoint of step {save.step} could not be saved in {self._folder}"
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except (OSError, SafetensorError) as cause:
            why = _explain(cause, failed, needed_bytes=save.copies.num_bytes)
            error = SaveFailed(f"{why}. The earlier checkpoints are intact")
            error.__cause__ = cause
        except Exception as cause:
            error = cause
        fault = None if error is None else _Fault(str(error) or type(error).__name__, isinstance(error, SaveFailed))
        outcomes = self._group.gather((result, fault))
        faults = [(rank, fault) for rank, (_, fault) in enumerate(outcomes) if fault is not None]
        if grave := [found for found in faults if not found[1].can_go_on]:  # then no rank may go on
            faults, error = grave, None if isinstance(error, SaveFailed) else error
        if error is not None:
            raise error
        if faults:
            rank, first = faults[0]
            raise (SaveFailed if first.can_go_on else CheckpointError)(f"rank {rank}: {first.message}")
        return [cast(T, value) for value, _ in outcomes]

    def _exists_already(self, step: int) -> bool:
        """Tell whether the step's checkpoint is of this very state, and good."""
        folder = step_folder(self._folder, step)
        if self._saved_steps:
            is_this_state = step in self._saved_steps
        else:
            newest = self._directory.newest()
            is_this_state = newest is not None and newest[0] == folder
        return is_this_state and folder.exists() and self._directory.is_good(folder)


def _explain(error: OSError | SafetensorError, what: str, *, needed_bytes: int | None = None) -> str:
    """Return one message for users: what failed, why, where, and what to do about it."""
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
        message += f". {_ADVICE[number]}"
    return message


def _lower_priority() -> None:
    """Let the training step go first. Only Linux gives threads a priority of their own."""
    if sys.platform == "linux":
        own = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + _NICENESS))
