"""Checkpoints of two tiny tensors, and their directory as tests look at it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.training.checkpoint import CheckpointStore, Snapshot, step_folder
from llmtrain.training.checkpoint.directory import work_path


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """A model's writer, as the store takes one."""
    save_file(dict(tensors), folder / "model.safetensors")


def snapshot(step: int, value: float | None = None, *, numel: int = 64) -> Snapshot:
    """A snapshot whose weights are all `value` (by default the step), and whose optimizer state is ten times that."""
    values = torch.full((numel,), float(step) if value is None else value)
    return Snapshot(step=step, state={"step": step}, model={"w": values}, optimizer={"w/exp_avg": values * 10})


def new_store(folder: Path, *, keep_last: int = 2, resumed_step: int | None = None) -> CheckpointStore:
    """Open a store, as a start of a run does."""
    resumed_from = None if resumed_step is None else step_folder(folder, resumed_step)
    return CheckpointStore(
        folder, keep_last=keep_last, config_yaml="run: {}\n", write_model=write_model, resumed_from=resumed_from
    )


def save(store: CheckpointStore, *steps: int, best: bool = False, final: bool = False) -> None:
    """Save some steps, and wait until they are on the disk."""
    for step in steps:
        store.save(snapshot(step), best=best, final=final)
    store.wait()


def finish_writing(store: CheckpointStore) -> None:
    """Return when the store's thread has nothing to do. Unlike `wait`, this raises no error of the save."""
    store._thread.submit(lambda: None).result()


def steps_in(folder: Path) -> list[int]:
    """Return the steps whose checkpoints are in the folder, and make sure that no work was left there."""
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def weights(checkpoint: Path) -> Tensor:
    """Read the weights of a checkpoint."""
    read: Tensor = load_file(checkpoint / "model" / "model.safetensors")["w"]
    return read


def flip_a_bit(path: Path) -> None:
    """Damage a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def host_in_names() -> str:
    """Return this machine's name as the names of work in progress hold it."""
    return work_path(Path(), "temp", "step_000001").name.split("-")[2]
