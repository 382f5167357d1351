"""A run that is kept in a store, without a training loop; and machines, each with a cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.runs.stores import runs_folder
from tests.support.checkpoints import new_store, save
from tests.support.recorded_run import recorded_run


class Machines:
    """Lets this process be one machine or another: each has its own copies of what is in stores."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._monkeypatch = folder, monkeypatch

    def be(self, name: str) -> Path:
        """Be the machine of this name from now on. Return its cache."""
        self._monkeypatch.setenv("LLMTRAIN_CACHE", str(self._folder / name))
        return self._folder / name


def run_to_upload(root: str, run_id: str, *steps: int, keep_last: int = 2) -> Path:
    """Make the copy of a run of this machine, with checkpoints of two tiny tensors. Return its folder."""
    run = recorded_run(runs_folder(root), run_id, num_steps=60)
    store = new_store(run / "checkpoints", keep_last=keep_last)
    save(store, *steps[:-1])
    save(store, steps[-1], best=True)
    store.close()
    return run


def objects_of(address: str) -> dict[str, bytes]:
    """Return what a store holds at an address and below."""
    from llmtrain.storage.store import locate

    store, key = locate(address)
    return {entry.key.removeprefix(f"{key}/"): store.read(entry.key) for entry in store.list(key)}
