"""The whole config. One section a file; this one puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llmtrain.config.base import Section, opt
from llmtrain.config.data import DataConfig, PrepareConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.evaluation import EvaluationConfig
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.model import DecoderConfig
from llmtrain.config.publishing import PublishConfig
from llmtrain.config.running import LoggingConfig, OutputConfig, RunConfig, TrackingConfig
from llmtrain.config.training import DistributedConfig, OptimizerConfig, SchedulerConfig, TrainerConfig

VALIDATION_FIGURES = ("val/loss", "val/perplexity", "val/bits_per_byte")

ModelConfig = Annotated[DecoderConfig | HuggingFaceConfig, Field(discriminator="name")]


class Config(Section):
    """A run, from raw text to a trained model."""

    schema_version: Literal[1] = opt(1, "Version of this schema.")
    run: RunConfig = RunConfig()
    model: ModelConfig = DecoderConfig()
    data: DataConfig = Field(description="Which tokens the run reads, by `name`.")
    prepare: PrepareConfig | None = opt(None, "How missing shards are made.")
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig = OutputConfig()
    publish: PublishConfig | None = opt(
        None, "Publish the model when the run is finished: where, and what its card says."
    )

    @model_validator(mode="before")
    @classmethod
    def _model_is_a_decoder_unless_named(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), dict) and "name" not in values["model"]:
            return {**values, "model": {"name": "decoder", **values["model"]}}
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        model = self.model
        if isinstance(model, DecoderConfig) and model.knows_max_seq_len and self.data.seq_len > model.max_seq_len:
            raise ValueError(
                f"data.seq_len {self.data.seq_len} is over model.max_seq_len {model.max_seq_len}: "
                "lower the first or raise the second"
            )
        if self.distributed.strategy == "fsdp_tp":
            self._refuse_to_ask_split()
        _check_figures(self.trainer, self.evaluation)
        return self

    def _refuse_to_ask_split(self) -> None:
        asking: dict[str, tuple[object, str]] = {
            "tracking.samples.prompts": (self.tracking.samples.prompts, "generate"),
            "evaluation.every_steps": (self.evaluation.every_steps, "eval"),
        }
        for key, (value, verb) in asking.items():
            if value:
                raise ValueError(
                    f"{key} asks the model for text, and with distributed.strategy fsdp_tp each process has a part of "
                    f"its heads: remove the key and ask a checkpoint with `llmtrain {verb}`, or take strategy fsdp"
                )

    def decoder(self, *, wanted_by: str) -> DecoderConfig:
        """`model`, where it is the decoder that is built here. Raises ConfigError where it is another."""
        if not isinstance(self.model, DecoderConfig):
            raise ConfigError(f"{wanted_by} knows model.name: decoder alone, and this config's is {self.model.name}")
        return self.model


def _check_figures(trainer: TrainerConfig, evaluation: EvaluationConfig) -> None:
    """What decides about checkpoints and the end has to be measured."""
    known = (*VALIDATION_FIGURES, *evaluation.figures)
    stopping = trainer.early_stopping.metric if trainer.early_stopping else None
    for key, name in (("trainer.keep_best", trainer.keep_best), ("trainer.early_stopping.metric", stopping)):
        if name is not None and name not in known:
            hint = ""
            if name.startswith("eval/") and evaluation.every_steps is None:
                hint = "; figures of eval/ are measured with evaluation.every_steps"
            raise ValueError(f"{key} is {name!r}, but it should be one of {', '.join(known)}{hint}")
