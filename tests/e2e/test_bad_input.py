"""Mistakes: each ends with exit code 2 and one message that says what, where and what to do; nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.verbs.train import train


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that must fail with exit code 2."""
    capsys.readouterr()
    code = run(arguments)
    stderr = capsys.readouterr().err
    assert code == 2, stderr
    assert "Traceback" not in stderr
    assert stderr.count("error:") == 1, stderr
    return " ".join(stderr.split())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.max_step=3", ["trainer.max_step", "max_steps"]),
        ("trainer.max_steps=many", ["trainer.max_steps", "many"]),
        ("model.vocab_size=300", ["model.vocab_size is 300, but the tokenizer has 400 tokens"]),
        ("data.seq_len=65", ["data.seq_len 65 is over model.max_seq_len 64"]),
        ("model.attention.num_heads=5", ["d_model 32 is not divisible by attention.num_heads 5"]),
        ("model.attention.num_kv_heads=1", ["num_kv_heads is 1"]),
        ("data.train=nowhere/train", ["nowhere/train", "llmtrain prepare"]),
        ("trainer.micro_batch_size=100000", ["fewer than one batch of 100000", "micro_batch_size"]),
        ("trainer.global_batch_size=7", ["global_batch_size", "7", "micro_batch_size"]),
        ("run.device=cuda:63", ["cuda:63"]),
        ("distributed.strategy=ddp", ["ddp", "torchrun"]),
        ("distributed.backend=nccl", ["nccl", "cpu"]),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_written(
    override: str, expected: list[str], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [override, "prepare=null"] if override.startswith("data.train") else [override]
    message = message_of(["train", str(config_file), *overrides], capsys)
    for text in expected:
        assert text in message, message
    assert not (config_file.parent / "runs").exists()


@pytest.mark.parametrize(("cut_to", "expected"), [(0, "is empty"), (100, "has 100 bytes")])
def test_an_empty_or_truncated_shard_is_named(
    cut_to: int, expected: str, config_file: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = next((copy / "train").rglob("*.parquet"))
    with shard.open("r+b") as file:
        file.truncate(cut_to)
    overrides = [f"data.train={copy}/train", f"data.val={copy}/val", "prepare=null"]
    message = message_of(["train", str(config_file), *overrides], capsys)
    assert str(shard) in message
    assert expected in message


def test_an_output_folder_that_cannot_be_written_is_named(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = message_of(["train", str(config_file), f"output.root_dir={config_file}/runs"], capsys)
    assert f"cannot make the run folder {config_file}/runs" in message


def test_a_run_id_that_exists_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(config_file), "trainer.max_steps=2", "output.run_id=mine"]
    assert run(arguments) == 0
    weights = config_file.parent / "runs" / "mine" / "checkpoints" / "final" / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert "exists already" in message_of(arguments, capsys)
    assert weights.read_bytes() == before


def test_resuming_what_is_no_run_is_refused(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    root = f"output.root_dir={tmp_path}/runs"
    assert "has no runs" in message_of(["train", str(config_file), "--resume"], capsys)
    assert "is no run" in message_of(["train", "--resume", str(tmp_path / "empty"), root], capsys)


def test_a_prompt_longer_than_the_context_is_refused(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train(load_config(str(config_file), ["trainer.max_steps=2"]))
    message = message_of(["generate", result["run"], "--prompt", "x = 1\n" * 200], capsys)
    assert "64" in message
    assert "prompt" in message


def test_without_a_compiler_training_goes_on_and_says_so(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    overrides = ["trainer.compile=true", "trainer.max_steps=2", "output.run_id=eager"]
    assert run(["train", str(config_file), *overrides]) == 0
    assert "no C++ compiler was found" in " ".join(capsys.readouterr().err.split())


def test_a_run_that_another_process_trains_is_left_as_it_is(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(train(load_config(str(config_file), ["trainer.max_steps=2"]))["run"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def refuse(run: Path) -> None:
        raise ConfigError(f"{run} is being trained by another process")

    monkeypatch.setattr("llmtrain.runs.upload.locked", refuse)
    message = message_of(["train", "--resume", str(folder), "trainer.max_steps=9"], capsys)
    assert "is being trained by another process" in message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
