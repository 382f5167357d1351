"""`run`, `tracking`, `logging` and `output`: who the run is, what it tells, where it writes."""

from __future__ import annotations

from typing import Literal

from llmtrain.config.base import Section, opt


class RunConfig(Section):
    name: str = opt("run", "A name for people; its slug is part of the run id.", min_length=1)
    seed: int = opt(1337, "Seeds everything.", ge=0, lt=2**63)
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps.", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    deterministic: bool = opt(False, "Deterministic algorithms on GPUs too; on a CPU they are always on.")
    notes: str | None = opt(None, "Free text, kept in meta.json.")
    tags: list[str] = opt([], "Free labels, kept in meta.json.")


class TensorBoardConfig(Section):
    enabled: bool = opt(True, "Write event files to <run>/tensorboard.")


class TrackingConfig(Section):
    tensorboard: TensorBoardConfig = TensorBoardConfig()


class LoggingConfig(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = opt("INFO", "How much is said.")
    json_output: bool = opt(False, "One JSON object a line instead of text.")
    log_to_file: bool = opt(True, "Also write to <run>/logs/<file_name>.")
    file_name: str = opt("train.log", "Name of the log file.", pattern=r"^[^/]+$")
    log_batches: Literal["first-last", "all", "none"] = opt("first-last", "Which batches DEBUG describes.")


class OutputConfig(Section):
    root_dir: str = opt("runs", "Folder of all runs.")
    run_id: str | None = opt(
        None,
        "Name of the run's folder; made from time, git and name when not given.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
