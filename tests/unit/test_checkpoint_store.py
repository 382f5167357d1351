"""The checkpoint store: what is saved is what was, links resolve, old ones go and good ones never, errors are told."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.testing.faults import VARIABLE, FaultInjected
from llmtrain.training import checkpoint_files, checkpoint_shelf
from llmtrain.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Snapshot,
    load_optimizer,
    load_state,
    newest_good,
    verify,
)

NOBODY = 65534
"""The user id without rights."""


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors")


def snapshot(step: int, value: float | None = None) -> Snapshot:
    values = torch.full((8, 8), float(step) if value is None else value)
    return Snapshot(step=step, state={"step": step}, model={"w": values}, optimizer={"w/exp_avg": values * 10})


def new_store(folder: Path, *, keep_last: int = 2, resumed_step: int | None = None) -> CheckpointStore:
    return CheckpointStore(
        folder, keep_last=keep_last, config_yaml="run: {}\n", write_model=write_model, resumed_step=resumed_step
    )


def save(store: CheckpointStore, *steps: int, best: bool = False, final: bool = False) -> None:
    for step in steps:
        store.save(snapshot(step), best=best, final=final)
    store.wait()


def standing(folder: Path) -> list[int]:
    """The steps whose checkpoints stand in the folder; and nothing else does but links."""
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    return sorted(int(path.name[5:]) for path in folder.glob("step_*"))


def weights(folder: Path) -> Tensor:
    read: Tensor = load_file(folder / "model" / "model.safetensors")["w"]
    return read


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    made = new_store(tmp_path / "checkpoints")
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


# What is saved


def test_saved_values_are_those_of_the_call_though_training_goes_on(
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
    assert load_optimizer(folder / "latest")["w/exp_avg"].whole().eq(2.0).all()
    assert load_state(folder / "latest") == {"step": 1, "nested": {"item": 3}}


def test_the_memory_of_the_copy_is_used_again_only_after_it_was_written(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "sleep@temp-made:0.05")
    save(store, 1, 2)
    assert weights(folder / "step_000001").eq(1.0).all()
    assert weights(folder / "step_000002").eq(2.0).all()


def test_the_caller_waits_for_the_copy_alone(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "sleep@model-written:0.3")
    began = time.perf_counter()
    store.save(snapshot(1))
    assert time.perf_counter() - began < 0.15
    assert store.stats.stalled_seconds < 0.15
    store.wait()
    assert store.stats.stalled_seconds > 0.1  # wait() is a stall as well
    assert store.stats.writing_seconds > 0.3
    assert store.stats.num_saves == 1


def test_only_one_thread_writes_and_it_yields_to_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_tied_weights_reach_the_writer_tied_and_others_apart(folder: Path) -> None:
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


def test_optimizer_may_be_empty_and_parameters_need_no_gradient_free_copy(store: CheckpointStore, folder: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    store.save(Snapshot(step=1, state={}, model={"w": parameter}, optimizer={}))
    store.wait()
    assert load_optimizer(folder / "latest") == {}
    assert weights(folder / "latest").tolist() == [1.0, 1.0, 1.0]


def test_a_state_that_json_cannot_hold_is_refused_at_once(store: CheckpointStore) -> None:
    with pytest.raises(TypeError):
        store.save(Snapshot(step=1, state={"rng": object()}, model={}, optimizer={}))
    with pytest.raises(ValueError):
        store.save(Snapshot(step=1, state={"loss": float("nan")}, model={}, optimizer={}))


@pytest.mark.parametrize("section", ["model", "optimizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_what_is_not_finite_is_refused_and_the_good_one_stays(
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
    assert standing(folder) == [1]
    assert (folder / "latest").readlink() == Path("step_000001")
    assert not (folder / "best").exists()


def test_large_finite_values_whose_sum_overflows_are_saved(store: CheckpointStore, folder: Path) -> None:
    store.save(Snapshot(step=1, state={}, model={"w": torch.full((4,), 3e38)}, optimizer={}))
    store.save(Snapshot(step=2, state={}, model={"w": torch.full((9,), 60000.0, dtype=torch.float16)}, optimizer={}))
    store.wait()
    assert standing(folder) == [1, 2]


# Order on the disk


def test_latest_moves_only_when_everything_is_on_the_disk_and_old_ones_go_last(
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

    for module in (checkpoint_files, checkpoint_shelf):
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
    assert standing(folder) == [2]


# Links and rotation


def test_the_newest_and_the_best_and_the_final_stay(folder: Path) -> None:
    store = new_store(folder, keep_last=2)
    save(store, 10)
    save(store, 20, best=True)
    save(store, 30, 40, 50)
    assert standing(folder) == [20, 40, 50]
    save(store, 60, final=True)
    save(store, 70, 80)
    assert standing(folder) == [20, 60, 70, 80]
    save(store, 90, best=True)
    assert standing(folder) == [60, 80, 90]
    store.close()
    links = {name: os.readlink(folder / name) for name in ("latest", "best", "final")}
    assert links == {"latest": "step_000090", "best": "step_000090", "final": "step_000060"}


def test_a_run_can_be_moved_with_its_links(store: CheckpointStore, folder: Path, tmp_path: Path) -> None:
    save(store, 1, best=True)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    verify(moved / "latest")
    verify(moved / "best")
    assert (moved / "latest").resolve() == (moved / "best").resolve() == moved / "step_000001"
    folder.mkdir()  # for the store's close


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


def test_after_a_resume_from_an_old_checkpoint_the_new_line_is_the_newest(folder: Path) -> None:
    first = new_store(folder, keep_last=5)
    save(first, 100, 200, 300)
    first.close()
    second = new_store(folder, keep_last=2, resumed_step=100)
    second.save(snapshot(150, value=-1.0))
    second.wait()
    assert os.readlink(folder / "latest") == "step_000150"
    found = newest_good(folder)
    assert found is not None
    assert found[0].name == "step_000150"
    assert standing(folder) == [150, 300]
    second.save(snapshot(300, value=-2.0))  # stands there, from the line that was left
    second.wait()
    second.close()
    assert weights(folder / "latest").eq(-2.0).all()
    assert standing(folder) == [150, 300]


def test_a_broken_checkpoint_at_the_step_is_replaced(store: CheckpointStore, folder: Path) -> None:
    save(store, 1, 2)
    flip_a_bit(folder / "step_000002" / "state.json")
    save(store, 2)
    verify(folder / "step_000002")
    (folder / "step_000003").mkdir()  # what an older program, or a copy that broke off, left
    save(store, 3)
    verify(folder / "step_000003")
    assert standing(folder) == [2, 3]


def test_broken_checkpoints_do_not_count_and_go_when_they_are_old(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = new_store(folder, keep_last=2)
    save(store, 1, 2)
    flip_a_bit(folder / "step_000002" / "state.json")
    (folder / "step_000001").rename(folder / "step_000004")  # wrong name: its manifest says 1
    with caplog.at_level(logging.WARNING):
        save(store, 3)
        assert standing(folder) == [2, 3, 4]
        save(store, 5)
    assert standing(folder) == [3, 4, 5]
    assert [record.message for record in caplog.records] == [
        f"not counted as a checkpoint: {folder}/step_000002/state.json is damaged: its sha256 is not the one in "
        "MANIFEST.json"
    ]
    save(store, 6)
    assert standing(folder) == [5, 6]
    store.close()


def test_readers_fall_back_to_the_newest_good_one_and_are_told_why(store: CheckpointStore, folder: Path) -> None:
    assert newest_good(folder) is None
    assert newest_good(folder / "nowhere") is None
    save(store, 1, 2)
    assert newest_good(folder) == (folder / "step_000002", [])
    flip_a_bit(folder / "step_000002" / "optimizer" / "shard_00000.safetensors")
    (folder / "step_000003").mkdir()
    found = newest_good(folder)
    assert found is not None
    good, skipped = found
    assert good == folder / "step_000001"
    assert skipped == [
        f"{folder}/step_000003: MANIFEST.json is missing, so the checkpoint was never finished",
        f"{folder}/step_000002/optimizer/shard_00000.safetensors is damaged: its sha256 is not the one in "
        "MANIFEST.json",
    ]
    (folder / "step_000001" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is good:\n.*step_000003.*\n.*\n.*state\.json is"):
        newest_good(folder)


@settings(max_examples=40, deadline=None)
@given(
    keep_last=st.integers(1, 3),
    actions=st.lists(
        st.tuples(st.sampled_from(["next", "again", "restart", "damage"]), st.booleans(), st.booleans()), max_size=12
    ),
)
def test_whatever_is_saved_links_resolve_to_good_checkpoints_and_the_newest_stay(
    keep_last: int, actions: list[tuple[str, bool, bool]]
) -> None:
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        folder = Path(root) / "checkpoints"
        store = new_store(folder, keep_last=keep_last)
        step, wanted, saved, damaged = 0, dict[str, int](), list[int](), set[int]()
        for action, best, final in actions:
            if action == "restart":
                store.close()
                store = new_store(folder, keep_last=keep_last)
                continue
            if action == "damage":  # the oldest; links are not mended for it until it is saved again
                stands = [s for s in standing(folder) if s not in wanted.values() and s not in damaged]
                if stands:
                    flip_a_bit(folder / f"step_{stands[0]:06d}" / "state.json")
                    damaged.add(stands[0])
                continue
            step += action == "next" or step == 0
            save(store, step, best=best, final=final)
            saved = [s for s in saved if s != step] + [step]
            wanted |= {"latest": step} | ({"best": step} if best else {}) | ({"final": step} if final else {})
            for name, target in wanted.items():
                assert os.readlink(folder / name) == f"step_{target:06d}"
                verify(folder / name)
            good = [s for s in saved if s not in damaged]
            kept = set(good[-keep_last:]) | set(wanted.values())
            assert kept == set(standing(folder)) - damaged
            saved = [s for s in saved if s in kept | damaged]  # what was deleted does not come back
            assert newest_good(folder) == (folder / f"step_{step:06d}", [])
        store.close()


# Starts


def test_a_start_removes_what_dead_processes_left_and_nothing_of_living_ones(folder: Path) -> None:
    store = new_store(folder)
    save(store, 1, 2)
    store.close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = checkpoint_shelf._host()
    for kind in ("temp", "trash"):
        for owner, pid in (("host", dead.pid), ("host", os.getppid()), ("host", os.getpid()), ("elsewhere", dead.pid)):
            work = folder / f".{kind}-step_000009-{host if owner == 'host' else owner}-{pid}"
            work.mkdir()
            (work / "state.json").write_text("{}")
    old = folder / f".temp-step_000008-elsewhere-{dead.pid}"
    old.mkdir()
    os.utime(old, (time.time() - 4000,) * 2)
    (folder / f".link-latest-{host}-{dead.pid}").symlink_to("step_000001")
    (folder / ".keep").write_text("not ours")
    new_store(folder).close()
    left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
    assert left == {
        ".keep",
        f".temp-step_000009-{host}-{os.getppid()}",
        f".trash-step_000009-{host}-{os.getppid()}",
        f".temp-step_000009-elsewhere-{dead.pid}",
        f".trash-step_000009-elsewhere-{dead.pid}",
    }


def test_a_start_puts_back_what_was_moved_aside_for_a_save_that_never_came(folder: Path) -> None:
    store = new_store(folder)
    save(store, 1, 2)
    store.close()
    shutil.copytree(folder / "step_000001", checkpoint_shelf.work_path(folder, "aside", "step_000001"))
    (folder / "step_000002").rename(checkpoint_shelf.work_path(folder, "aside", "step_000002"))
    new_store(folder).close()
    assert standing(folder) == [1, 2]
    verify(folder / "latest")


def test_a_start_mends_links_that_dangle(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = new_store(folder)
    save(store, 1, best=True)
    save(store, 2)
    store.close()
    shutil.rmtree(folder / "step_000001")
    (folder / "latest").unlink()
    (folder / "final").symlink_to("step_000007")
    with caplog.at_level(logging.WARNING):
        new_store(folder).close()
    assert os.readlink(folder / "latest") == "step_000002"
    assert not (folder / "best").is_symlink()
    assert not (folder / "final").is_symlink()
    assert [record.message for record in caplog.records] == [
        f"{name} pointed to {target}, which is no whole checkpoint: the link was removed"
        for name, target in (("best", "step_000001"), ("final", "step_000007"))
    ]


# Errors


@pytest.mark.parametrize("point", ["temp-made", "model-written", "optimizer-written", "manifest-written"])
@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("EROFS", "Read-only file system. To go on, make the file system writable"),
        ("ENOSPC", "No space left on device; it needs 0.0 MB. To go on, free some space, or lower trainer.keep_last"),
        ("EIO", "Input/output error"),
    ],
)
def test_an_error_of_the_disk_is_told_by_the_next_call_and_loses_nothing(
    store: CheckpointStore, folder: Path, monkeypatch: pytest.MonkeyPatch, point: str, number: str, words: str
) -> None:
    save(store, 1, best=True)
    monkeypatch.setenv(VARIABLE, f"raise@{point}:{number}")
    store.save(snapshot(2), best=True)
    store._thread.submit(lambda: None).result()  # the write is over, and nobody was told yet
    with pytest.raises(CheckpointError) as caught:
        store.save(snapshot(3))
    assert str(caught.value) == (
        f"the checkpoint of step 2 could not be saved in {folder}: {words}. The earlier checkpoints are intact"
    )
    assert standing(folder) == [1]
    assert newest_good(folder) == (folder / "step_000001", [])
    monkeypatch.delenv(VARIABLE)
    save(store, 3, best=True)  # told once; what comes after is a save like any other
    assert standing(folder) == [1, 3]


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


def test_close_tells_the_error_of_the_last_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "raise@state-written:EROFS")
    store = new_store(folder)
    store.save(snapshot(1))
    with pytest.raises(CheckpointError, match="Read-only file system"):
        store.close()
    assert standing(folder) == []


def test_a_mistake_of_the_program_keeps_its_own_error(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "raise@model-written")
    store.save(snapshot(1))
    with pytest.raises(FaultInjected):
        store.wait()


def test_a_folder_that_cannot_be_used_is_said_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"checkpoints cannot be kept in .*file/checkpoints: Not a directory \(.*\)$"
    ):
        new_store(tmp_path / "file" / "checkpoints")


def test_a_folder_without_permission_is_said_at_the_start(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    is_root = os.geteuid() == 0
    if is_root:  # who may write everywhere: be another user for a moment
        os.chown(tmp_path, NOBODY, -1)
        for folder in (tmp_path.parent, tmp_path.parent.parent, tmp_path.parent.parent.parent):
            folder.chmod(folder.stat().st_mode | 0o011)
        os.seteuid(NOBODY)
    try:
        with pytest.raises(CheckpointError, match=r"Permission denied .* make the folder writable for this user"):
            new_store(tmp_path / "checkpoints")
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_in_the_place_of_a_link_is_said(store: CheckpointStore, folder: Path) -> None:
    (folder / "latest").mkdir()
    store.save(snapshot(1))
    with pytest.raises(CheckpointError, match="latest is in the way: it should be a link"):
        store.wait()
    verify(folder / "step_000001")


def test_a_checkpoint_that_cannot_be_deleted_is_said_and_does_not_stop_the_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **options: object) -> None:
        if ".trash" in str(path):
            raise OSError(39, "Directory not empty")

    store = new_store(folder, keep_last=1)
    save(store, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        save(store, 2)
    monkeypatch.undo()
    store.close()
    assert "could not be removed: Directory not empty" in caplog.text
    new_store(folder).close()
    assert standing(folder) == [2]


def test_keep_last_below_one_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="keep_last is 0"):
        new_store(folder, keep_last=0)
