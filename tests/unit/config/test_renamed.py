"""Names of the five older systems get today's names, and every answer is true of the schema and the commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

from llmtrain.cli.app import program
from llmtrain.config.loading.load import load_config, shipped_configs
from llmtrain.config.loading.renamed import COMMANDS, CONFIGS, RENAMED, SECTION_AS_VALUE, look_up
from llmtrain.config.loading.walk import walk
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError

SCHEMA = {key.dotted for key in walk(Config)}
DATA = "data: {name: tokens, train: shards}\n"

# Where users of the older systems have the key, and the answer that they need. Flags stand as they were typed.
OLD_KEYS = {
    # sections run, model, data, trainer, ddp, mlflow, logging, output
    "model.block_size": "data.seq_len and model.max_seq_len",
    "model.n_layers": "model.num_layers",
    "model.n_heads": "model.attention.num_heads",
    "model.d_ff": "model.ffn.d_ff",
    "data.train_split": "data.train",
    "data.val_split": "data.val",
    "data.dataset_name": "data.path now (hf://NAME, with `data.name: huggingface`)",
    "data.dataset_config": "data.configs",
    "trainer.lr": "optimizer.lr",
    "trainer.weight_decay": "optimizer.weight_decay",
    "trainer.warmup_steps": "scheduler.warmup_steps",
    "ddp.enabled": "distributed.strategy",
    "ddp.backend": "distributed.backend",
    "ddp.init_method": "distributed.rendezvous.init_method",
    "ddp.timeout_sec": "distributed.timeout_sec",
    "ddp.find_unused_parameters": "distributed.find_unused_parameters",
    "ddp.rank": "distributed.rendezvous.rank",
    "ddp.world_size": "distributed.rendezvous.world_size",
    "ddp.local_rank": "distributed.rendezvous.local_rank",
    "ddp.master_addr": "distributed.rendezvous.master_addr",
    "ddp.master_port": "distributed.rendezvous.master_port",
    "mlflow.enabled": "tracking.mlflow.enabled",
    "mlflow.tracking_uri": "tracking.mlflow.tracking_uri",
    "mlflow.experiment": "tracking.mlflow.experiment",
    "mlflow.run_name": "tracking.mlflow.run_name",
    "mlflow.log_models": "tracking.mlflow.log_models",
    "output.save_config_copy": "always on now",
    "output.save_meta_json": "always on now",
    # flags of the fine-tuning script and of the smoke test
    "epochs": "trainer.max_epochs",
    "seq-len": "data.seq_len",
    "batch": "trainer.micro_batch_size",
    "grad-accum": "trainer.grad_accum_steps",
    "bf16": "trainer.precision",
    "lora": "model.lora: {}",
    "lora-r": "model.lora.r",
    "lora-alpha": "model.lora.alpha",
    "lora-dropout": "model.lora.dropout",
    "target-modules": "model.lora.target_modules",
    "log-level": "logging.level",
    "log-batches": "logging.log_batches",
    "model-local-dir": "model.path now (with `model.name: huggingface`)",
    "tokenizer-local-dir": "model.tokenizer",
    "local-files-only": "model.local_files_only",
    "report-json": "`llmtrain train CONFIG --json`",
    "samples": "data.num_items",
    "features": "`llmtrain smoke --features N`",
    "classes": "`llmtrain smoke --classes N`",
    "lr": "optimizer.lr",
    "seed": "run.seed",
    # model and training sections of the Lightning pipeline
    "model.hidden_size": "model.d_model",
    "model.num_attention_heads": "model.attention.num_heads",
    "training.batch_size": "trainer.micro_batch_size",
    "training.learning_rate": "optimizer.lr",
    "training.max_epochs": "trainer.max_epochs",
    # the flat config of the pretraining tool
    "train_data": "data.train",
    "val_data": "data.val",
    "tokenizer_path": "it is data.tokenizer now",
    "seq_len": "data.seq_len",
    "batch_size": "trainer.micro_batch_size",
    "gradient_accumulation_steps": "trainer.grad_accum_steps",
    "num_steps": "trainer.max_steps",
    "dtype": "trainer.precision",
    "checkpoint_dir": "output.root_dir",
    "save_every": "trainer.save_every_steps",
    "keep_last_n": "trainer.keep_last",
    "log_every": "trainer.log_every_steps",
    "eval_every": "trainer.eval_every_steps",
    "eval_steps": "trainer.eval_steps",
    "use_wandb": "tracking.wandb.enabled",
    "wandb_project": "tracking.wandb.project",
    "wandb_run_name": "tracking.wandb.run_name",
    "num_workers": "data.num_workers",
    "compile_model": "trainer.compile",
    "optimizer.type": "optimizer.name",
    "optimizer.beta1": "optimizer.betas",
    "optimizer.beta2": "optimizer.betas",
    "optimizer.grad_clip": "trainer.max_grad_norm",
    "scheduler.type": "scheduler.name",
    # the flat config of the fine-tuning workshop
    "model_name": "it is model.path now",
    "dataset_path": "data.train now",
    "dataset_pattern": "data.train now",
    "data_format": "data.name: chat",
    "data_source.type": "not needed for files of this machine",
    "max_length": "data.seq_len",
    "warmup_ratio": "scheduler.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "scheduler.name",
    "lora_r": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_target_modules": "model.lora.target_modules",
    "gradient_checkpointing": "trainer.activation_checkpointing",
    "cuda_visible_devices": "run.device",
    "config-name": "the word after the command",
    "nproc-per-node": "`llmtrain train CONFIG --nproc N`",
    "rdzv-backend": "chosen by llmtrain",
    "rdzv-endpoint": "--rendezvous HOST:PORT`",
    "nnodes": "--nnodes N`",
    "node-rank": "--node-rank I`",
    "repo": "publish.to now (hub:USER/NAME)",
    "public": "publish.private: false",
}


@pytest.mark.parametrize(("key", "answer"), OLD_KEYS.items())
def test_an_old_key_names_what_it_is_today(key: str, answer: str, tmp_path: Path) -> None:
    *section, name = key.split(".")
    file = tmp_path / "c.yaml"
    text = DATA if section != ["data"] else "data: {name: tokens, train: shards,\n"
    if section == ["data"]:
        text += f"  {name}: 1}}\n"
    else:
        text += f"{section[0]}:\n  {name}: 1\n" if section else f"{name}: 1\n"
    file.write_text(text)
    line = 3 if section and section != ["data"] else 2
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    told = str(caught.value).removeprefix(f"{tmp_path}/")
    assert told.startswith(f"c.yaml:{line}: {key}: ")
    assert answer in told


ANSWERS = {
    **{name: str(renamed) for name, renamed in RENAMED.items()},
    **{f"{name} as a value": renamed.answer for name, renamed in SECTION_AS_VALUE.items()},
    **{name: f"`{line}`" for name, line in COMMANDS.items()},
    **{name: f"`llmtrain validate {config}`" for name, config in CONFIGS.items()},
}
COMMANDS_OF_TODAY = typer.main.get_command(program()).commands  # type: ignore[attr-defined]


def typed_in(answer: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]*)`", answer)


def values_of(key: str, value: str) -> bool:
    """Whether the key takes the value, in any of its variants."""
    annotations: list[Any] = [each.field.annotation for each in walk(Config) if each.dotted == key]
    for annotation in annotations:
        for given in (value, YAML(typ="safe").load(value)):
            try:
                TypeAdapter(annotation).validate_python(given)
            except ValidationError:
                continue
            return True
    return False


@pytest.mark.parametrize("name", [*RENAMED, *SECTION_AS_VALUE])
def test_every_key_of_an_answer_is_in_the_schema_and_takes_the_value_that_is_named(name: str) -> None:
    renamed = RENAMED.get(name) or SECTION_AS_VALUE[name]
    named = [*renamed.to, *(text for text in typed_in(renamed.note) if not text.startswith("llmtrain "))]
    for key, _, value in (text.partition(": ") for text in named):
        assert key in SCHEMA
        assert not value or values_of(key, value)


@pytest.mark.parametrize("name", ANSWERS)
def test_every_command_line_of_an_answer_has_a_command_and_flags_that_exist(name: str) -> None:
    lines = [text.split() for text in typed_in(ANSWERS[name]) if text.startswith("llmtrain ")]
    for _, verb, *words in lines:
        flags = {
            flag
            for parameter in COMMANDS_OF_TODAY[verb].params
            for flag in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words if word.startswith("--")} <= flags
    outside = re.sub(r"`[^`]*`", "", ANSWERS[name])
    assert set(re.findall(r"--[\w-]+", outside)) <= {flag for line in lines for flag in line if flag.startswith("--")}


def test_nothing_is_said_to_be_absent() -> None:
    absent = {name for name, answer in ANSWERS.items() if re.search(r"not (yet )?(a )?part of|not in this", answer)}
    assert absent == set()


def test_configs_that_old_ones_are_called_today_ship() -> None:
    assert set(CONFIGS.values()) <= shipped_configs().keys()
    assert not CONFIGS.keys() & shipped_configs().keys()


def test_no_name_in_the_table_hides_a_key_of_today() -> None:
    assert {old for old in RENAMED if old in SCHEMA} == set()


def test_flags_of_a_command_in_the_table_are_no_flags_of_it_today() -> None:
    for verb, flag in (name.split() for name in RENAMED if " " in name):
        taken = {each for parameter in COMMANDS_OF_TODAY[verb].params for each in parameter.opts}
        assert flag not in taken
        assert flag.replace("_", "-") not in taken or "_" in flag


def test_sections_that_were_flags_with_a_value_say_where_the_value_goes(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: some/model\ndata: train.jsonl\noutput: out\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        'c.yaml:1: model: expected a section, with keys of its own (got "some/model"); '
        "model as a value is model.path now (with `model.name: huggingface`)",
        'c.yaml:2: data: expected a section, with keys of its own (got "train.jsonl"); '
        "data as a value is data.train now (rows need `data.name: chat`)",
        'c.yaml:3: output: expected a section, with keys of its own (got "out"); '
        "output as a value is output.root_dir now (the folder of all runs)",
    ]


def test_a_whole_old_section_is_answered_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(DATA + "training:\n  batch_size: 32\n  learning_rate: 0.0001\n  max_epochs: 10\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()[1:]]
    assert [line.split(": ")[0] for line in lines] == ["c.yaml:3", "c.yaml:4", "c.yaml:5"]


def test_dashes_and_flags_count_as_the_same_name() -> None:
    assert look_up(("--grad-accum",)) == RENAMED["grad_accum"]
    assert look_up(("nothing_of_the_kind",)) is None


# Rows that depend on the place, the value or the command: what is typed, and what the answer must hold.
OVERRIDES = {
    "dtype=float16": "trainer.precision: 16-mixed",
    "dtype=bfloat16": "trainer.precision: bf16-mixed",
    "dtype=float32": "trainer.precision: 32",
    "bf16=true": "trainer.precision: bf16-mixed",
    "bf16=false": "trainer.precision: 16-mixed",
    "model=owner/name": "model.path now (with `model.name: huggingface`)",
    "prepare.tokenizer_path=x": "prepare.tokenizer.path now (with `prepare.tokenizer.kind: hf`)",
    "prepare.dataset_path=x": "it is prepare.input now",
    "prepare.dataset_pattern=x": "it is prepare.include now",
    "prepare.dataset_name=x": "it is prepare.input now ({path: hf://NAME})",
    "prepare.dataset_config=x": "configs: [CONFIG]",
    "data_source.type=local": "which `data.train` names; remove the key",
    "data_source.type=lakefs": "it is data.train now (lakefs://repository/branch/path",
    "activation_checkpointing=true": "it is trainer.activation_checkpointing",
    "model.name=gpt2-small": '"gpt2-small" is model.preset: gpt2-small now',
    "model.name=dummy_gpt": '"dummy_gpt" is model.name: decoder now',
    "data.name=dummy_text": '"dummy_text" is data.name: synthetic now',
    "evaluation.metrics=[bleu, avg_jaccard_overlap]": 'evaluation.metrics[1]: "avg_jaccard_overlap" is jaccard now',
    "trainer.keep_best=eval/avg_jaccard_overlap": '"eval/avg_jaccard_overlap" is eval/jaccard now',
}


@pytest.mark.parametrize(("override", "answer"), OVERRIDES.items())
def test_an_old_override_is_answered_by_its_place_and_value_in_one_line(override: str, answer: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("quickstart", [override])
    assert str(caught.value).startswith(f'override "{override}": ')
    assert answer in str(caught.value)
