"""Keys and flags of the five older systems get today's name, or are said to be always so or not there yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load_config
from llmtrain.config.renamed import RENAMED, SECTION_AS_VALUE, look_up
from llmtrain.config.schema import Config
from llmtrain.config.walk import walk

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
    "data.dataset_name": "not part of this version",
    "data.dataset_config": "not part of this version",
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
    "output.save_config_copy": "always so now",
    "output.save_meta_json": "always so now",
    # flags of the fine-tuning script and of the smoke test
    "epochs": "trainer.max_epochs",
    "seq-len": "data.seq_len",
    "batch": "trainer.micro_batch_size",
    "grad-accum": "trainer.grad_accum_steps",
    "bf16": "trainer.precision",
    "lora": "LoRA is not part of this version",
    "lora-r": "LoRA is not part of this version",
    "lora-alpha": "LoRA is not part of this version",
    "lora-dropout": "LoRA is not part of this version",
    "target-modules": "LoRA is not part of this version",
    "log-level": "logging.level",
    "log-batches": "logging.log_batches",
    "model-local-dir": "not part of this version",
    "tokenizer-local-dir": "prepare.tokenizer.path",
    "local-files-only": "not part of this version",
    "report-json": "always so now",
    "samples": "data.num_items",
    "features": "not part of this version",
    "classes": "not part of this version",
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
    "tokenizer_path": "prepare.tokenizer.path",
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
    "model_name": "model.name",
    "dataset_path": "prepare.input and data.train",
    "dataset_pattern": "prepare.include",
    "data_format": "not part of this version",
    "data_source.type": "lakeFS is not part of this version",
    "max_length": "data.seq_len",
    "warmup_ratio": "scheduler.warmup_ratio",
    "weight_decay": "optimizer.weight_decay",
    "lr_scheduler_type": "scheduler.name",
    "lora_r": "LoRA is not part of this version",
    "lora_alpha": "LoRA is not part of this version",
    "lora_dropout": "LoRA is not part of this version",
    "lora_target_modules": "LoRA is not part of this version",
    "gradient_checkpointing": "not part of this version",
    "cuda_visible_devices": "run.device",
    "config-name": "the word after the command",
    "repo": "publishing is not part of this version",
    "public": "publishing is not part of this version",
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


def test_every_name_in_the_table_that_is_given_as_today_s_is_in_the_schema() -> None:
    targets = {target for renamed in [*RENAMED.values(), *SECTION_AS_VALUE.values()] for target in renamed.to}
    assert targets <= SCHEMA
    assert len(targets) > 30


def test_no_name_in_the_table_hides_a_key_of_today() -> None:
    assert {old for old in RENAMED if old in SCHEMA} == set()


def test_every_name_in_the_table_was_a_key_of_an_older_system() -> None:
    tried = {key.replace("-", "_") for key in OLD_KEYS}
    tried |= {key.rpartition(".")[2] for key in tried} | {key.partition(".")[0] for key in tried}
    assert RENAMED.keys() - tried == {"activation_checkpointing"}


def test_sections_that_were_flags_with_a_value_say_where_the_value_goes(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: some/model\ndata: train.jsonl\noutput: out\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    lines = [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()[1:]]
    assert lines == [
        'c.yaml:1: model: expected a section, with keys of its own (got "some/model"); '
        "fine-tuning a Hugging Face model is not part of this version; remove the key",
        'c.yaml:2: data: expected a section, with keys of its own (got "train.jsonl"); '
        "data as a value is data.train now",
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
