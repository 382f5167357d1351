"""Run folders: made once, found by id, folder, checkpoint or `latest`."""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from pydantic import ValidationError

from llmtrain.config.sections.running import OutputConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import (
    begin_run,
    config_to_read,
    create_run,
    find_model,
    find_run,
    link_model,
    locked,
    model_to_begin_from,
    start_run,
)
from llmtrain.runs.folders import make_run as make_new_run
from llmtrain.runs.metadata import name_in


def make_run(root: Path, run_id: str, *steps: int) -> Path:
    run = create_run(root, run_id)
    (run / "meta.json").write_text("{}")
    begin_run(run, "schema_version: 1\n")
    for step in steps:
        model = run / "checkpoints" / f"step_{step:06d}" / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
    return run


@pytest.mark.parametrize("run_id", ["latest", "eval", "rm", "a/b", "..", "a" * 201])
def test_a_name_that_no_run_can_have_is_rejected(run_id: str) -> None:
    with pytest.raises(ValidationError, match="run_id"):
        OutputConfig(run_id=run_id)


def test_a_run_is_found_by_id_folder_checkpoint_and_as_the_latest(tmp_path: Path) -> None:
    make_run(tmp_path, "first")
    second = make_run(tmp_path, "second", 5)
    checkpoint = second / "checkpoints" / "step_000005"
    assert find_run("first", tmp_path) == (tmp_path / "first", None)
    assert find_run(str(second), tmp_path) == (second, None)
    assert find_run(str(checkpoint), tmp_path) == (second, checkpoint)
    assert find_run("latest", tmp_path) == (second, None)


def test_a_name_means_the_newest_run_of_that_name(tmp_path: Path) -> None:
    make_run(tmp_path, "20261120-100000-1a2b3c4-demo", 1)
    newest = make_run(tmp_path, "20261121-090000-nogit-demo", 1)
    make_run(tmp_path, "20261121-100000-1a2b3c4-other-demo")
    assert find_run("demo", tmp_path) == (newest, None)
    make_run(tmp_path, "demo")  # an id comes first
    assert find_run("demo", tmp_path) == (tmp_path / "demo", None)


def test_a_model_to_begin_from_is_a_folder_a_run_or_left_to_the_hub(tmp_path: Path) -> None:
    run = make_run(tmp_path, "20261121-090000-nogit-demo", 1)
    model = run / "checkpoints" / "step_000001" / "model"
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        model_to_begin_from("demo", tmp_path)
    (run / "checkpoints" / "best").symlink_to("step_000001")
    for path in ("demo", run.name, str(run), "latest", str(model.parent)):
        assert model_to_begin_from(path, tmp_path) == str(model)
    for path in (str(model), "owner/name", "gpt2"):
        assert model_to_begin_from(path, tmp_path) == path


def test_a_run_or_a_checkpoint_stands_for_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs", "20261121-090000-nogit-demo", 1)
    for ref in ("demo", run.name, f"runs/{run.name}", "latest"):
        assert config_to_read(ref, Path("runs")) == str(run / "config.yaml")
    checkpoint = f"runs/{run.name}/checkpoints/step_000001"
    assert config_to_read(checkpoint, Path("runs")) == str(tmp_path / checkpoint / "config.yaml")
    (tmp_path / "demo").mkdir()  # what is here comes first
    for ref in ("demo", "quickstart", "rows.jsonl"):
        assert config_to_read(ref, Path("runs")) == ref


def test_the_run_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run(Path("runs"), "one").is_absolute()


def test_a_run_id_that_exists_is_rejected_and_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    with pytest.raises(ConfigError, match=r"exists already: .*--resume one"):
        create_run(tmp_path, "one")
    assert (run / "config.yaml").exists()


def test_an_unwritable_output_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make the run folder .*file/one: Not a directory"):
        create_run(tmp_path / "file", "one")


def test_what_is_no_run_says_so_and_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no runs"):
        find_run("latest", tmp_path)
    make_run(tmp_path, "quickstart")
    with pytest.raises(ConfigError, match="did you mean 'quickstart'"):
        find_run("quikstart", tmp_path)
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="is no run and no checkpoint"):
        find_run(str(tmp_path / "other"), tmp_path)


def test_a_run_means_its_best_model_else_its_final_else_its_latest(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one", 1, 2, 3)
    checkpoints = run / "checkpoints"
    with pytest.raises(ConfigError, match="no checkpoint yet"):
        find_model("one", tmp_path)
    for link, step in (("latest", 2), ("final", 3), ("best", 1)):
        (checkpoints / link).symlink_to(f"step_{step:06d}")
        assert find_model("one", tmp_path) == checkpoints / f"step_{step:06d}" / "model"
    assert find_model(str(checkpoints / "step_000002"), tmp_path) == checkpoints / "step_000002" / "model"
    assert find_model(str(checkpoints / "step_000002" / "model"), tmp_path) == checkpoints / "step_000002" / "model"
    link_model(run)
    assert (run / "model").resolve() == checkpoints / "step_000001" / "model"


def hold_the_lock(run: Path, held: Event, release: Event) -> None:
    with locked(run):
        held.set()
        release.wait(30)


def test_two_processes_cannot_train_in_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold_the_lock, args=(run, held, release))
    other.start()
    assert held.wait(30)
    with pytest.raises(ConfigError, match="is being trained by another process"), locked(run):
        pass
    release.set()
    other.join()
    with locked(run):
        pass


@pytest.mark.parametrize(
    "ref", ["checkpoints/step_20.pt", "checkpoints/small/step0005000", "out/epoch-3/rank-0", "ckpt/best.safetensors"]
)
def test_an_old_checkpoint_is_answered_by_those_that_exist(ref: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a checkpoint is a folder RUN/checkpoints/step_000020, and .* has none"):
        find_run(ref, tmp_path)
    newest = make_run(tmp_path, "newest", *range(10, 80, 10))
    with pytest.raises(ConfigError) as caught:
        find_model(ref, tmp_path)
    names = "step_000030, step_000040, step_000050, step_000060, step_000070; 7 in all"
    assert str(caught.value).startswith(f"{ref!r} is no checkpoint of a run: {newest / 'checkpoints'} has {names}")


def test_a_checkpoint_that_a_run_has_not_is_answered_by_those_of_that_run(tmp_path: Path) -> None:
    first = make_run(tmp_path, "first", 5)
    make_run(tmp_path, "second", 9)
    with pytest.raises(ConfigError, match=r"first/checkpoints has step_000005$"):
        find_run(str(first / "checkpoints" / "step_20.pt"), tmp_path)


def test_runs_that_start_in_one_second_have_ids_of_their_own(tmp_path: Path) -> None:
    output = OutputConfig(root_dir=str(tmp_path))
    started = [start_run(RunConfig(name="demo"), output, decided={"resolved": {}}) for _ in range(3)]
    assert len(set(started)) == 3
    assert all(name_in(run.name) == "demo" for run in started)
    begin_run(started[0], "run: {}\n")
    with pytest.raises(ConfigError, match="exists already: give another"):
        start_run(RunConfig(), OutputConfig(root_dir=str(tmp_path), run_id=started[0].name), decided={"resolved": {}})


def test_two_starts_at_one_moment_take_two_ids(tmp_path: Path) -> None:
    ready = threading.Barrier(4)

    def start() -> Path:
        ready.wait()
        return make_new_run(RunConfig(name="demo"), tmp_path)

    with ThreadPoolExecutor(4) as pool:
        folders = [future.result() for future in [pool.submit(start) for _ in range(4)]]
    assert len({folder.name for folder in folders}) == 4
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}


def test_latest_is_a_run_that_began(tmp_path: Path) -> None:
    output = OutputConfig(root_dir=str(tmp_path), run_id="one")
    begin_run(start_run(RunConfig(), output, decided={"resolved": {}}), "run: {}\n")
    start_run(RunConfig(), OutputConfig(root_dir=str(tmp_path), run_id="two"), decided={"resolved": {}})
    assert find_run("latest", tmp_path)[0].name == "one"
    begin_run(tmp_path / "two", "run: {}\n")
    assert find_run("latest", tmp_path)[0].name == "two"
    begin_run(tmp_path / "one", "run: {name: again}\n")
    assert find_run("latest", tmp_path)[0].name == "two", "a run that goes on is not the newest"


@pytest.mark.parametrize(
    "left", [[], ["meta.json"], ["meta.json", "config.as-written.yaml", ".lock"], ["meta.json.7.tmp"]]
)
def test_the_folder_of_a_start_that_was_killed_is_taken(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "one").mkdir()
    for name in left:
        (tmp_path / "one" / name).write_text("{}")
    if left:
        with pytest.raises(ConfigError, match=r"one has nothing to resume: .*llmtrain train CONFIG output\.run_id=one"):
            find_run("one", tmp_path)
    assert (
        start_run(RunConfig(), OutputConfig(root_dir=str(tmp_path), run_id="one"), decided={"resolved": {}}).name
        == "one"
    )
    with locked(tmp_path / "one"):
        pass


@pytest.mark.parametrize("left", ["notes.txt", "checkpoints/step_000002", "config.yaml", "metrics.jsonl"])
def test_a_folder_that_holds_something_is_not_taken(tmp_path: Path, left: str) -> None:
    (tmp_path / "one" / left).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"one exists already: give another output\.run_id, or move it elsewhere"):
        start_run(RunConfig(), OutputConfig(root_dir=str(tmp_path), run_id="one"), decided={"resolved": {}})
    assert (tmp_path / "one" / left).is_dir()
