"""Runs in stores: their folders here, and what is fetched into these. The copy that is ahead wins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.runs.folders import create_run, find_model, find_run
from llmtrain.runs.listing import list_runs
from llmtrain.runs.removal import remove_runs
from llmtrain.runs.stores import (
    CopyRecord,
    address_of,
    fetch_newest,
    fetch_run,
    fetched_runs,
    runs_folder,
)
from llmtrain.runs.upload import upload_run
from llmtrain.storage._filesystem import FileSystemStore
from llmtrain.storage.failures import AccessDenied, StorageError
from llmtrain.storage.store import locate
from llmtrain.training.checkpoint import newest_good
from tests.support.checkpoints import new_store, save, snapshot
from tests.support.run_in_store import Machines, objects_of, run_to_upload


def fetched(address: str) -> Path:
    """Fetch a run as a resume does."""
    found = fetch_run(address)
    assert found is not None
    fetch_newest(found[0])
    return found[0]


def go_on(run: Path, *steps: int, resumed_step: int) -> None:
    store = new_store(run / "checkpoints", resumed_step=resumed_step)
    save(store, *steps)
    store.close()


def newest_step(run: Path) -> str:
    found = newest_good(run / "checkpoints")
    assert found is not None
    return found[0].name


def test_a_folder_here_mirrors_an_address(machines: Machines, tmp_path: Path) -> None:
    for address in ("s3://bucket/some/runs", "gs://bucket/runs", "lakefs://repo/main/runs", "memory://bucket/runs"):
        folder = runs_folder(f"{address}/")
        assert folder.is_relative_to(tmp_path / "here" / "runs")
        assert address_of(folder / "a") == f"{address}/a"
    assert runs_folder("runs") == Path("runs")
    assert runs_folder("file:///some/runs") == Path("/some/runs")
    assert address_of(tmp_path) is None


@pytest.mark.parametrize("address", ["https://host/runs", "hf://owner/name/runs"])
def test_a_store_that_takes_no_runs_is_named(address: str) -> None:
    with pytest.raises(ConfigError, match="runs are not kept there: name a folder, or a store that is one of s3"):
        runs_folder(address)


def test_an_address_that_leads_out_of_its_folder_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"has \.\. in it"):
        runs_folder("s3://bucket/../../etc")


def test_runs_are_listed_from_the_store(root: str, machines: Machines) -> None:
    for name in ("a", "b"):
        upload_run(run_to_upload(root, name, 10))
    store, key = locate(f"{root}/latest")
    store.write(key, b"b\n")
    machines.be("elsewhere")
    found = list_runs(root_dir=root, sort="id")
    assert [(run["id"], run["state"], run["steps"]) for run in found] == [("a", "finished", 60), ("b", "finished", 60)]
    assert found[0]["bytes"] == sum(len(content) for content in objects_of(f"{root}/a").values())
    assert not list(runs_folder(root).glob("*/checkpoints/step_*")), "no checkpoint is fetched to list runs"
    assert find_run("latest", fetched_runs(root, "latest"))[0].name == "b"
    assert find_run(f"{root}/latest", Path("runs"))[0].name == "b"
    assert find_run(f"{root}/a/checkpoints/best", Path("runs"))[1] == runs_folder(root) / "a/checkpoints/step_000010"
    with pytest.raises(ConfigError, match=r"memory://.*/c is no run and no checkpoint of one"):
        find_run(f"{root}/c", Path("runs"))


def test_a_run_that_trains_on_another_machine_is_running(root: str, machines: Machines) -> None:
    upload_run(run_to_upload(root, "a", 10))
    store, key = locate(f"{root}/a/upload.json")
    store.write(key, b'{"attempt": "theirs", "host": "other", "ended": false, "renewed": 1e12}')
    machines.be("elsewhere")
    assert [run["state"] for run in list_runs(root_dir=root)] == ["running"]
    with pytest.raises(ConfigError, match="a: a process trains in it, so nothing is removed"):
        remove_runs(["a"], root_dir=root, agree=lambda found: True)


def test_a_model_is_fetched_without_its_optimizer_and_a_resume_fetches_the_rest(root: str, machines: Machines) -> None:
    upload_run(run_to_upload(root, "a", 10, 20))
    machines.be("elsewhere")
    model = find_model(f"{root}/a", Path("runs"))
    checkpoint = runs_folder(root) / "a" / "checkpoints" / "step_000020"
    assert model == checkpoint / "model"
    assert (model / "model.safetensors").is_file()
    assert not (checkpoint / "optimizer").exists()
    assert find_model("a", fetched_runs(root, "a")) == model
    assert newest_step(fetched(f"{root}/a")) == "step_000020"
    assert (checkpoint / "optimizer").is_dir()


def test_a_checkpoint_that_is_damaged_in_the_store_is_passed_over(
    root: str, machines: Machines, caplog: pytest.LogCaptureFixture
) -> None:
    upload_run(run_to_upload(root, "a", 10, 20))
    store, key = locate(f"{root}/a/checkpoints/step_000020/optimizer/shard_00000.safetensors")
    content = store.read(key)
    store.write(key, content[:-1] + bytes([content[-1] ^ 1]))
    machines.be("elsewhere")
    assert newest_step(fetched(f"{root}/a")) == "step_000010"
    assert "step_000020/optimizer/shard_00000.safetensors is not as MANIFEST.json says" in caplog.text


def test_a_run_goes_from_machine_to_machine(root: str, machines: Machines) -> None:
    here = run_to_upload(root, "a", 10, 20)
    upload_run(here)
    machines.be("elsewhere")
    go_on(there := fetched(f"{root}/a"), 30, 40, resumed_step=20)
    (there / "metrics.jsonl").write_text("longer\n")
    upload_run(there)
    machines.be("here")
    assert fetched(f"{root}/a") == here
    assert newest_step(here) == "step_000040"
    assert (here / "metrics.jsonl").read_text() == "longer\n"
    assert not (here / "checkpoints" / "step_000010").exists(), "what the store has no more goes here too"


def test_a_copy_with_what_the_store_lacks_wins(root: str, machines: Machines) -> None:
    run = run_to_upload(root, "a", 10)
    upload_run(run)
    go_on(run, 20, resumed_step=10)
    record = CopyRecord.of(run)
    record.pending = True
    record.write(run)
    assert newest_step(fetched(f"{root}/a")) == "step_000020"
    assert (run / "checkpoints" / "step_000020").exists()


def test_a_copy_of_another_course_is_set_aside(root: str, machines: Machines, caplog: pytest.LogCaptureFixture) -> None:
    run = run_to_upload(root, "a", 10)
    upload_run(run)
    machines.be("elsewhere")
    there = fetched(f"{root}/a")
    record = CopyRecord.of(there)
    record.known.insert(0, "another attempt")
    record.write(there)
    go_on(there, 30, resumed_step=10)
    upload_run(there)
    cache = machines.be("here")
    go_on(run, 20, resumed_step=10)
    mine = CopyRecord.of(run)
    mine.pending = True
    mine.write(run)
    assert newest_step(fetched(f"{root}/a")) == "step_000030"
    [aside] = (cache / "left").iterdir()
    assert newest_step(aside) == "step_000020"
    assert f"what was not uploaded from here is in {aside}" in caplog.text


def test_a_store_that_is_down_leaves_the_copy_that_is_ahead(
    root: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_to_upload(root, "a", 10)

    def fail(store: FileSystemStore, prefix: str) -> None:
        raise StorageError("the store is down")

    monkeypatch.setattr(FileSystemStore, "list", fail)
    with pytest.raises(StorageError, match="the store is down"):
        fetch_run(f"{root}/a")
    CopyRecord(["mine"], pending=True).write(run)
    assert fetch_run(f"{root}/a") == (run, None)
    assert create_run(runs_folder(root), "b").is_dir(), "a new run begins without the store"


def test_a_new_run_is_rejected_at_once_where_it_cannot_be_kept(
    root: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_run(run_to_upload(root, "a", 10))
    machines.be("elsewhere")
    with pytest.raises(ConfigError, match=f"{root}/a exists already.*llmtrain train --resume {root}/a"):
        create_run(runs_folder(root), "a")

    def deny(store: FileSystemStore, prefix: str) -> None:
        raise AccessDenied("memory://bucket/: access denied")

    monkeypatch.setattr(FileSystemStore, "list", deny)
    with pytest.raises(ConfigError, match=r"output\.root_dir: memory://bucket/: access denied"):
        create_run(runs_folder(root), "b")


def test_a_removed_run_is_gone_from_the_store(root: str, machines: Machines) -> None:
    for name in ("a", "b"):
        upload_run(run_to_upload(root, name, 10))
    machines.be("elsewhere")
    removed = remove_runs(["b"], root_dir=root, agree=lambda found: [run["id"] for run in found] == ["b"])
    assert removed["removed"] == ["b"]
    assert objects_of(f"{root}/b") == {}
    assert [run["id"] for run in list_runs(root_dir=root)] == ["a"]


def test_a_step_that_was_saved_anew_is_fetched_anew(root: str, machines: Machines) -> None:
    here = run_to_upload(root, "a", 10, 20)
    upload_run(here)
    machines.be("elsewhere")
    there = find_model(f"{root}/a/checkpoints/step_000020", Path("runs"))
    before = (there / "model.safetensors").read_bytes()
    machines.be("here")
    shutil.rmtree(here / "checkpoints" / "step_000020")
    store = new_store(here / "checkpoints", resumed_step=10)
    store.save(snapshot(20, 7.0), best=True)
    store.close()
    upload_run(here)
    machines.be("elsewhere")
    assert (find_model(f"{root}/a", Path("runs")) / "model.safetensors").read_bytes() != before
