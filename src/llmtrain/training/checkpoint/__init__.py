"""Checkpoints: a run's state, saved so that it survives a kill, a full disk or a flipped bit at any moment.

    save()        wait for the save before ─▶ copy the tensors ─▶ return          (training waits for this much)
    background    temporary folder ─▶ shards and state, each fsynced ─▶ manifest with hashes, last
                  ─▶ rename ─▶ fsync of the parent ─▶ links ─▶ old checkpoints deleted

    store.py      CheckpointStore: saves a snapshot in the background; all ranks save together
    staging.py    copies of the tensors, so that training may change them meanwhile
    format.py     one checkpoint: its files, its manifest, its verification
    slices.py     slices of tensors: which rank writes which, and reading them back on any number of ranks
    directory.py  checkpoints/ of a run: names, links, deletion, the newest good checkpoint

A resumed run reads: `newest_good` ─▶ `load_state`, `load_optimizer`; the model is read by its own reader.
"""

from llmtrain.training.checkpoint.directory import newest_good, probe_folder, step_folder
from llmtrain.training.checkpoint.format import (
    MANIFEST,
    STATE,
    CheckpointError,
    SaveFailed,
    load_optimizer,
    load_state,
    verify,
)
from llmtrain.training.checkpoint.store import CheckpointStats, CheckpointStore, Snapshot, SplitModel

__all__ = [
    "MANIFEST",
    "STATE",
    "CheckpointError",
    "CheckpointStats",
    "CheckpointStore",
    "SaveFailed",
    "Snapshot",
    "SplitModel",
    "load_optimizer",
    "load_state",
    "newest_good",
    "probe_folder",
    "step_folder",
    "verify",
]
