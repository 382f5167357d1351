"""`train` with `publish` in its config: what can be refused is refused at step 0, and at the end the model is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.verbs.train import train
from tests.support.hub import LocalHub
from tests.support.tiny_model import write_tiny_model
from tests.support.tiny_run import tiny_tuning, write_config
from tests.support.worker_groups import GroupServer


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config that tunes a tiny decoder on rows, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "base")
    for name, first in (("rows", 0), ("test", 100)):
        turns = [{"prompt": f"def f{n}(x):", "completion": " return x + 1"} for n in range(first, first + 24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    keys = tiny_tuning(
        tmp_path, tmp_path / "rows.jsonl", {"init_from": str(tmp_path / "base")}, seq_len=32, max_steps=8
    )
    keys |= {"publish": {"license": "mit"}, "output": {**keys["output"], "run_id": "tuned"}}
    return write_config(tmp_path / "tuned.yaml", keys)


def test_a_finished_run_is_published_to_the_hub(hub: LocalHub, config_file: Path, tmp_path: Path) -> None:
    overrides = ["publish.license=mit", "publish.to=hub:me/tiny", "trainer.max_steps=3", "output.run_id=one"]
    done = train(load_config(str(config_file), overrides))
    assert done["published"] == "hub:me/tiny"
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert repo.files["model.safetensors"] == (Path(done["model"]) / "model.safetensors").read_bytes()
    card = repo.files["README.md"].decode()
    assert "It was not compared with a baseline." in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["publish.to=hub:other/tiny"], r"may not write there \(403\)"),
        (["publish.to=hub:me/a--b"], "is not a valid name on the Hub"),
        (["publish.to=taken"], r"taken is there already"),
        (["publish.require_improvement=rougeL"], r"needs rows to compare on: name files in evaluation\.data"),
    ],
)
def test_what_cannot_be_published_is_refused_before_the_first_step(
    hub: LocalHub,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("")
    with pytest.raises(ConfigError, match=message):
        train(load_config(str(config_file), ["publish.license=mit", *overrides]))
    assert not (tmp_path / "runs").exists()


def test_a_config_that_publishes_names_a_licence(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"publish\.license"):
        load_config(str(config_file), ["publish.to=somewhere"])


@pytest.mark.slow
def test_a_tuned_model_is_compared_and_published_or_kept_back_with_exit_1(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluation.data=test.jsonl", "evaluation.max_new_tokens=8"]
    better = ["publish.require_improvement=bits_per_byte"]
    assert run(["train", str(rows), *asked, *better]) == 0
    published = tmp_path / "artifacts" / "models" / "tuned"
    AutoModelForCausalLM.from_pretrained(published)
    comparison = json.loads((published / "publish.json").read_text())["comparison"]["bits_per_byte"]
    assert comparison["verdict"] == "better"
    assert "| bits_per_byte |" in (published / "README.md").read_text()
    capsys.readouterr()
    worse = ["output.run_id=worse", "optimizer.lr=1e-12"]
    assert run(["train", str(rows), *asked, *better, *worse]) == 1
    told = capsys.readouterr().err
    assert "error: the model is trained (" in told
    assert "not published: bits_per_byte is not shown to be better" in told
    assert f"To publish it: llmtrain publish {tmp_path / 'runs' / 'worse'}" in told
    assert not (tmp_path / "artifacts" / "models" / "worse").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["published", "hub:me/tuned"])
def test_what_was_published_is_what_the_next_model_is_compared_with(
    hub: LocalHub, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    def says(*arguments: str) -> dict[str, Any]:
        assert run([*arguments, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    asking = ["--data", str(tmp_path / "test.jsonl"), "--max-new-tokens", "6"]
    says("train", str(rows), "publish=null")
    first = says("eval", "tuned", *asking)
    done = says("publish", "tuned", "--to", place, "--license", "mit", "--require-improvement", "bits_per_byte")
    assert done["comparison"]["bits_per_byte"]["verdict"] == "better"
    on_hub = place.startswith("hub:")
    assert (tmp_path / place.removeprefix("hub:")).exists() is not on_hub

    says("train", str(rows), "publish=null", "output.run_id=next", "trainer.max_steps=2")
    compared = says("eval", "next", *asking, "--baseline", "last-published")
    if on_hub:
        assert Path(compared["baseline"]).name == done["revision"] == hub.repos["me/tuned"].revision
    else:
        assert compared["baseline"] == str(tmp_path / "published")
    assert compared["baseline_scores"] == pytest.approx(first["scores"]), "the published one is the run's model"
    assert compared["comparison"]["loss"]["base"] == pytest.approx(first["scores"]["loss"])

    if on_hub:
        hub.repos.clear()
    else:
        (tmp_path / "published").rename(tmp_path / "elsewhere")
    assert run(["eval", "next", *asking, "--baseline", "last-published"]) == 2
    said = capsys.readouterr().err
    where = f"me/tuned@{done['revision']}" if on_hub else str(tmp_path / "published")
    assert said.count("error:") == 1
    assert f"the model published last, {where} (see runs/last-published.json), cannot be opened: " in said
    assert "Name another --baseline, or compare with none: --no-baseline" in said


@pytest.mark.slow
def test_of_several_processes_one_publishes(rows: Path, tmp_path: Path, groups: GroupServer) -> None:
    group = groups.start(
        [
            *("train", str(rows), "trainer.max_steps=3", "trainer.micro_batch_size=2"),
            *(f"evaluation.data={tmp_path / 'test.jsonl'}", f"publish.to={tmp_path / 'published'}"),
        ],
        world_size=2,
    )
    assert group.wait() == [0, 0], group.stderr
    assert (tmp_path / "published" / "evaluation.json").is_file()
