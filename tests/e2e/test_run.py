"""A run as its user sees it: what the command prints, what the folder holds, and what can be done with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokens import open_training_data
from llmtrain.distributed.native_bf16 import computes_bf16
from llmtrain.errors import Preempted
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.health import health
from llmtrain.verbs.train import train
from tests.support.tiny_run import tiny_config, weight_hash, write_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The folder of a finished run of 30 steps, which evaluated on the whole validation set."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "tiny.yaml", tiny_config(shards, folder / "runs"))
    overrides = ["output.run_id=one", "trainer.eval_steps=null", "tracking.tensorboard.enabled=true"]
    return Path(train(load_config(str(config), overrides))["run"])


def test_the_folder_holds_what_the_design_says(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        *("config.yaml", "meta.json", "metrics.jsonl", "summary.json", "logs", "tensorboard", "checkpoints", "model"),
        "report.html",
    } <= names
    assert (finished.parent / "latest").resolve() == finished
    checkpoints = finished / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step_*")) == ["step_000010", "step_000020", "step_000030"]
    for link in ("latest", "final", "best"):
        assert (checkpoints / link).is_symlink()
    assert (finished / "model").resolve() == (checkpoints / "best").resolve() / "model"
    state = json.loads((checkpoints / "final" / "state.json").read_text())
    assert state["position"]["step"] == 30
    assert state["position"]["item"] == 120
    meta = json.loads((finished / "meta.json").read_text())
    assert meta["resolved"] == {
        "device": "cpu", "precision": "32", "compile": False, "strategy": "single", "backend": "gloo",
        "because": "one process", "float8": False, "bf16": computes_bf16("cpu"), "recomputed_blocks": 0,
    }  # fmt: skip
    assert list((finished / "tensorboard").glob("events.*"))
    assert load_config(str(finished / "config.yaml")).config.trainer.max_steps == 30


def test_a_probe_is_told_that_the_run_is_over(finished: Path) -> None:
    assert (finished / "heartbeat").stat().st_mtime <= (finished / "summary.json").stat().st_mtime
    found = health(finished.name, root_dir=str(finished.parent), started=True)
    assert (found["healthy"], found["why"]) == (True, "the run is over")


def test_figures_have_their_names_and_the_loss_falls(finished: Path) -> None:
    lines = read_metrics(finished / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 31))
    # Those of the machine and of waiting come every so many seconds.
    assert {name for name in trained[5] if not name.startswith(("perf/", "system/"))} == {
        *("step", "time", "train/loss", "train/lr", "train/epoch", "train/grad_norm", "train/tokens_per_sec"),
        *("train/step_time_sec", "train/tokens_total"),
    }
    assert trained[0]["train/lr"] > 0
    assert trained[-1]["train/loss"] < trained[0]["train/loss"] - 0.3
    assert trained[-1]["train/tokens_total"] == 30 * 4 * 32
    evaluated = [line for line in lines if "val/loss" in line]
    assert [line["step"] for line in evaluated] == [10, 20, 30]
    assert set(evaluated[0]) == {"step", "time", "val/loss", "val/perplexity", "val/bits_per_byte"}


def test_the_summary_tells_the_run(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert (summary["steps"], summary["tokens"], summary["world_size"]) == (30, 3840, 1)
    assert summary["resumed_from_step"] is None
    assert summary["best_val_loss"] == summary["val_loss"]
    assert summary["first_loss"] > summary["last_loss"]
    assert summary["parameters"]["total"] == summary["parameters"]["trainable"] == 45_728
    assert summary["peak_memory_bytes"] > 100e6
    assert 0 < summary["goodput"] <= 1
    assert summary["tokens_per_sec"] > 0


def test_the_stages_are_told_in_the_log(finished: Path) -> None:
    log = (finished / "logs" / "train.log").read_text()
    for stage in ("[run]", "[device]", "[data]", "[model]", "[optimizer]", "[schedule]", "[train]"):
        assert stage in log
    assert "45,728 parameters, 45,728 trainable" in log


def test_eval_gives_the_figures_of_the_last_evaluation(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(finished), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = [line for line in read_metrics(finished / "metrics.jsonl") if "val/loss" in line][-1]
    assert result["loss"] == pytest.approx(last["val/loss"], abs=1e-5)
    assert result["bits_per_byte"] == pytest.approx(last["val/bits_per_byte"], abs=1e-5)
    manifest = json.loads(
        (Path(load_config(str(finished / "config.yaml")).config.prepare.output) / "manifest.json").read_text()  # type: ignore[union-attr]
    )
    assert result["tokens"] == sum(shard["tokens"] for shard in manifest["splits"]["val"]["shards"]) - 1


def test_transformers_loads_the_run_s_model_and_agrees(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmtrain.models.folder import read_model_folder

    theirs = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = torch.tensor([tokenizer("def load(path):\n    return json.load(path)\n")["input_ids"]])
    ours, _ = read_model_folder(finished / "model")
    with torch.no_grad():
        torch.testing.assert_close(ours.eval().logits(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)
    assert tokenizer.eos_token_id == theirs.config.eos_token_id


def test_generate_is_greedy_at_temperature_0_and_alike_alone_and_in_a_batch(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(finished), "--max-new-tokens", "12", "--json"]
    prompts = ["--prompt", "import", "--prompt", "def f(self, value):\n"]
    assert run([*arguments, *prompts, "--temperature", "0.9", "--seed", "3"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert run([*arguments, *prompts[2:], "--temperature", "0", "--seed", "3"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert run([*arguments, *prompts[2:], "--temperature", "0", "--seed", "4"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert len(together) == 2
    assert [row["prompt"] for row in together] == ["import", "def f(self, value):\n"]


def test_resume_alone_takes_the_newest_run_and_a_finished_one_is_finished(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("metrics.jsonl", "summary.json", "config.yaml", "events.jsonl")
    before = {name: (finished / name).read_bytes() for name in names}
    assert run(["train", "--resume", f"output.root_dir={finished.parent}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["run"], result["steps"], result["resumed_from_step"]) == (str(finished), 30, None)
    assert result["report"] == str(finished / "report.html")
    assert {name: (finished / name).read_bytes() for name in names} == before


def test_a_dry_run_computes_five_forward_steps_and_writes_no_run(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(config_file), "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["losses"]) == 5
    assert all(5.5 < loss < 6.5 for loss in result["losses"])
    assert not (config_file.parent / "runs").exists()


def test_train_prepares_what_is_missing_and_works_from_any_folder(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["prepare.output=made", "data.train=made/train", "data.val=made/val", "output.root_dir=out"]
    assert run(["train", str(config_file), *overrides, "trainer.max_steps=2"]) == 0
    assert (tmp_path / "made" / "manifest.json").is_file()
    assert (tmp_path / "out" / "latest" / "summary.json").is_file()


def test_synthetic_data_needs_no_corpus(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.name=synthetic", "trainer.max_steps=3", "trainer.log_every_steps=1"]
    assert run(["train", str(config_file), *overrides, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["first_loss"] == pytest.approx(9.0, abs=0.3)


@pytest.fixture(scope="module")
def whole_compiled() -> dict[str, str]:
    """`hash`: the weights of a compiled run that nobody stopped, once a test has made it."""
    return {}


SHORT_EPOCH = ["trainer.micro_batch_size=500", "trainer.grad_accum_steps=2"]
"""The seventh step crosses the epoch's edge."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "workers"),
    [
        (1, 2),
        (7, 0),
        pytest.param(6, 2, marks=pytest.mark.nightly),  # half a minute each; further stops between the same saves
        pytest.param(11, 2, marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_run_on_two_threads_resumes_bit_identically(
    step: int, workers: int, config_file: Path, whole_compiled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    overrides = [*SHORT_EPOCH, "trainer.compile=true", "trainer.precision=auto", "trainer.max_steps=12"]
    shards = ensure_shards(load_config(str(config_file)).config)
    assert 6000 < open_training_data(shards, seed=7).items_per_epoch < 7000
    try:
        if not whole_compiled:
            whole = train(load_config(str(config_file), [*overrides, "output.run_id=whole"]))
            whole_compiled["hash"] = weight_hash(Path(whole["run"]))
        monkeypatch.setenv("LLMTRAIN_FAULTS", f"term@stepped:step={step}")
        with pytest.raises(Preempted, match=f"step {step} is saved"):
            train(load_config(str(config_file), [*overrides, f"data.num_workers={workers}", "output.run_id=stopped"]))
        monkeypatch.delenv("LLMTRAIN_FAULTS")
        stopped = config_file.parent / "runs" / "stopped"
        train(None, resume=str(stopped))
    finally:
        torch.set_num_threads(threads)
    assert weight_hash(stopped) == whole_compiled["hash"]
