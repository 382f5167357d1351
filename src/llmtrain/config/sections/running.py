"""`run`, `tracking`, `logging` and `output`: the identity of a run, its trackers, its log and its folder."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from llmtrain.config.sections.base import Section, key, opt
from llmtrain.local_paths import STORE

RESERVED_NAMES = ("latest", "eval", "rm")
"""Names that no run has: the link to the newest run, the folder of evaluations, and the command that removes runs."""


class RunConfig(Section):
    name: str = opt("run", "A name for people; its slug is part of the run id.", min_length=1)
    seed: int = opt(1337, "Seed of all random numbers.", ge=0, lt=2**63)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps.", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    deterministic: bool = opt(False, "Use deterministic algorithms on GPUs too; on a CPU they are always on.")
    notes: str | None = opt(None, "Free text, kept in meta.json.")
    tags: list[str] = opt([], "Free labels, kept in meta.json.")


class TensorBoardConfig(Section):
    enabled: bool = opt(True, "Write event files to <run>/tensorboard.")


class MlflowConfig(Section):
    enabled: bool = opt(False, "Log to MLflow (the extra mlflow).")
    tracking_uri: str | None = opt(
        None,
        "A server (http://…), a database (sqlite:///…) or a folder; MLFLOW_TRACKING_URI when not given, else "
        "sqlite:///mlflow.db, which `mlflow ui` opens.",
        min_length=1,
    )
    experiment: str | None = opt(None, "MLFLOW_EXPERIMENT_NAME when not given, else llmtrain.", min_length=1)
    run_name: str | None = opt(None, "The run's id when not given.", min_length=1)
    log_models: bool = opt(False, "Store the best model as an artifact when the run is finished.")


class WandbConfig(Section):
    enabled: bool = opt(False, "Log to Weights & Biases (the extra wandb).")
    project: str | None = opt(None, "WANDB_PROJECT when not given, else llmtrain.", min_length=1)
    entity: str | None = opt(None, "User or team; WANDB_ENTITY when not given, else your own.", min_length=1)
    run_name: str | None = opt(None, "The run's id when not given.", min_length=1)
    mode: Literal["online", "offline", "disabled"] | None = opt(
        None,
        "offline writes to <run>/wandb, for `wandb sync`; WANDB_MODE when not given, else online.",
    )


class SinkConfig(Section):
    name: str = key("package.module:Class, which implements MetricSink.", pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = opt({}, "Keyword arguments of the class.")


class SamplesConfig(Section):
    prompts: list[str] = opt(
        [],
        "Prompts that the model continues at each evaluation; a model that learns conversations answers them as turns.",
    )
    max_new_tokens: int = opt(64, "The longest sample, in tokens.", ge=1)
    temperature: float = opt(0.8, "Sampling temperature; 0 takes the likeliest token each time.", ge=0)


class TrackingConfig(Section):
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    mlflow: MlflowConfig = MlflowConfig()
    wandb: WandbConfig = WandbConfig()
    sinks: list[SinkConfig] = opt([], "Your own sinks of metrics.")
    samples: SamplesConfig = SamplesConfig()
    system_interval_sec: float = opt(
        2.0, "Seconds between two measurements of processor, memory, disk, network and GPU; 0: none.", ge=0
    )
    finish_timeout_sec: float = opt(
        30.0, "Seconds that the end of a run waits for slow trackers; log_models of a large model needs more.", ge=0
    )


class LoggingConfig(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = opt("INFO", "The least severe messages that are logged.")
    json_output: bool = opt(False, "Write one JSON object a line instead of text.")
    log_to_file: bool = opt(True, "Also write to <run>/logs/<file_name>.")
    file_name: str = opt("train.log", "Name of the log file.", pattern=r"^[^/]*[^/.][^/]*$")
    log_batches: Literal["first-last", "all", "none"] = opt(
        "first-last", "Which batches level DEBUG describes, with the positions of their sequences on each rank."
    )


class OutputConfig(Section):
    root_dir: str = opt(
        "runs", "Folder of all runs, or its address in a store (s3://bucket/runs).", json_schema_extra=STORE
    )
    run_id: str | None = opt(
        None,
        "Name of the run's folder, of letters, digits and . _ -; made from time, git and name when not given.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
    )

    @field_validator("run_id")
    @classmethod
    def _names_no_other_thing(cls, run_id: str | None) -> str | None:
        if run_id in RESERVED_NAMES:
            raise ValueError(f"{run_id!r} has a meaning of its own beside the runs: give another name")
        return run_id
