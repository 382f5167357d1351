"""The five older systems: all their names, and the page of the manual with the name of each today.

    SYSTEMS ─ names of a system ─▶ renamed.look_up, else the schema ─▶ markdown ─▶ docs/from-older-systems.md

`renamed` alone says what a key, value, flag or config is today. Commands, files and variables are here, since llmtrain
never meets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from llmtrain.config.loading.renamed import COMMANDS, CONFIGS, Renamed, look_up, look_up_flag, old_value
from llmtrain.config.loading.walk import walk
from llmtrain.config.sections.schema import Config

SAME = "the same"

VARIABLES = {
    "HF_TOKEN": SAME,
    "HUGGINGFACE_HUB_TOKEN": "HF_TOKEN; the older name is read, with a warning",
    "HF_HOME": SAME,
    "TRANSFORMERS_CACHE": "HF_HUB_CACHE; the older name is read, with a warning",
    "TRANSFORMERS_OFFLINE": "the same, or HF_HUB_OFFLINE; for one run `model.local_files_only: true`",
    "HF_REPO_ID": "the same, for `llmtrain publish MODEL --to hub`",
    "MLFLOW_TRACKING_URI": "the same, or `tracking.mlflow.tracking_uri`",
    "CUDA_VISIBLE_DEVICES": "the same, or `run.device`",
    "CUDA_DEVICE_MAX_CONNECTIONS": SAME,
    "NCCL_DEBUG": SAME,
    "NCCL_SOCKET_IFNAME": SAME,
    "NCCL_IB_HCA": SAME,
    "NCCL_ASYNC_ERROR_HANDLING": "TORCH_NCCL_ASYNC_ERROR_HANDLING, which is set; the older name is read",
    "MASTER_ADDR": SAME,
    "MASTER_PORT": SAME,
    "WORLD_SIZE": "the same, where processes are started by hand or by torchrun",
    "LOCAL_RANK": "the same, where processes are started by hand or by torchrun",
    "NODE_RANK": "a flag: `llmtrain train CONFIG --nproc N --nnodes N --node-rank I`; agreed on when not given",
    "DATA_ROOT": "any variable may stand in a config: `data.train: ${oc.env:DATA_ROOT}/rows.jsonl`",
    "CKPT_ROOT": "any variable may stand in a config: `output.root_dir: ${oc.env:CKPT_ROOT}`",
    "REMOTE_USER": "the same, or `remote.user`",
    "REMOTE_HOST": "the same, or `remote.host`",
    "REMOTE_DIR": "the same, or `remote.dir`",
    "LAKEFS_ENDPOINT": SAME,
    "LAKEFS_ACCESS_KEY": SAME,
    "LAKEFS_SECRET_KEY": SAME,
}
"""Environment variables, and what they are today."""


class System(NamedTuple):
    """An older system: a description as its title, and all its names."""

    title: str
    commands: Mapping[str, str]
    """Command lines, and today's."""
    keys: tuple[str, ...] = ()
    """Keys, or keys with a value (`bf16=false`)."""
    flags: tuple[str, ...] = ()
    """Flags of its training command."""
    configs: tuple[str, ...] = ()
    """Configs that it shipped, and whose names changed."""
    variables: tuple[str, ...] = ()
    files: Mapping[str, str] = {}
    """Files that it read or wrote, and today's."""


def _below(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


_CHECKPOINT = "the folder `<run>/checkpoints/step_000020`"

_KUBERNETES = System(
    "A training framework with presets, on the way to Kubernetes",
    commands={
        "uv sync": "`make install`",
        "uv sync --extra dev": "`make setup`",
        "uv sync --extra mlflow": "`pip install -e '.[mlflow]'`",
        "pip install -e '.[mlflow]'": SAME,
        "pre-commit install": SAME,
        "make lint, make format, make test": SAME,
        "python -m llmtrain --help": SAME,
        "python -m llmtrain validate --config FILE": "the same, or `llmtrain validate CONFIG`",
        "python -m llmtrain print-config --config FILE": "the same, or `llmtrain print-config CONFIG`",
        "python -m llmtrain train --config FILE": "the same, or `llmtrain train CONFIG`",
        "train --resume <run_id>": "the same; `llmtrain train --resume` takes the newest run",
        "train --resume runs/<run_id>/checkpoints/step_20.pt": "`llmtrain train --resume RUN/checkpoints/step_000020`",
        "train --dry-run": "the same: `llmtrain train CONFIG --dry-run`",
        "--json": "the same, on every command that prints a result",
    },
    keys=(
        "schema_version",
        *_below("run", "name", "seed", "device", "deterministic", "notes"),
        *_below("model", "name=dummy_gpt", "block_size", "d_model", "n_layers", "n_heads", "d_ff", "dropout"),
        *_below("model", "tie_embeddings", "vocab_size"),
        *_below("data", "name=dummy_text", "cache_dir", "num_workers", "train_split", "val_split"),
        *_below("data", "dataset_name", "dataset_config", "text_column"),
        *_below("trainer", "max_steps", "micro_batch_size", "grad_accum_steps", "lr", "weight_decay", "warmup_steps"),
        *_below("trainer", "max_grad_norm", "log_every_steps", "eval_every_steps", "save_every_steps"),
        *_below("ddp", "enabled", "backend", "init_method", "timeout_sec", "find_unused_parameters"),
        *_below("ddp", "rank", "world_size", "local_rank", "master_addr", "master_port"),
        *_below("mlflow", "enabled", "tracking_uri", "experiment", "run_name", "log_models"),
        *_below("logging", "level", "json_output", "log_to_file", "file_name"),
        *_below("output", "root_dir", "run_id", "save_config_copy", "save_meta_json"),
    ),
    configs=("example",),
    files={
        "model.init (a key)": "`model.init_std`: weights of the decoder are drawn from a normal distribution",
        "val/loss and other metrics": SAME,
        "final_val_loss (of the summary)": "`val_loss` in `<run>/summary.json`",
        "runs/<run_id>/config.yaml": SAME,
        "runs/<run_id>/meta.json": SAME,
        "runs/<run_id>/logs/": SAME,
        "runs/<run_id>/checkpoints/step_<N>.pt": _CHECKPOINT,
    },
)

_SCRIPT = System(
    "A LoRA script and a smoke test, started by torchrun",
    commands={
        "python train_framework.py …": "`llmtrain train finetune-lora`, or another config",
        "torchrun --nproc_per_node=N train_framework.py …": "`llmtrain train CONFIG --nproc N`; torchrun works too",
        "torchrun --nnodes=N --node_rank=I …": "`llmtrain train CONFIG --nproc N --nnodes N --node-rank I`",
        "python train.py (the smoke test)": "`llmtrain smoke`",
        "torchrun --nproc_per_node=N train.py": "`llmtrain smoke --nproc N`",
        "train.py --epochs, --samples, --features, --classes, --lr, --seed": "the same flags of `llmtrain smoke`",
        "train.py --batch": "`llmtrain smoke --batch-size N`",
        "huggingface-cli login --token TOKEN": "hf auth login, or the variable HF_TOKEN",
        "the snippet that exports a dataset": "`llmtrain convert IN OUT --split NAME`, or hf://NAME:SPLIT in "
        "`data.train`",
        "the snippet that converts CSV": "`llmtrain convert IN OUT`, or the CSV file itself in `data.train`",
        "the snippet that validates JSONL": "`llmtrain inspect FILE`",
        "merging LoRA into its base": "`llmtrain merge MODEL`",
        "serving adapters": "`llmtrain publish MODEL --to FOLDER` writes what PEFT reads",
        "s5cmd, aws s3 sync (after a run)": SAME,
    },
    flags=(
        *("--model", "--data", "--output", "--epochs", "--seq-len", "--batch", "--grad-accum", "--bf16"),
        *("--lora", "--lora-r", "--lora-alpha", "--lora-dropout", "--target-modules", "--log-level", "--log-batches"),
        *("--model-local-dir", "--tokenizer-local-dir", "--local-files-only", "--report-json"),
        *("--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_id", "--rdzv_endpoint"),
    ),
    variables=(
        *("HF_HOME", "TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_TOKEN", "HF_TOKEN", "TRANSFORMERS_OFFLINE"),
        *("MLFLOW_TRACKING_URI", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_DEBUG", "NCCL_ASYNC_ERROR_HANDLING"),
        *("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE", "LOCAL_RANK"),
        *("DATA_ROOT", "CKPT_ROOT"),
    ),
    files={
        "rows: messages; prompt and completion; text": "the same; one file may mix them",
        "--output: adapters and tokenizer": "`<run>/model`, which is that of the best checkpoint, else of the last",
        "checkpoints/<run>/epoch-*/rank-*/": "`<run>/checkpoints/step_000020`, one for all ranks",
        "checkpoints/<run>/best": "`<run>/checkpoints/best`",
        "the JSON report": "`<run>/summary.json`",
        "train-ddp.yaml (Kubernetes)": "`llmtrain launch k8s CONFIG --nodes N`, with `--kind KIND` for a StatefulSet",
    },
)

_LIGHTNING = System(
    "A distributed pipeline on PyTorch Lightning",
    commands={
        "pip install -r requirements.txt": "the same, or `make install`",
        "python scripts/run_training.py": "`llmtrain train CONFIG`",
    },
    keys=(
        *_below("model", "name=gpt2-small", "hidden_size", "num_attention_heads"),
        *_below("training", "batch_size", "learning_rate", "max_epochs"),
    ),
    files={
        "config/": "any YAML or JSON file, or a config that ships: `llmtrain list-configs`",
        "datasets of Hugging Face": "`data.name: huggingface` for text, `data.name: chat` for rows",
        "Weights & Biases": "`tracking.wandb.enabled: true`",
    },
)

_PRETRAINING = System(
    "A pretraining tool with one flat config, and complex attention",
    commands={
        "llm-train configs/small.yaml": f"`{COMMANDS['llm-train']}`",
        "llm-train … --resume checkpoints/small/step0005000": "`llmtrain train --resume RUN/checkpoints/step_005000`",
        "llm-preprocess": f"`{COMMANDS['llm-preprocess']}`, or `llmtrain train CONFIG`, which makes missing shards",
        "llm-analyse --input FOLDER --output FOLDER": "`llmtrain inspect FOLDER --png FOLDER --json`, or `--html FILE`",
    },
    keys=(
        *("train_data", "val_data", "tokenizer_path", "seq_len", "batch_size", "gradient_accumulation_steps"),
        *("num_steps", "dtype", "dtype=float32", "dtype=float16", "dtype=bfloat16", "checkpoint_dir", "save_every"),
        *("keep_last_n", "log_every", "eval_every", "eval_steps", "use_wandb", "wandb_project", "wandb_run_name"),
        *("seed", "num_workers", "compile_model"),
        *_below("model", "vocab_size", "d_model", "num_layers", "max_seq_len", "dropout", "tie_embeddings"),
        *_below("model", "parallel_layers", "attention", "positional", "ffn", "norm"),
        *_below("optimizer", "type", "lr", "weight_decay", "beta1", "beta2", "eps", "grad_clip"),
        *_below("scheduler", "type", "warmup_steps", "min_lr_ratio"),
    ),
    configs=("experiment_complex_attn",),
    files={
        "configs/small.yaml, configs/medium.yaml": "`llmtrain train small`, `llmtrain train medium`",
        "Parquet shards: a folder, file, glob or list": "the same in `data.train`; weights are possible",
        "step<N>.safetensors, step<N>.state.pt": _CHECKPOINT,
        "best, final (tags)": "`<run>/checkpoints/best`, `<run>/checkpoints/final`",
        "<tag>.config.json, copy of the config": "`config.yaml` in the run and in each checkpoint",
        "load_file and Transformer(cfg)": "`llmtrain.load_model` of a run, or "
        "`llmtrain.load_decoder` of a config and weights",
    },
)

_WORKSHOP = System(
    "A fine-tuning workshop with Make targets and Hydra configs",
    commands={
        "make venv, make install, make clean": SAME,
        "make convert": "the same, or `llmtrain convert IN OUT`",
        "make train TRAIN_CONFIG=…": "the same, or `llmtrain train CONFIG`",
        "make eval EVAL_CONFIG=…": "the same, or `llmtrain eval MODEL --config eval`",
        "make eval-baseline": f"the same, or `{COMMANDS['eval-baseline']}`",
        "make publish": "the same, with LICENSE=ID, or `llmtrain publish MODEL --license ID`",
        "make publish-hf": f"the same, with LICENSE=ID, or `{COMMANDS['publish-hf']}`",
        "make push, ssh-init, ssh-train, ssh-train-bg, ssh-eval, ssh-eval-baseline": "the same, or `llmtrain launch`",
        "tmux attach -t train": SAME,
        "python -m src.main train --config-name CONFIG": "`llmtrain train CONFIG`",
        "python -m src.main eval --config-name CONFIG": "`llmtrain eval MODEL --config CONFIG`",
        "python -m src.main publish [MODEL_PATH]": "`llmtrain publish MODEL --license ID`",
        "python -m src.main publish-hf [MODEL_PATH]": f"`{COMMANDS['publish-hf']}`",
        "publish-hf --repo REPO_ID": "`llmtrain publish MODEL --to hub:USER/NAME`",
        "publish-hf --public": "`llmtrain publish MODEL --to hub:USER/NAME --public`",
        "python -m src.main list-configs": "`llmtrain list-configs`",
        "python -m src.main version": "`llmtrain version`",
        "tensorboard --logdir outputs/runs/latest/logs": "tensorboard --logdir runs",
        "publish only what is better than the baseline": "`llmtrain publish MODEL --require-improvement rougeL`",
    },
    keys=(
        *("model_name", "dataset_path", "dataset_pattern", "data_format", "data_source.type=local"),
        *("data_source.type=lakefs", "epochs", "batch_size", "lr", "max_length", "gradient_accumulation_steps"),
        *("warmup_ratio", "weight_decay", "lr_scheduler_type", "bf16=true", "bf16=false"),
        *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "gradient_checkpointing"),
        *("cuda_visible_devices", "evaluation.metrics=avg_jaccard_overlap"),
    ),
    configs=("train", "train_llama3b", "train_lakefs", "eval_baseline"),
    variables=(
        *("HF_TOKEN", "HF_REPO_ID", "CUDA_VISIBLE_DEVICES", "HF_HOME", "TRANSFORMERS_CACHE"),
        *("REMOTE_USER", "REMOTE_HOST", "REMOTE_DIR", "LAKEFS_ENDPOINT", "LAKEFS_ACCESS_KEY", "LAKEFS_SECRET_KEY"),
    ),
    files={
        "rows: messages; prompt, completion; instruction, input, output": "the same; each row shows its own shape",
        "data/*.jsonl": "the same: `data.train: data/*.jsonl` with `data.name: chat`",
        "data/eval/test.jsonl, dev.jsonl, adversarial.jsonl": "the same, for `llmtrain eval MODEL --config eval`",
        "exact_match, rouge1, rouge2, rougeL, bleu": "the same names in `evaluation.metrics`",
        "outputs/runs/<time>/": "`runs/<run_id>`; `output.root_dir` is the folder of all",
        "outputs/runs/latest": "`runs/latest`",
        "model/ (adapter_config.json, …)": "`<run>/model`, of the same files",
        "config_used.yaml": "`config.yaml`",
        "metrics.json": "`<run>/eval/<time>/metrics.json`; `<run>/summary.json` of the training",
        "logs/ (TensorBoard)": "`<run>/tensorboard`",
        "artifacts/models/": "the same",
        "scripts/convert_data.py": "`llmtrain convert IN OUT`",
        ".env": "no file is read by itself: source it, as before; the Make targets ssh-… send it, as `remote.env_file`",
    },
)

SYSTEMS = (_KUBERNETES, _SCRIPT, _LIGHTNING, _PRETRAINING, _WORKSHOP)


def markdown() -> str:
    """Return the page: for each system, tables of its commands, keys, flags, configs, variables and files."""
    return "\n\n".join([_BEGINNING, *(part for system in SYSTEMS for part in _chapter(system))]) + "\n"


_BEGINNING = """# From older systems

This page gives today's name for every name of the five older systems. llmtrain gives the same answer when it meets an
old name in a config, in an override, as a flag or as a command."""


def _chapter(system: System) -> list[str]:
    tables = {
        "command": system.commands,
        "key": {key: key_today(key) for key in system.keys},
        "flag": {flag: flag_today(flag) for flag in system.flags},
        "config": {name: f"`{CONFIGS[name]}`" for name in system.configs},
        "variable": {name: VARIABLES[name] for name in system.variables},
        "file, or what else there was": system.files,
    }
    return [f"## {system.title}", *(_table(name, rows) for name, rows in tables.items() if rows)]


def _table(name: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | today |", "|---|---|", *(f"| `{old}` | {today} |" for old, today in rows.items())]
    return "\n".join(lines)


def key_today(text: str) -> str:
    """Return what an old key, or a key with a value, is today. Raises KeyError for an unknown one."""
    key, _, value = text.partition("=")
    if key in _keys() and not value:
        return SAME
    path = tuple(key.split("."))
    renamed = old_value(path, value) or look_up(path, value=value or None)
    return _shown(renamed) if renamed else f"`{_elsewhere(path[-1])}`"


def flag_today(flag: str) -> str:
    """Return what an old flag of a training command is today. Raises KeyError as `key_today` does."""
    renamed = look_up_flag(flag, command="train")
    return _shown(renamed) if renamed else f"`{_elsewhere(flag.removeprefix('--').replace('-', '_'))}`"


def _shown(renamed: Renamed) -> str:
    keys = ", ".join(f"`{key}`" for key in renamed.to)
    return "; ".join(part for part in (keys, renamed.note) if part)


def _elsewhere(name: str) -> str:
    """Return the key of this name in another section."""
    return {key.path[-1]: key.dotted for key in walk(Config)}[name]


def _keys() -> set[str]:
    return {key.dotted for key in walk(Config)}
