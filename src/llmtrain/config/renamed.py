"""Key names of older systems, and what they are called today.

Only names that differ from ours stand here, so that a config or a command line from before gets an answer instead of
a guess. A bare name holds in every section; a dotted one only there, and goes first. Flags of command lines count
as keys: `--grad-accum` is `grad_accum`.
"""

from __future__ import annotations

from typing import NamedTuple


class Renamed(NamedTuple):
    """Today's keys for an old one, all of which exist in the schema, and what else there is to know."""

    to: tuple[str, ...] = ()
    note: str = ""

    @property
    def answer(self) -> str:
        """What became of it, without a subject."""
        if not self.to:
            return self.note
        return f"is {' and '.join(self.to)} now" + (f" ({self.note})" if self.note else "")

    def __str__(self) -> str:
        return f"unknown key: it {self.answer}" if self.to else self.note


def _now(*keys: str, note: str = "") -> Renamed:
    return Renamed(keys, note)


def _always(what: str) -> Renamed:
    return Renamed(note=f"is always so now: {what}; remove the key")


def _absent(what: str) -> Renamed:
    return Renamed(note=f"{what} not part of this version; remove the key")


_LORA = _absent("LoRA is")
_HUB_DATA = _absent("training on a Hugging Face dataset is")
_HUB_MODEL = _absent("fine-tuning a Hugging Face model is")
_CHECKPOINTING = _absent("activation checkpointing is")

RENAMED: dict[str, Renamed] = {
    # Model
    "block_size": _now("data.seq_len", "model.max_seq_len", note="what is trained on, and the longest possible"),
    "n_layers": _now("model.num_layers"),
    "n_heads": _now("model.attention.num_heads"),
    "num_attention_heads": _now("model.attention.num_heads"),
    "hidden_size": _now("model.d_model"),
    "model.d_ff": _now("model.ffn.d_ff"),
    "model_name": _now("model.name", note="a model of Hugging Face is not part of this version"),
    "model_local_dir": _HUB_MODEL,
    "tokenizer_local_dir": _now("prepare.tokenizer.path", note="with prepare.tokenizer.kind: hf"),
    "local_files_only": _HUB_MODEL,
    "gradient_checkpointing": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    # Data
    "train_data": _now("data.train"),
    "val_data": _now("data.val"),
    "train_split": _now("data.train", note="a folder of token shards"),
    "val_split": _now("data.val", note="a folder of token shards"),
    "dataset_path": _now("prepare.input", "data.train", note="the text, and the shards that are made of it"),
    "dataset_pattern": _now("prepare.include", note="a list of patterns"),
    "dataset_name": _HUB_DATA,
    "dataset_config": _HUB_DATA,
    "data_format": _absent("chat and prompt/completion data are"),
    "data_source": _absent("lakeFS is"),
    "max_length": _now("data.seq_len"),
    "tokenizer_path": _now("prepare.tokenizer.path", note="with prepare.tokenizer.kind: hf"),
    "seq_len": _now("data.seq_len"),
    "num_workers": _now("data.num_workers"),
    "samples": _now("data.num_items", note="with data.name: synthetic"),
    "features": _absent("a synthetic classification task is"),
    "classes": _absent("a synthetic classification task is"),
    # Trainer
    "training": _now("trainer"),
    "num_steps": _now("trainer.max_steps"),
    "epochs": _now("trainer.max_epochs"),
    "batch": _now("trainer.micro_batch_size", note="sequences on one device at a time"),
    "batch_size": _now(
        "trainer.micro_batch_size",
        note="sequences on one device at a time; trainer.global_batch_size counts a whole step",
    ),
    "gradient_accumulation_steps": _now("trainer.grad_accum_steps"),
    "grad_accum": _now("trainer.grad_accum_steps"),
    "dtype": _now("trainer.precision", note="bfloat16 is bf16-mixed, float32 is 32; float16 is not in this version"),
    "bf16": _now("trainer.precision", note="bf16-mixed, or auto, which takes it where the hardware has it"),
    "compile_model": _now("trainer.compile"),
    "grad_clip": _now("trainer.max_grad_norm"),
    "log_every": _now("trainer.log_every_steps"),
    "eval_every": _now("trainer.eval_every_steps"),
    "eval_steps": _now("trainer.eval_steps"),
    "save_every": _now("trainer.save_every_steps"),
    "keep_last_n": _now("trainer.keep_last"),
    # Optimizer and schedule
    "optimizer.type": _now("optimizer.name"),
    "learning_rate": _now("optimizer.lr"),
    "lr": _now("optimizer.lr"),
    "weight_decay": _now("optimizer.weight_decay"),
    "beta1": _now("optimizer.betas", note="the first of two"),
    "beta2": _now("optimizer.betas", note="the second of two"),
    "scheduler.type": _now("scheduler.name"),
    "lr_scheduler_type": _now("scheduler.name"),
    "warmup_steps": _now("scheduler.warmup_steps"),
    "warmup_ratio": _now("scheduler.warmup_ratio"),
    # Processes and devices
    "ddp": _now("distributed"),
    "ddp.enabled": _now("distributed.strategy", note="auto is ddp under torchrun, and single without"),
    "ddp.backend": _now("distributed.backend"),
    "ddp.timeout_sec": _now("distributed.timeout_sec"),
    "ddp.find_unused_parameters": _now("distributed.find_unused_parameters"),
    "init_method": _now("distributed.rendezvous.init_method"),
    "rank": _now("distributed.rendezvous.rank"),
    "world_size": _now("distributed.rendezvous.world_size"),
    "local_rank": _now("distributed.rendezvous.local_rank"),
    "master_addr": _now("distributed.rendezvous.master_addr"),
    "master_port": _now("distributed.rendezvous.master_port"),
    "cuda_visible_devices": _now("run.device", note="cuda:N, or the environment variable CUDA_VISIBLE_DEVICES"),
    # The run and its records
    "seed": _now("run.seed"),
    "checkpoint_dir": _now("output.root_dir", note="checkpoints lie in <root_dir>/<run_id>/checkpoints"),
    "save_config_copy": _always("every run keeps its config.yaml"),
    "save_meta_json": _always("every run writes meta.json"),
    "report_json": _always("every run writes summary.json, and --json prints it"),
    "log_level": _now("logging.level"),
    "log_batches": _now("logging.log_batches"),
    "mlflow": _now("tracking.mlflow"),
    "mlflow.enabled": _now("tracking.mlflow.enabled"),
    "mlflow.run_name": _now("tracking.mlflow.run_name"),
    "tracking_uri": _now("tracking.mlflow.tracking_uri"),
    "experiment": _now("tracking.mlflow.experiment"),
    "run_name": _now("run.name"),
    "log_models": _now("tracking.mlflow.log_models"),
    "use_wandb": _now("tracking.wandb.enabled"),
    "wandb_project": _now("tracking.wandb.project"),
    "wandb_run_name": _now("tracking.wandb.run_name"),
    # Fine-tuning and publishing
    "lora": _LORA,
    "lora_r": _LORA,
    "lora_alpha": _LORA,
    "lora_dropout": _LORA,
    "lora_target_modules": _LORA,
    "target_modules": _LORA,
    "repo": _absent("publishing is"),
    "public": _absent("publishing is"),
    "config_name": Renamed(note="is the word after the command now: `llmtrain train CONFIG`"),
}


SECTION_AS_VALUE: dict[str, Renamed] = {
    "model": _HUB_MODEL,
    "data": _now("data.train"),
    "output": _now("output.root_dir", note="the folder of all runs"),
}
"""Names that took a value on older command lines, and are sections today."""


def look_up(path: tuple[str, ...]) -> Renamed | None:
    """What an old key is today: by its dotted path, else by its last name, else by the section that it was in.

    Dashes count as underscores, and flags as keys.
    """
    names = tuple(name.lstrip("-").replace("-", "_") for name in path)
    found = RENAMED.get(".".join(names)) or RENAMED.get(names[-1])
    section = RENAMED.get(names[0])
    return found or (section if section and not section.to else None)
