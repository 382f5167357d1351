"""Uploads: the store has a run as it is here, whatever is deleted, killed or down meanwhile."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from llmtrain.errors import RunError
from llmtrain.runs.stores import CopyRecord, fetch_newest, fetch_run
from llmtrain.runs.upload import Upload, locked_and_uploaded, upload_run
from llmtrain.runs.upload_owner import read_owner
from llmtrain.storage._filesystem import FileSystemStore
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import locate
from llmtrain.training.checkpoint import newest_good, verify
from tests.support.checkpoints import new_store, save, weights
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3
from tests.support.run_in_store import Machines, objects_of, run_to_upload


def files_of(run: Path) -> dict[str, bytes]:
    """Return what the store should have of a run: no hidden files, links as the names that they point to."""
    found = {}
    for path in run.rglob("*"):
        name = path.relative_to(run)
        if path.is_symlink():
            found[name.as_posix()] = f"{path.readlink()}\n".encode()
        elif path.is_file() and not any(part.startswith(".") for part in name.parts):
            found[name.as_posix()] = path.read_bytes()
    return found


class Writes:
    """What is written to and deleted from stores in memory, and a store that is down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[str] = []
        """Keys that were written; those that were deleted with a minus before."""
        self.is_down = False
        self.failed = threading.Event()
        write, delete = FileSystemStore.write, FileSystemStore.delete

        def noted_write(store: FileSystemStore, key: str, content: bytes | Path) -> None:
            if self.is_down:
                self.failed.set()
                raise StorageError("the store is down")
            write(store, key, content)
            self.keys.append(key.partition("/runs/")[2])
            self.wrote(self.keys[-1])

        def noted_delete(store: FileSystemStore, key: str) -> None:
            delete(store, key)
            self.keys.append(f"-{key.partition('/runs/')[2]}")

        monkeypatch.setattr(FileSystemStore, "write", noted_write)
        monkeypatch.setattr(FileSystemStore, "delete", noted_delete)

    def wrote(self, key: str) -> None:
        """Replace this to do something after a write."""


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


@pytest.mark.parametrize("kind", ["memory", "s3", "lakefs"])
def test_another_machine_gets_the_run_as_it_is_here(
    kind: str, root: str, machines: Machines, request: pytest.FixtureRequest
) -> None:
    if kind == "s3":
        server: LocalS3 = request.getfixturevalue("s3")
        root = f"{server.make_bucket('runs')}/some/runs"
    elif kind == "lakefs":
        lake: LocalLakeFS = request.getfixturevalue("lake")
        lake.commit("repo", "main", {})
        root = "lakefs://repo/main/runs"
    run = run_to_upload(root, "a", 10, 20, 30)
    assert upload_run(run) > 10
    stored = objects_of(f"{root}/a")
    assert stored.pop("upload.json")
    assert stored == files_of(run)
    assert not CopyRecord.of(run).pending
    machines.be("elsewhere")
    found = fetch_run(f"{root}/a")
    assert found is not None
    there = found[0]
    assert there != run
    fetch_newest(there)
    newest = newest_good(there / "checkpoints")
    assert newest is not None
    assert (newest[0].name, newest[1]) == ("step_000030", [])
    assert weights(newest[0])[0] == 30
    assert (there / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (there / "checkpoints" / "best").resolve() == newest[0]


def test_a_manifest_comes_last_and_goes_first(root: str, machines: Machines, writes: Writes) -> None:
    run = run_to_upload(root, "a", 10, 20)
    upload_run(run)
    store = new_store(run / "checkpoints", resumed_step=20)
    save(store, 30, 40)
    store.close()
    upload = Upload(run, f"{root}/a", keep_last=2, attempt="b")
    upload.copy_all()
    for step in (10, 20, 30, 40):
        of_step = [key for key in writes.keys if f"step_0000{step}/" in key]
        written = [key for key in of_step if not key.startswith("-")]
        assert written[-1].endswith("MANIFEST.json")
        assert sum(key.endswith("MANIFEST.json") for key in written) == 1
        if step == 10:  # step 20 is the best
            assert of_step[len(written)] == f"-{written[-1]}"
            assert len(of_step) == 2 * len(written)
    newest = [key.split("/")[2] for key in writes.keys if key.endswith("MANIFEST.json")]
    assert newest[:2] == ["step_000020", "step_000010"], "the newest is the first"
    assert {name.split("/")[1] for name in objects_of(f"{root}/a") if name.startswith("checkpoints/step")} == {
        "step_000020",
        "step_000030",
        "step_000040",
    }


def test_a_checkpoint_that_is_deleted_here_meanwhile_is_uploaded_in_full(
    root: str, machines: Machines, writes: Writes
) -> None:
    run = run_to_upload(root, "a", 10, 20, keep_last=1)
    uploaded: list[str] = []

    def train_on(key: str) -> None:
        if key.endswith("step_000020/config.yaml") and not uploaded:
            uploaded.append(key)
            store = new_store(run / "checkpoints", keep_last=1, resumed_step=20)
            save(store, 30, best=True)
            store.close()
            assert not (run / "checkpoints" / "step_000020").exists()

    writes.wrote = train_on  # type: ignore[method-assign]
    upload_run(run)
    manifests = [key.split("/")[2] for key in writes.keys if key.endswith("MANIFEST.json")]
    assert manifests[0] == "step_000020"
    writes.wrote = lambda key: None  # type: ignore[method-assign]
    upload_run(run)
    stored = objects_of(f"{root}/a")
    stored.pop("upload.json")
    assert stored == files_of(run)


def test_half_of_a_checkpoint_does_not_count(root: str, machines: Machines, writes: Writes) -> None:
    run = run_to_upload(root, "a", 10)
    upload_run(run)
    store = new_store(run / "checkpoints", resumed_step=10)
    save(store, 20)
    store.close()

    def die(key: str) -> None:
        if "step_000020/optimizer" in key:
            raise KeyboardInterrupt

    writes.wrote = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        upload_run(run)
    assert any("step_000020/optimizer" in name for name in objects_of(f"{root}/a"))
    machines.be("elsewhere")
    found = fetch_run(f"{root}/a")
    assert found is not None
    fetch_newest(found[0])
    newest = newest_good(found[0] / "checkpoints")
    assert newest is not None
    assert newest[0].name == "step_000010"


def test_a_store_that_is_down_stops_nothing_and_loses_nothing(
    root: str, machines: Machines, writes: Writes, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_to_upload(root, "a", 10)
    writes.is_down = True
    with caplog.at_level(logging.INFO), locked_and_uploaded(run, 2, is_main=True):
        assert writes.failed.wait(10)
    assert objects_of(f"{root}/a") == {}
    assert CopyRecord.of(run).pending
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.levelname for record in said] == ["WARNING", "ERROR"], "once while it trains, once at the end"
    assert f"llmtrain runs upload {root}/a" in said[1].getMessage()
    assert "the store is down" in said[1].getMessage()
    verify(run / "checkpoints" / "step_000010")
    writes.is_down = False
    upload_run(run)
    stored = objects_of(f"{root}/a")
    stored.pop("upload.json")
    assert stored == files_of(run)


def test_a_store_that_comes_back_gets_all(
    root: str, machines: Machines, writes: Writes, caplog: pytest.LogCaptureFixture
) -> None:
    run, uploaded = run_to_upload(root, "a", 10), threading.Event()
    writes.is_down = True
    writes.wrote = lambda key: uploaded.set() if key == "latest" or "summary" in key else None  # type: ignore[method-assign]
    with caplog.at_level(logging.INFO), locked_and_uploaded(run, 2, is_main=True):
        assert writes.failed.wait(10)
        writes.is_down = False
        assert uploaded.wait(10)
    stored = objects_of(f"{root}/a")
    assert read_owner(f"{root}/a")["ended"] is True
    stored.pop("upload.json")
    assert stored == files_of(run)
    assert "is complete in memory://" in caplog.text


def test_a_record_that_is_gone_here_goes_from_the_store(root: str, machines: Machines) -> None:
    run = run_to_upload(root, "a", 10)
    (run / "attempts.json").write_text("{}")
    upload = Upload(run, f"{root}/a", keep_last=2, attempt="one")
    upload.copy_all()
    assert "attempts.json" in objects_of(f"{root}/a")
    (run / "attempts.json").unlink()
    upload.copy_all()
    assert "attempts.json" not in objects_of(f"{root}/a")


def test_an_attempt_that_another_one_follows_uploads_no_more(
    root: str, machines: Machines, writes: Writes, caplog: pytest.LogCaptureFixture
) -> None:
    run, taken = run_to_upload(root, "a", 10), threading.Event()
    upload_run(run)
    machines.be("elsewhere")
    found = fetch_run(f"{root}/a")
    assert found is not None
    fetch_newest(found[0])
    machines.be("here")
    with caplog.at_level(logging.ERROR), locked_and_uploaded(run, 2, is_main=True):
        mine = CopyRecord.of(run).known[0]
        while read_owner(f"{root}/a").get("attempt") != mine:
            taken.wait(0.01)
        store, key = locate(f"{root}/a/upload.json")
        while "is uploaded from other-host" not in caplog.text:
            store.write(key, b'{"attempt": "theirs", "host": "other-host", "ended": false, "renewed": 1e12}')
            taken.wait(0.02)
        store_of_run = new_store(run / "checkpoints", resumed_step=10)
        save(store_of_run, 20)
        store_of_run.close()
    assert not [name for name in objects_of(f"{root}/a") if "step_000020" in name and name.endswith("MANIFEST.json")]
    verify(run / "checkpoints" / "step_000020")
    with pytest.raises(RunError, match="is uploaded from other-host: nothing of this run's course"):
        upload_run(run)


def test_a_run_that_is_rejected_leaves_nothing_in_the_store(root: str, machines: Machines, writes: Writes) -> None:
    run, there = run_to_upload(root, "a", 10), threading.Event()
    writes.wrote = lambda key: there.set() if key == "a/config.yaml" else None  # type: ignore[method-assign]
    with locked_and_uploaded(run, 2, is_main=True):
        assert there.wait(10)
        (run / "config.yaml").unlink()
    assert objects_of(f"{root}/a") == {}


def test_a_run_in_no_store_is_not_uploaded(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not the copy of a run in a store: its output\.root_dir is no address"):
        upload_run(tmp_path)
