"""Command lines of older systems are answered by what to type today, each flag with its value."""

from __future__ import annotations

import shlex

import pytest
import typer

from llmtrain.cli.app import program, run
from llmtrain.config.loading.load import load_config
from llmtrain.config.loading.older_systems import SYSTEMS
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig

COMMANDS = typer.main.get_command(program()).commands  # type: ignore[attr-defined]
FLAGS_OF_TRAIN = {flag for parameter in COMMANDS["train"].params for flag in parameter.opts}
OLD_FLAGS = sorted({flag for system in SYSTEMS for flag in system.flags} - FLAGS_OF_TRAIN)
COMMAND_LINES_BEFORE = {
    "train quickstart --nproc_per_node 4": "`llmtrain train CONFIG --nproc N`",
    "smoke --nproc_per_node=4": "`llmtrain smoke --nproc N`",
    "train quickstart --rdzv_endpoint=host:29500": "--rendezvous HOST:PORT`",
    "train quickstart --rdzv_backend=c10d": "chosen by llmtrain",
    "train quickstart --max-steps 3": "--max-steps is trainer.max_steps: trainer.max_steps=3",
    "train quickstart --lora": "model.lora={}",
    "train quickstart --lora-r 8": "--lora-r is model.lora.r now: model.lora.r=8",
    "train quickstart --bf16": "trainer.precision=bf16-mixed",
    "train quickstart --model owner/name": "is model.path now (with `model.name: huggingface`): model.path=owner/name",
    "train quickstart --model-local-dir /models/x": "model.path=/models/x",
    "train quickstart --report-json out.json": "`llmtrain train CONFIG --json`",
    "train --config-name train_llama3b": "`llmtrain train CONFIG`; train_llama3b of older systems is finetune-",
    "eval --config-name eval_baseline": "`llmtrain eval MODEL --config NAME`; eval_baseline of older systems is",
    "eval --model owner/name": "`llmtrain eval MODEL`",
    "train quickstart --local-files-only": "model.local_files_only=true",
    "train quickstart --dtype float16": "trainer.precision=16-mixed",
    "train quickstart --epochs many": "trainer.max_epochs=…",
    "train quickstart --lr=1e-4": "optimizer.lr=1e-4",
    "train quickstart --block_size 128": "data.seq_len=128 model.max_seq_len=128",
    "train quickstart --target-modules q_proj v_proj": "'model.lora.target_modules=[q_proj, v_proj]'",
    "smoke --batch 256": "`llmtrain smoke --batch-size N`",
    "smoke --grad-accum 8": "a key of configs: `llmtrain smoke` takes none",
    "publish --repo user/name": "`llmtrain publish MODEL --to hub:USER/NAME`",
    "publish-hf --repo user/name --public": "`llmtrain publish MODEL --to hub:USER/NAME --license ID` now",
    "configs/small.yaml": "`llmtrain train configs/small.yaml`",
    "small.yaml --resume checkpoints/small/step0005000": "`llmtrain train small.yaml`",
    "validate configs/presets/example.yaml": "example of older systems is quickstart now",
    "validate train": "finetune-llama3-8b",
    "validate train_llama3b": "finetune-llama3.2-3b",
    "validate train_lakefs": "finetune-lakefs",
    "validate eval_baseline": "eval-baseline",
    "validate configs/experiment_complex_attn.yaml": "complex-attention",
}


@pytest.mark.parametrize(("line", "answer"), COMMAND_LINES_BEFORE.items())
def test_an_old_command_line_is_answered_by_what_to_type_today(
    line: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.parametrize("flag", OLD_FLAGS)
def test_every_flag_of_an_older_system_has_an_answer(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "quickstart", flag]) == 2
    assert f"\n{flag}" in capsys.readouterr().err


def test_the_answers_to_an_old_command_line_make_the_config_that_it_meant(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "train finetune-lora --model Qwen/Qwen2.5-3B-Instruct --data /tmp/ds.jsonl --output /tmp/out --lora --bf16 "
        "--lora-alpha 16 --lora-dropout 0.05 --target-modules q_proj k_proj v_proj o_proj --local-files-only "
        "--epochs 1 --seq-len 512 --batch 2 --grad-accum 8 --log-level DEBUG --log-batches all"
    )
    assert run(line.split()) == 2
    answers = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--")]
    overrides = [word for answer in answers for word in shlex.split(answer.rpartition(": ")[2])]
    config = load_config("finetune-lora", overrides).config
    model, data, trainer = config.model, config.data, config.trainer
    assert isinstance(model, HuggingFaceConfig)
    assert isinstance(data, ChatConfig)
    assert model.lora is not None
    assert (model.path, model.local_files_only) == ("Qwen/Qwen2.5-3B-Instruct", True)
    assert (model.lora.alpha, model.lora.dropout) == (16, 0.05)
    assert model.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (data.train, data.seq_len, config.output.root_dir) == ("/tmp/ds.jsonl", 512, "/tmp/out")
    assert (trainer.precision, trainer.max_epochs) == ("bf16-mixed", 1)
    assert (trainer.micro_batch_size, trainer.grad_accum_steps) == (2, 8)
    assert (config.logging.level, config.logging.log_batches) == ("DEBUG", "all")
