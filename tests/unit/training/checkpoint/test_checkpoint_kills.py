"""A kill at any point of a save loses at most one interval, and the next start cleans up.

The same holds where folders cannot be renamed and there are no links, as on a mounted object store.

This file is also the program that is killed. Run with a folder, it forks a child for each point of each save. A child
saves steps 1 (best), 2 and 3 (best) with keep_last=1, so that the third save replaces links and deletes two
checkpoints. At its point it is killed, or runs out of space.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.atomic import follow
from llmtrain.faults import VARIABLE
from llmtrain.training.checkpoint import (
    CheckpointError,
    CheckpointStore,
    Snapshot,
    load_optimizer,
    load_state,
    newest_good,
    verify,
)

NOT_YET_PUBLISHED = [
    "before-copy",
    "after-copy",
    "temp-made",
    "model-written",
    "model-synced",
    "optimizer-written",
    "state-written",
    "manifest-written",
    "manifest-synced",
    "before-rename",
]
PUBLISHED = [
    "after-rename",
    "parent-synced",
    "before-latest",
    "after-latest",
    "before-best",
    "after-best",
    "before-delete",
    "mid-delete",
    "after-delete",
]
IN_PLACE = ["manifest-written", "manifest-synced", "before-rename"]
"""Where nothing is renamed, a checkpoint counts from here on already."""
DEATHS = [(point, 1) for point in ("model-synced", "before-rename", "after-rename", "before-latest", "after-best")] + [
    (point, 3) for point in NOT_YET_PUBLISHED + PUBLISHED
]


def write_model(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), folder / "model.safetensors")


def snapshot(step: int, *, numel: int = 64) -> Snapshot:
    values = torch.full((numel,), float(step))
    return Snapshot(step=step, state={"step": step}, model={"w": values}, optimizer={"w/exp_avg": values * 10})


def new_store(checkpoints: Path) -> CheckpointStore:
    return CheckpointStore(checkpoints, keep_last=1, config_yaml="run: {}\n", write_model=write_model)


def save_three(checkpoints: Path) -> None:
    store = new_store(checkpoints)
    for step in (1, 2, 3):
        store.save(snapshot(step), best=step != 2)
    store.close()


def save_without_room(checkpoints: Path) -> None:
    """The first save fits, the second has a file that is longer than this process may write."""
    store = new_store(checkpoints)
    store.save(snapshot(1))
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    store.save(snapshot(2, numel=20_000))
    try:
        store.wait()
    except CheckpointError as error:
        (checkpoints.parent / "message").write_text(str(error))
    store.save(snapshot(3))  # what is small goes on to work
    store.close()


def cripple(patch: Callable[[object, str, object], None]) -> None:
    """Take away what a mounted object store lacks."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    for name in ("rename", "replace", "symlink"):
        patch(os, name, refuse)


def main(root: Path, *, crippled: bool) -> None:
    """Fork a child for each death, two at a time, each in a folder of its own; no thread exists here yet."""
    os.fsync = lambda fd: None  # a kill leaves the system's memory as it is; the order has a test of its own
    if crippled:
        cripple(setattr)
    jobs = [(root / f"{point}-{step}" / "checkpoints", f"kill@{point}:step={step}") for point, step in DEATHS]
    jobs.append((root / "no-room" / "checkpoints", ""))
    running = 0
    for checkpoints, wish in jobs:
        if running == 2:
            report(*os.wait())
            running -= 1
        checkpoints.parent.mkdir()
        if os.fork() == 0:
            os.environ[VARIABLE] = wish
            (save_three if wish else save_without_room)(checkpoints)
            os._exit(0)
        running += 1
    while running:
        report(*os.wait())
        running -= 1


def report(pid: int, status: int) -> None:
    print(os.waitstatus_to_exitcode(status), flush=True)


def die(root: Path, *flags: str) -> Path:
    done = subprocess.run([sys.executable, __file__, str(root), *flags], stdout=subprocess.PIPE, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    assert sorted(codes) == [-signal.SIGKILL] * len(DEATHS) + [0]  # every point was reached, and killed there
    return root


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return die(tmp_path_factory.mktemp("deaths"))


@pytest.fixture(scope="module")
def deaths_in_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return die(tmp_path_factory.mktemp("deaths-in-place"), "--crippled")


@pytest.mark.parametrize(("point", "step"), DEATHS)
def test_a_kill_at_any_point_loses_at_most_one_interval(
    deaths: Path, point: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    checkpoints = deaths / f"{point}-{step}" / "checkpoints"
    durable = step if point in PUBLISHED else step - 1
    found = newest_good(checkpoints)
    if durable == 0:
        assert found is None
    else:
        assert found is not None
        folder, skipped = found
        assert folder == checkpoints / f"step_{durable:06d}"
        assert skipped == []  # no half of a checkpoint stands under a checkpoint's name
        assert_holds(folder, durable)

    store = new_store(checkpoints)  # the next start tidies up
    names = {path.name for path in checkpoints.iterdir()}
    assert not [name for name in names if name.startswith(".")]
    if durable:
        assert (checkpoints / "latest").resolve() == folder.resolve()
        assert_holds(checkpoints / "best", 3 if durable == 3 else 1)  # also where it was killed before it was linked
    store.save(snapshot(durable + 1))
    store.close()
    assert_holds(checkpoints / "latest", durable + 1)


@pytest.mark.parametrize(("point", "step"), DEATHS)
def test_without_renames_and_links_a_kill_loses_at_most_one_interval(
    deaths_in_place: Path, point: str, step: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    cripple(monkeypatch.setattr)
    checkpoints = deaths_in_place / f"{point}-{step}" / "checkpoints"
    durable = step if point in PUBLISHED + IN_PLACE else step - 1
    if durable:
        found = newest_good(checkpoints)
        assert found is not None
        folder, skipped = found
        assert folder == checkpoints / f"step_{durable:06d}"
        assert all("was never finished" in why for why in skipped)
        assert_holds(folder, durable)

    store = new_store(checkpoints)
    assert caplog.text.count("without renaming of folders and links (an object store's mount?)") == 1
    if durable:
        assert follow(checkpoints / "latest") == folder
        assert_holds(follow(checkpoints / "best"), 3 if durable == 3 else 1)
    store.save(snapshot(durable + 1), best=True)
    store.close()
    assert_holds(follow(checkpoints / "latest"), durable + 1)
    assert follow(checkpoints / "best") == checkpoints / f"step_{durable + 1:06d}"


def assert_holds(folder: Path, step: int) -> None:
    """Verified, and the content is what was saved at the step."""
    verify(folder)
    assert load_state(folder) == {"step": step}
    assert load_file(folder / "model" / "model.safetensors")["w"].tolist() == [float(step)] * 64
    assert load_optimizer(folder)["w/exp_avg"].full().tolist() == [10.0 * step] * 64


def test_a_file_that_cannot_be_written_is_reported_and_other_saves_work(deaths: Path) -> None:
    checkpoints = deaths / "no-room" / "checkpoints"
    message = (deaths / "no-room" / "message").read_text()
    assert message == (
        f"the checkpoint of step 2 could not be saved in {checkpoints}: File too large. "
        "Allow larger files (ulimit -f). The earlier checkpoints are intact"
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000003"]
    assert_holds(checkpoints / "latest", 3)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_a_full_disk_is_reported_and_the_older_checkpoint_stays(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a small disk")
    try:
        checkpoints = disk / "checkpoints"
        store = new_store(checkpoints)
        store.save(snapshot(1))
        store.wait()
        store.save(snapshot(2, numel=40_000))
        with pytest.raises(CheckpointError) as caught:
            store.save(snapshot(3))
        assert str(caught.value) == (
            f"the checkpoint of step 2 could not be saved in {checkpoints}: No space left on device; it needs 0.3 MB. "
            "Free some space, or lower trainer.keep_last. The earlier checkpoints are intact"
        )
        assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000001"]
        store.save(snapshot(3))
        store.close()
        assert_holds(checkpoints / "latest", 3)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), crippled="--crippled" in sys.argv)
