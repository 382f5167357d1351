"""Names of older systems, and their names today: keys, values, flags, commands and configs.

    a key or a value        ─▶ look_up            ─▶ RENAMED                    │
    a flag                  ─▶ look_up_flag       ─▶ RENAMED, SECTION_AS_VALUE  │
    a word as the command   ─▶ old_command        ─▶ COMMANDS                   ├─▶ an answer in the error message
    a word as CONFIG        ─▶ old_config         ─▶ CONFIGS                    │
    a word as a checkpoint  ─▶ is_old_checkpoint                                │

The tables hold only names that differ from today's, so that an old config or command line gets an answer instead of a
guess. `older_systems` says which system had which name. Backticks in an answer hold text that can be typed; tests
check it against the schema and the commands.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any, NamedTuple

from llmtrain.config.sections.presets import PRESETS


class Renamed(NamedTuple):
    """Today's keys for an old name, all of which exist in the schema, and a note."""

    to: tuple[str, ...] = ()
    """Keys, or keys with a value: `trainer.precision: 16-mixed`."""
    note: str = ""

    @property
    def answer(self) -> str:
        """The answer, without its subject."""
        if not self.to:
            return self.note
        return f"is {' and '.join(self.to)} now" + (f" ({self.note})" if self.note else "")

    def __str__(self) -> str:
        return f"unknown key: it {self.answer}" if self.to else self.note


def _now(*keys: str, note: str = "") -> Renamed:
    return Renamed(keys, note)


def _flag(command: str, *, what: str = "is a flag now") -> Renamed:
    return Renamed(note=f"{what}: `llmtrain {command}`")


def _always(what: str) -> Renamed:
    return Renamed(note=f"is always on now: {what}; remove it")


_HUGGINGFACE = "with `model.name: huggingface`"
_JACCARD = Renamed(note="is jaccard now")
_EVAL_JACCARD = Renamed(note="is eval/jaccard now")
_MODEL_WORD = "is the word after the command now"

RENAMED: dict[str, Renamed] = {
    # Model
    "block_size": _now(
        "data.seq_len", "model.max_seq_len", note="the length of training sequences, and the longest possible"
    ),
    "n_layers": _now("model.num_layers"),
    "n_heads": _now("model.attention.num_heads"),
    "num_attention_heads": _now("model.attention.num_heads"),
    "hidden_size": _now("model.d_model"),
    "model.d_ff": _now("model.ffn.d_ff"),
    "model_name": _now("model.path", note=_HUGGINGFACE),
    "model_local_dir": _now("model.path", note=_HUGGINGFACE),
    "tokenizer_local_dir": _now("model.tokenizer", note=f"{_HUGGINGFACE}; the model's own when not given"),
    "local_files_only": _now("model.local_files_only", note=_HUGGINGFACE),
    "gradient_checkpointing": _now("trainer.activation_checkpointing", note="none, selective, full or auto"),
    "model.name=dummy_gpt": _now("model.name: decoder", note="a small one by `model.d_model` and `model.num_layers`"),
    **{
        f"model.name={preset}": _now(f"model.preset: {preset}", note="with `model.name: decoder`") for preset in PRESETS
    },
    # Data
    "train_data": _now("data.train"),
    "val_data": _now("data.val"),
    "train_split": _now("data.train", note="with `data.name: huggingface` a split; else files"),
    "val_split": _now("data.val", note="with `data.name: huggingface` a split; else files"),
    "dataset_path": _now("data.train", note="a path with its pattern, data/*.jsonl; rows need `data.name: chat`"),
    "dataset_pattern": _now("data.train", note="a path with its pattern, data/*.jsonl; rows need `data.name: chat`"),
    "dataset_name": _now("data.path", note="hf://NAME, with `data.name: huggingface`"),
    "dataset_config": _now("data.configs", note="a list, with `data.name: huggingface`"),
    "prepare.dataset_path": _now("prepare.input"),
    "prepare.dataset_pattern": _now("prepare.include", note="a list of patterns"),
    "prepare.dataset_name": _now("prepare.input", note="{path: hf://NAME}"),
    "prepare.min_length": _now("prepare.steps", note="a step: `prepare.steps: [{name: length, min_chars: 100}]`"),
    "prepare.deduplicate": _now("prepare.steps", note="a step, there by default; without: `prepare.steps: []`"),
    "prepare.dataset_config": _now("prepare.input", note="{path: hf://NAME, configs: [CONFIG]}"),
    "data_format": _now("data.name: chat", note="each row shows its own shape"),
    "data_source": Renamed(note="is not needed for files of this machine, which `data.train` names; remove the key"),
    "data_source.type=lakefs": _now(
        "data.train", note="lakefs://repository/branch/path, as in `llmtrain print-config finetune-lakefs`"
    ),
    "data.name=dummy_text": _now("data.name: synthetic"),
    "max_length": _now("data.seq_len"),
    "tokenizer_path": _now(
        "data.tokenizer",
        note="of shards without a manifest, with `data.name: tokens`; to make shards, `prepare.tokenizer.path` with "
        "`prepare.tokenizer.kind: hf`",
    ),
    "prepare.tokenizer_path": _now("prepare.tokenizer.path", note="with `prepare.tokenizer.kind: hf`"),
    "seq_len": _now("data.seq_len"),
    "num_workers": _now("data.num_workers"),
    "samples": _now(
        "data.num_items", note="with `data.name: synthetic`; of the smoke test `llmtrain smoke --samples N`"
    ),
    "features": _flag("smoke --features N", what="is a flag of smoke now"),
    "classes": _flag("smoke --classes N", what="is a flag of smoke now"),
    # Trainer
    "training": _now("trainer"),
    "num_steps": _now("trainer.max_steps"),
    "epochs": _now("trainer.max_epochs"),
    "batch": _now("trainer.micro_batch_size", note="sequences on one device at a time"),
    "batch_size": _now(
        "trainer.micro_batch_size",
        note="sequences on one device at a time; `trainer.global_batch_size` counts a whole step",
    ),
    "gradient_accumulation_steps": _now("trainer.grad_accum_steps"),
    "grad_accum": _now("trainer.grad_accum_steps"),
    "dtype": _now("trainer.precision", note="bfloat16 is bf16-mixed, float16 is 16-mixed, float32 is 32"),
    "dtype=bfloat16": _now("trainer.precision: bf16-mixed"),
    "dtype=float16": _now("trainer.precision: 16-mixed"),
    "dtype=float32": _now("trainer.precision: 32"),
    "bf16": _now("trainer.precision: bf16-mixed", note="auto takes it where the hardware has it"),
    "bf16=false": _now("trainer.precision: 16-mixed", note="float16; all in float32 is `trainer.precision: 32`"),
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
    "ddp.enabled": _now(
        "distributed.strategy",
        note="auto: single with one process, else ddp, or fsdp where memory is short; several processes by "
        "`llmtrain train CONFIG --nproc N`",
    ),
    "ddp.backend": _now("distributed.backend"),
    "ddp.timeout_sec": _now("distributed.timeout_sec"),
    "ddp.find_unused_parameters": _now("distributed.find_unused_parameters"),
    "init_method": _now("distributed.rendezvous.init_method"),
    "rank": _now("distributed.rendezvous.rank"),
    "world_size": _now("distributed.rendezvous.world_size"),
    "local_rank": _now("distributed.rendezvous.local_rank"),
    "master_addr": _now("distributed.rendezvous.master_addr"),
    "master_port": _now("distributed.rendezvous.master_port"),
    "nproc_per_node": _flag("train CONFIG --nproc N"),
    "nnodes": _flag("train CONFIG --nproc N --nnodes N"),
    "node_rank": _flag("train CONFIG --nproc N --nnodes N --node-rank I"),
    "rdzv_endpoint": _flag("train CONFIG --nproc N --nnodes N --rendezvous HOST:PORT"),
    "rdzv_backend": Renamed(note="is chosen by llmtrain now; remove it"),
    "rdzv_id": Renamed(note="is chosen by llmtrain now; remove it"),
    "smoke --nproc_per_node": _flag("smoke --nproc N"),
    "smoke --node_rank": _flag("smoke --nproc N --nnodes N --node-rank I"),
    "smoke --rdzv_endpoint": _flag("smoke --nproc N --nnodes N --rendezvous HOST:PORT"),
    "eval --nproc_per_node": _flag("eval MODEL --nproc N"),
    "cuda_visible_devices": _now("run.device", note="cuda:N, or the environment variable CUDA_VISIBLE_DEVICES"),
    # The run and its records
    "seed": _now("run.seed"),
    "checkpoint_dir": _now("output.root_dir", note="checkpoints lie in ROOT_DIR/RUN_ID/checkpoints"),
    "save_config_copy": _always("every run keeps its config.yaml"),
    "save_meta_json": _always("every run writes meta.json"),
    "report_json": _always("every run writes summary.json, and `llmtrain train CONFIG --json` prints it"),
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
    # Fine-tuning, evaluation and publishing
    "lora": _now("model.lora: {}", note="a section, whose keys have defaults"),
    "lora_r": _now("model.lora.r"),
    "lora_alpha": _now("model.lora.alpha"),
    "lora_dropout": _now("model.lora.dropout"),
    "lora_target_modules": _now("model.lora.target_modules"),
    "target_modules": _now("model.lora.target_modules", note="a list: [q_proj, v_proj]"),
    "evaluation.metrics=avg_jaccard_overlap": _JACCARD,
    "publish.require_improvement=avg_jaccard_overlap": _JACCARD,
    "trainer.keep_best=eval/avg_jaccard_overlap": _EVAL_JACCARD,
    "trainer.early_stopping.metric=eval/avg_jaccard_overlap": _EVAL_JACCARD,
    "repo": _now("publish.to", note="hub:USER/NAME"),
    "public": _now("publish.private: false"),
    "publish --repo": _flag("publish MODEL --to hub:USER/NAME", what="is --to now"),
    "config_name": _flag("train CONFIG", what=_MODEL_WORD),
    "eval --config_name": _flag("eval MODEL --config NAME", what="is --config now"),
    # Flags of commands that take no keys, or that mean something else by them
    "smoke --batch": _flag("smoke --batch-size N", what="is --batch-size now"),
    "eval --batch": _flag("eval MODEL --batch-size N", what="is --batch-size now"),
    "generate --batch": _flag("generate MODEL --batch-size N", what="is --batch-size now"),
    **{f"{verb} --model": _flag(f"{verb} MODEL", what=_MODEL_WORD) for verb in ("eval", "generate", "publish")},
    "convert --data": _flag("convert IN OUT", what=_MODEL_WORD),
    "convert --output": _flag("convert IN OUT", what="is the last word now"),
    "publish --output": _flag("publish MODEL --to FOLDER", what="is --to now"),
}
"""Old names with underscores, and their answers. A bare name holds in every section, and as a flag of every command.

More exact names win: `model.d_ff` holds in that section alone, `bf16=false` with that value, and `smoke --batch` as a
flag of that command.
"""

SECTION_AS_VALUE: dict[str, Renamed] = {
    "model": _now("model.path", note=_HUGGINGFACE),
    "data": _now("data.train", note="rows need `data.name: chat`"),
    "output": _now("output.root_dir", note="the folder of all runs"),
}
"""Names that took a value on older command lines, and are sections today."""

COMMANDS = {
    "publish-hf": "llmtrain publish MODEL --to hub:USER/NAME --license ID",
    "eval-baseline": "llmtrain eval MODEL --config eval-baseline",
    "preprocess": "llmtrain prepare CONFIG",
    "llm-preprocess": "llmtrain prepare CONFIG",
    "llm-train": "llmtrain train CONFIG",
    "llm-analyse": "llmtrain inspect CORPUS --html FILE",
}
"""Old commands, and their command lines today."""

CONFIGS = {
    "example": "quickstart",
    "train": "finetune-llama3-8b",
    "train_llama3b": "finetune-llama3.2-3b",
    "train_lakefs": "finetune-lakefs",
    "eval_baseline": "eval-baseline",
    "experiment_complex_attn": "complex-attention",
}
"""Old configs, by their names without folder and ending, and the shipped configs of today."""

_CONFIG_ENDINGS = (".yaml", ".yml", ".json")
_OLD_CHECKPOINT = re.compile(
    r"(.*/)?((step_?\d+|best|final)(\.state\.pt|\.pt|\.safetensors)|checkpoints/(.*/)?step_?\d+|epoch-\d+/rank-\d+)/?"
)


def look_up(path: tuple[str, ...], *, value: Any = None, command: str = "") -> Renamed | None:
    """Return what an old key or flag is today, or None for a name that no older system had.

    The more exact entry wins: flag of `command`, key with this `value`, dotted path, last name, section around it.
    Dashes count as underscores, and flags as keys.
    """
    names = tuple(name.lstrip("-").replace("-", "_") for name in path)
    dotted, last = ".".join(names), names[-1]
    exact = [f"{command} --{last}"] if command else []
    if isinstance(value, str | int | float):
        exact += [f"{name}={str(value).lower()}" for name in (dotted, last)]
    for name in (*exact, dotted, last):
        if name in RENAMED:
            return RENAMED[name]
    section = RENAMED.get(names[0])
    return section if section and not section.to else None


def look_up_flag(flag: str, *, command: str, value: str | None = None) -> Renamed | None:
    """Return what an old flag of `command` is today, or None for a flag that no older system had."""
    return look_up((flag,), value=value, command=command) or SECTION_AS_VALUE.get(flag.removeprefix("--"))


def old_value(path: tuple[str, ...], value: Any) -> Renamed | None:
    """Return what an old value of a key of today is called now, or None for any other value."""
    return RENAMED.get(f"{'.'.join(path)}={value}") if isinstance(value, str) else None


def old_command(word: str) -> str | None:
    """Return what to type instead of an old command, or of a config in place of a command; else None."""
    if word in COMMANDS:
        return f"{word} is `{COMMANDS[word]}` now"
    return f"a config stands after a command: `llmtrain train {word}`" if word.endswith(_CONFIG_ENDINGS) else None


def old_config(ref: str) -> str | None:
    """Return which shipped config an older system's is, by its path or name; None if none had the name."""
    name = PurePath(ref).stem
    if name not in CONFIGS:
        return None
    return f"{name} of older systems is {CONFIGS[name]} now"


def is_old_checkpoint(ref: str) -> bool:
    """Return whether `ref` names a checkpoint as older systems did: step_20.pt, step0005000, epoch-3/rank-0."""
    return bool(_OLD_CHECKPOINT.fullmatch(ref))
