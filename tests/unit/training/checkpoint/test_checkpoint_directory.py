"""The checkpoint directory: links resolve, old checkpoints are deleted and good ones kept, a start puts it in order."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.faults import FaultInjected
from llmtrain.training.checkpoint import CheckpointError, CheckpointStore, newest_good, verify
from llmtrain.training.checkpoint.directory import work_path
from tests.support.checkpoints import (
    flip_a_bit,
    host_in_names,
    new_store,
    save,
    snapshot,
    steps_in,
    weights,
    write_model,
)


def test_the_newest_the_best_and_the_final_checkpoint_are_kept(folder: Path) -> None:
    store = new_store(folder, keep_last=2)
    save(store, 10)
    save(store, 20, best=True)
    save(store, 30, 40, 50)
    assert steps_in(folder) == [20, 40, 50]
    save(store, 60, final=True)
    save(store, 70, 80)
    assert steps_in(folder) == [20, 60, 70, 80]
    save(store, 90, best=True)
    assert steps_in(folder) == [60, 80, 90]
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


def test_damaged_checkpoints_do_not_count_and_are_deleted_when_they_are_old(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = new_store(folder, keep_last=2)
    save(store, 1, 2)
    flip_a_bit(folder / "step_000002" / "state.json")
    (folder / "step_000001").rename(folder / "step_000004")  # wrong name: its manifest says 1
    with caplog.at_level(logging.WARNING):
        save(store, 3)
        assert steps_in(folder) == [2, 3, 4]
        save(store, 5)
    assert steps_in(folder) == [3, 4, 5]
    assert [record.message for record in caplog.records] == [
        f"not counted as a checkpoint: {folder}/step_000002/state.json is damaged: its sha256 is not the one in "
        "MANIFEST.json"
    ]
    save(store, 6)
    assert steps_in(folder) == [5, 6]
    store.close()


def test_newest_good_passes_over_damaged_checkpoints_and_says_why(store: CheckpointStore, folder: Path) -> None:
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
def test_links_always_resolve_to_good_checkpoints_and_the_newest_are_kept(
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
                stands = [s for s in steps_in(folder) if s not in wanted.values() and s not in damaged]
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
            assert kept == set(steps_in(folder)) - damaged
            saved = [s for s in saved if s in kept | damaged]  # what was deleted does not come back
            assert newest_good(folder) == (folder / f"step_{step:06d}", [])
        store.close()


def test_a_folder_in_the_place_of_a_link_is_reported(store: CheckpointStore, folder: Path) -> None:
    (folder / "latest").mkdir()
    store.save(snapshot(1))
    with pytest.raises(CheckpointError, match="latest is in the way: it should be a link"):
        store.wait()
    verify(folder / "step_000001")


def test_a_checkpoint_that_cannot_be_deleted_is_logged_and_does_not_stop_the_run(
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
    assert steps_in(folder) == [2]


def test_a_start_removes_the_work_of_dead_processes_and_none_of_living_ones(folder: Path) -> None:
    store = new_store(folder)
    save(store, 1, 2)
    store.close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = host_in_names()
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


def test_a_start_puts_back_a_checkpoint_that_was_moved_aside_for_an_unfinished_save(folder: Path) -> None:
    store = new_store(folder)
    save(store, 1, 2)
    store.close()
    shutil.copytree(folder / "step_000001", work_path(folder, "aside", "step_000001"))
    (folder / "step_000002").rename(work_path(folder, "aside", "step_000002"))
    new_store(folder).close()
    assert steps_in(folder) == [1, 2]
    verify(folder / "latest")


def test_a_start_mends_dangling_links(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
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
        f"{name} pointed to {target}, which is not a complete checkpoint: the link was removed"
        for name, target in (("best", "step_000001"), ("final", "step_000007"))
    ]


def test_a_run_that_was_sent_back_keeps_the_checkpoint_that_it_was_sent_back_to(folder: Path) -> None:
    store = new_store(folder, keep_last=2)
    save(store, 2, 4, 6, 8)
    store.close()
    assert steps_in(folder) == [6, 8]
    store = new_store(folder, keep_last=2, resumed_step=6)
    save(store, 7)
    assert steps_in(folder) == [6, 7], "8 is of the course that was left"
    save(store, 9)
    assert steps_in(folder) == [7, 9]
    store.close()


def test_what_a_run_goes_back_to_is_its_newest_before_it_saves_anything(folder: Path) -> None:
    store = new_store(folder, keep_last=4)
    save(store, 2, 4, 6)
    save(store, 8, best=True)
    store.close()
    for resumed_step in (4, 6, 4):  # back, then on to the course that was left, then back again
        new_store(folder, resumed_step=resumed_step).close()  # killed before it saves
        found = newest_good(folder)
        assert found is not None
        assert (found[0].name, found[1]) == (f"step_{resumed_step:06d}", [])
        assert os.readlink(folder / "latest") == found[0].name
        assert os.readlink(folder / "best") == "step_000008"
        assert steps_in(folder) == [2, 4, 6, 8], "nothing is lost"
    new_store(folder).close()
    assert os.readlink(folder / "latest") == "step_000004", "the links are not taken back by a later start"


@pytest.mark.parametrize("has_renames", [True, False])
def test_a_run_goes_back_to_a_best_checkpoint_that_was_kept_under_another_name(
    folder: Path, has_renames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not has_renames:
        monkeypatch.setattr(os, "rename", refuse)
    store = new_store(folder, keep_last=3)
    save(store, 2)
    store.save(snapshot(4, 0.5), best=True)
    store.close()
    store = new_store(folder, keep_last=3, resumed_step=2)
    store.save(snapshot(4, 0.9))
    save(store, 6)
    store.close()
    kept, names = folder / "kept-step_000004", ["step_000002", "step_000004", "step_000005"]
    assert weights(kept).eq(0.5).all()
    options: dict[str, Any] = {"keep_last": 3, "config_yaml": "run: {}\n", "write_model": write_model}
    CheckpointStore(folder, resumed_from=kept, **options).close()
    found = newest_good(folder)
    assert found is not None
    assert found[0].name == os.readlink(folder / "best") == os.readlink(folder / "latest") == "step_000004"
    assert weights(found[0]).eq(0.5).all()
    if has_renames:
        assert weights(folder / "left-step_000004").eq(0.9).all(), "what the run leaves is there until the next save"
    store = new_store(folder, keep_last=3, resumed_step=4)
    save(store, 5)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", *names]
    assert weights(folder / "best").eq(0.5).all()
    store.close()


@pytest.mark.parametrize("point", ["before-going-back", "after-going-back"])
def test_a_kill_while_a_run_goes_back_leaves_all_checkpoints_good(
    folder: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(folder, keep_last=3)
    save(store, 2, 4)
    store.close()
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"raise@{point}")
    with pytest.raises(FaultInjected):
        new_store(folder, resumed_step=2)
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    new_store(folder).close()
    assert os.readlink(folder / "latest") == ("step_000002" if point.startswith("after") else "step_000004")
    for step in (2, 4):
        verify(folder / f"step_{step:06d}")


@pytest.mark.parametrize("has_renames", [True, False])
def test_best_stays_the_better_one_when_its_step_is_saved_anew(
    folder: Path, has_renames: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not has_renames:
        monkeypatch.setattr(os, "rename", refuse)
    store = new_store(folder, keep_last=2)
    save(store, 2, 4)
    store.save(snapshot(6, 0.5), best=True)
    store.close()
    store = new_store(folder, keep_last=2, resumed_step=4)
    store.save(snapshot(6, 0.9))
    store.wait()
    assert weights(folder / "latest").eq(0.9).all()
    assert weights(folder / "best").eq(0.5).all()
    verify(folder / "best")
    store.close()
    store = new_store(folder, keep_last=2, resumed_step=6)  # links are mended, and this one is good
    assert weights(folder / "best").eq(0.5).all()
    save(store, 8, best=True)
    assert sorted(path.name for path in folder.iterdir()) == ["best", "latest", "step_000006", "step_000008"]
    store.close()
