"""The checkpoint store: what is saved, when it is on the disk, which errors are raised."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmtrain.faults import VARIABLE, FaultInjected
from llmtrain.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Snapshot,
    load_optimizer,
    load_state,
    newest_good,
    verify,
)
from llmtrain.training.checkpoint import directory as checkpoint_directory
from llmtrain.training.checkpoint import format as checkpoint_format
from tests.support.checkpoints import (
    finish_writing,
    flip_a_bit,
    new_store,
    save,
    snapshot,
    steps_in,
    weights,
    write_model,
)

NOBODY = 65534
"""The user id without rights."""


def test_saved_values_are_those_at_the_call_while_training_goes_on(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sleep@temp-made:0.1")
    weight, moment = torch.full((300, 300), 1.0), torch.full((300, 300), 2.0)
    state = {"step": 1, "nested": {"item": 3}}
    store.save(Snapshot(step=1, state=state, model={"w": weight}, optimizer={"w/exp_avg": moment}))
    weight.fill_(-1.0)
    moment.fill_(-1.0)
    state["nested"] = {"item": 4}
    store.wait()
    assert weights(folder / "latest").eq(1.0).all()
    assert load_optimizer(folder / "latest")["w/exp_avg"].full().eq(2.0).all()
    assert load_state(folder / "latest") == {"step": 1, "nested": {"item": 3}}


def test_the_next_save_does_not_overwrite_a_copy_that_is_being_written(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sleep@temp-made:0.05")
    save(store, 1, 2)
    assert weights(folder / "step_000001").eq(1.0).all()
    assert weights(folder / "step_000002").eq(2.0).all()


def test_save_returns_once_the_tensors_are_copied(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = tmp_path / "go-on"
    monkeypatch.setenv(VARIABLE, f"wait@model-written:{go_on}")
    store.save(snapshot(1))  # returns, though the writer waits
    stalled = store.stats.stalled_seconds
    threading.Timer(0.2, go_on.touch).start()
    store.wait()
    assert store.stats.stalled_seconds - stalled > 0.1  # wait() is a stall as well
    assert store.stats.writing_seconds > 0.1
    assert store.stats.num_saves == 1


def test_one_thread_writes_with_lower_priority_than_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    def note_thread(model_folder: Path, tensors: Mapping[str, Tensor]) -> None:
        own = threading.get_native_id()
        seen.append((own, os.getpriority(os.PRIO_PROCESS, own) if sys.platform == "linux" else 10))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    store = CheckpointStore(folder, keep_last=2, config_yaml="", write_model=note_thread)
    save(store, 1, 2)
    store.close()
    assert len({thread for thread, _ in seen}) == 1
    assert seen[0][0] != threading.get_native_id()
    assert seen[0][1] > before
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_tied_weights_reach_the_writer_tied_and_others_separate(folder: Path) -> None:
    got: dict[str, Tensor] = {}

    def keep(model_folder: Path, tensors: Mapping[str, Tensor]) -> None:
        got.update(tensors)

    tied = torch.ones(4, 3)
    store = CheckpointStore(folder, keep_last=1, config_yaml="", write_model=keep)
    model = {"embed": tied, "head": tied, "same_shape": torch.ones(4, 3), "turned": tied.t()}
    store.save(Snapshot(step=1, state={}, model=model, optimizer={}))
    store.close()
    assert got["head"] is got["embed"]
    assert len({tensor.data_ptr() for tensor in got.values()}) == 3
    assert got["turned"].is_contiguous()
    assert torch.equal(got["turned"], tied.t())


def test_a_parameter_that_needs_gradients_and_an_empty_optimizer_state_are_saved(
    store: CheckpointStore, folder: Path
) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    store.save(Snapshot(step=1, state={}, model={"w": parameter}, optimizer={}))
    store.wait()
    assert load_optimizer(folder / "latest") == {}
    assert weights(folder / "latest").tolist() == [1.0, 1.0, 1.0]


def test_a_state_that_json_cannot_hold_is_rejected_at_once(store: CheckpointStore) -> None:
    with pytest.raises(TypeError):
        store.save(Snapshot(step=1, state={"rng": object()}, model={}, optimizer={}))
    with pytest.raises(ValueError):
        store.save(Snapshot(step=1, state={"loss": float("nan")}, model={}, optimizer={}))


@pytest.mark.parametrize("section", ["model", "optimizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nan_and_infinity_are_rejected_and_the_good_checkpoint_stays(
    store: CheckpointStore, folder: Path, section: str, bad: float, dtype: torch.dtype
) -> None:
    save(store, 1)
    values = torch.ones(40_000)
    values[33_000] = bad
    good = torch.ones(3)
    tensors = {"fine": good, "blocks.3.w": values.to(dtype)}
    model, optimizer = (tensors, {}) if section == "model" else ({"w": good}, tensors)
    store.save(Snapshot(step=2, state={}, model=model, optimizer=optimizer), best=True, final=True)
    kind = "weight" if section == "model" else "optimizer state"
    with pytest.raises(CheckpointError, match=rf"step 2 was not saved: {kind} blocks\.3\.w holds NaN or infinity"):
        store.wait()
    assert steps_in(folder) == [1]
    assert (folder / "latest").readlink() == Path("step_000001")
    assert not (folder / "best").exists()


def test_large_finite_values_whose_sum_overflows_are_saved(store: CheckpointStore, folder: Path) -> None:
    store.save(Snapshot(step=1, state={}, model={"w": torch.full((4,), 3e38)}, optimizer={}))
    store.save(Snapshot(step=2, state={}, model={"w": torch.full((9,), 60000.0, dtype=torch.float16)}, optimizer={}))
    store.wait()
    assert steps_in(folder) == [1, 2]


def test_latest_moves_once_everything_is_on_the_disk_and_old_checkpoints_are_deleted_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(folder, keep_last=1)
    save(store, 1)
    events: list[tuple[str, str]] = []

    def name(path: os.PathLike[str] | str) -> str:
        return str(Path(path).relative_to(folder)) if Path(path) != folder else "."

    def record(module: object, function: str, label: str) -> None:
        original = getattr(module, function)

        def recorded(path: Path, *target: Path) -> None:
            events.append((label, name(target[0] if target else path)))
            original(path, *target)

        monkeypatch.setattr(module, function, recorded)

    for module in (checkpoint_format, checkpoint_directory):
        record(module, "sync", "sync")
    record(os, "rename", "rename")
    record(os, "replace", "replace")
    save(store, 2)
    monkeypatch.undo()
    store.close()

    published = events.index(("rename", "step_000002"))
    before = [Path(*Path(path).parts[1:]).as_posix() for kind, path in events[:published] if kind == "sync"]
    assert before[-2:] == ["MANIFEST.json", "."]
    assert set(before[:-2]) == {
        "config.yaml",
        "state.json",
        "model",
        "model/model.safetensors",
        "optimizer",
        "optimizer/shard_00000.safetensors",
    }
    after = events[published + 1 :]
    assert after[:3] == [("sync", "."), ("replace", "latest"), ("sync", ".")]
    assert [kind for kind, _ in after[3:]] == ["rename"]  # step 1 loses its name
    assert steps_in(folder) == [2]


def test_saving_a_step_again_only_moves_links(store: CheckpointStore, folder: Path) -> None:
    save(store, 1)
    save(store, 2)
    before = (folder / "step_000002" / "MANIFEST.json").stat()
    store.save(snapshot(2, value=9.0), best=True, final=True)
    store.wait()
    after = (folder / "step_000002" / "MANIFEST.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert store.stats.num_saves == 2
    assert os.readlink(folder / "best") == os.readlink(folder / "final") == "step_000002"


def test_the_checkpoint_that_a_run_was_resumed_from_is_not_written_again(folder: Path) -> None:
    first = new_store(folder)
    save(first, 1, 2)
    first.close()
    for resumed_step in (2, None):
        again = new_store(folder, resumed_step=resumed_step)
        save(again, 2, final=True)
        again.close()
        assert again.stats.num_saves == 0
        assert os.readlink(folder / "final") == "step_000002"


def test_after_a_resume_from_an_old_checkpoint_the_next_save_is_the_newest(folder: Path) -> None:
    first = new_store(folder, keep_last=5)
    save(first, 100, 200, 300)
    first.close()
    second = new_store(folder, keep_last=3, resumed_step=100)
    second.save(snapshot(150, value=-1.0))
    second.wait()
    assert os.readlink(folder / "latest") == "step_000150"
    found = newest_good(folder)
    assert found is not None
    assert found[0].name == "step_000150"
    assert steps_in(folder) == [100, 150, 300]
    second.save(snapshot(300, value=-2.0))  # stands there, from the line that was left
    second.wait()
    second.close()
    assert weights(folder / "latest").eq(-2.0).all()
    assert steps_in(folder) == [100, 150, 300]


def test_a_damaged_checkpoint_at_the_step_is_replaced(store: CheckpointStore, folder: Path) -> None:
    save(store, 1, 2)
    flip_a_bit(folder / "step_000002" / "state.json")
    save(store, 2)
    verify(folder / "step_000002")
    (folder / "step_000003").mkdir()  # what an older program, or a copy that broke off, left
    save(store, 3)
    verify(folder / "step_000003")
    assert steps_in(folder) == [2, 3]


# Errors


@pytest.mark.parametrize("point", ["temp-made", "model-written", "optimizer-written", "manifest-written"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("EROFS", "Read-only file system. Make the file system writable"),
        ("ENOSPC", "No space left on device; it needs 0.0 MB. Free some space, or lower trainer.keep_last"),
        ("EIO", "Input/output error"),
    ],
)
def test_a_disk_error_is_raised_by_the_next_call_and_loses_no_checkpoint(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: str, words: str
) -> None:
    save(store, 1, best=True)
    monkeypatch.setenv(VARIABLE, f"raise@{point}:{number}")
    store.save(snapshot(2), best=True)
    finish_writing(store)
    with pytest.raises(CheckpointError) as caught:
        store.save(snapshot(3))
    assert str(caught.value) == (
        f"the checkpoint of step 2 could not be saved in {folder}: {words}. The earlier checkpoints are intact"
    )
    assert steps_in(folder) == [1]
    assert newest_good(folder) == (folder / "step_000001", [])
    monkeypatch.delenv(VARIABLE)
    save(store, 3, best=True)  # told once; what comes after is a save like any other
    assert steps_in(folder) == [1, 3]


def test_an_error_after_the_rename_says_that_the_step_is_saved(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    monkeypatch.setenv(VARIABLE, "raise@before-latest:EACCES")
    store.save(snapshot(2))
    with pytest.raises(CheckpointError, match=r"^step 2 is saved, but .* could not be brought up to date: Permission"):
        store.wait()
    assert newest_good(folder) == (folder / "step_000002", [])
    assert os.readlink(folder / "latest") == "step_000001"


def test_close_raises_the_error_of_the_last_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "raise@state-written:EROFS")
    store = new_store(folder)
    store.save(snapshot(1))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        store.close()
    assert steps_in(folder) == []


def test_a_bug_keeps_its_own_exception(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "raise@model-written")
    store.save(snapshot(1))
    with pytest.raises(FaultInjected):
        store.wait()


def test_a_folder_that_cannot_be_used_is_reported_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"checkpoints cannot be kept in .*file/checkpoints: Not a directory \(.*\)$"
    ):
        new_store(tmp_path / "file" / "checkpoints")


def test_a_folder_without_permission_is_reported_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:  # who may write everywhere: be another user for a moment
        os.chown(tmp_path, NOBODY, -1)
        for folder in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
            folder.chmod(folder.stat().st_mode | 0o011)
        os.seteuid(NOBODY)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied .* Make the folder writable for this user"):
            new_store(tmp_path / "checkpoints")
    finally:
        if is_root:
            os.seteuid(0)


def test_keep_last_below_one_is_rejected(folder: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        new_store(folder, keep_last=0)


def test_a_save_is_told_once_it_is_on_the_disk_and_never_if_it_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, bool, bool]] = []

    def note(step: int, *, best: bool) -> None:
        told.append((step, best, (folder / "latest").resolve().name == f"step_{step:06d}"))

    store = CheckpointStore(folder, keep_last=2, config_yaml="", write_model=write_model, saved=note)
    save(store, 1, best=True)
    assert told == [(1, True, True)]
    monkeypatch.setenv(VARIABLE, "raise@state-written:ENOSPC")
    store.save(snapshot(2))
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.wait()
    assert told == [(1, True, True)]
    monkeypatch.delenv(VARIABLE)
    save(store, 3)
    assert told == [(1, True, True), (3, False, True)]
    store.close()
