"""The full config. One section a file; this one puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from llmtrain.config.sections.base import IMPORT_PATH, Section, opt, variant_of_section
from llmtrain.config.sections.data import DataConfig, PrepareConfig
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.kubernetes import KubernetesConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.config.sections.publishing import PublishConfig
from llmtrain.config.sections.remote import RemoteConfig
from llmtrain.config.sections.running import LoggingConfig, OutputConfig, RunConfig, TrackingConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, SchedulerConfig, TrainerConfig
from llmtrain.errors import ConfigError

VALIDATION_METRICS = ("val/loss", "val/perplexity", "val/bits_per_byte")

ModelConfig = Annotated[
    Annotated[DecoderConfig, Tag("decoder")]
    | Annotated[HuggingFaceConfig, Tag("huggingface")]
    | Annotated[OwnModelConfig, Tag(IMPORT_PATH)],
    Field(discriminator=Discriminator(variant_of_section)),
]


class Config(Section):
    """A run, from raw text to a trained model."""

    schema_version: Literal[1] = opt(1, "Version of this schema.")
    run: RunConfig = RunConfig()
    model: ModelConfig = DecoderConfig()
    data: DataConfig = Field(description="Which tokens the run reads, by `name`.")
    prepare: PrepareConfig | None = opt(None, "How missing token shards are made.")
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    distributed: DistributedConfig = DistributedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    logging: LoggingConfig = LoggingConfig()
    output: OutputConfig = OutputConfig()
    remote: RemoteConfig = RemoteConfig()
    publish: PublishConfig | None = opt(
        None, "Publish the model when the run is finished: where, and what its card says."
    )
    kubernetes: KubernetesConfig | None = opt(None, "The pods of `launch k8s`.")

    @model_validator(mode="before")
    @classmethod
    def _model_is_a_decoder_unless_named(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("model"), dict) and values["model"].get("name") is None:
            return {**values, "model": {**values["model"], "name": "decoder"}}
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
            self._reject_questions_to_split_model()
        if self.trainer.in_float8:
            self._reject_what_float8_cannot()
        _check_metrics(self.trainer, self.evaluation)
        self._reject_fraction_of_no_length()
        return self

    def _reject_fraction_of_no_length(self) -> None:
        trainer, mixture = self.trainer, getattr(self.data, "mixture", None)
        limits = (trainer.max_steps, trainer.max_epochs, trainer.max_tokens, trainer.max_minutes)
        if mixture and any(stage.from_fraction for stage in mixture.stages) and not any(limits):
            raise ValueError(
                "data.mixture.stages has from_fraction, a share of the run's steps, but trainer does not limit these: "
                "give trainer.max_steps, max_epochs, max_tokens or max_minutes"
            )

    def _reject_what_float8_cannot(self) -> None:
        quantization = getattr(self.model, "quantization", "none")
        if quantization != "none":
            raise ValueError(
                f"trainer.precision is fp8-mixed, but model.quantization is {quantization}, and weights in 4 or 8 bits "
                "are multiplied in bfloat16: set model.quantization=none, or trainer.precision=bf16-mixed"
            )
        if self.distributed.strategy == "fsdp_tp":
            raise ValueError(
                "trainer.precision is fp8-mixed, but distributed.strategy is fsdp_tp, and torchao scales whole "
                "matrices: set strategy to fsdp, or trainer.precision to bf16-mixed"
            )

    def _reject_questions_to_split_model(self) -> None:
        asking: dict[str, tuple[object, str]] = {
            "tracking.samples.prompts": (self.tracking.samples.prompts, "generate"),
            "evaluation.every_steps": (self.evaluation.every_steps, "eval"),
        }
        for key, (value, verb) in asking.items():
            if value:
                raise ValueError(
                    f"{key} asks the model for text, and with distributed.strategy fsdp_tp each process has a part of "
                    f"its heads: remove the key and ask a checkpoint with `llmtrain {verb}`, or set strategy fsdp"
                )

    def decoder(self, *, wanted_by: str) -> DecoderConfig:
        """Return `model` where it is a decoder. Raises ConfigError for another kind, which `wanted_by` cannot use."""
        if not isinstance(self.model, DecoderConfig):
            raise ConfigError(
                f"{wanted_by} works with model.name: decoder alone, but this config's is {self.model.name}"
            )
        return self.model


def _check_metrics(trainer: TrainerConfig, evaluation: EvaluationConfig) -> None:
    """Raise ValueError for a metric of trainer that the run does not measure."""
    known = (*VALIDATION_METRICS, *evaluation.training_metrics)
    stopping = trainer.early_stopping.metric if trainer.early_stopping else None
    for key, name in (("trainer.keep_best", trainer.keep_best), ("trainer.early_stopping.metric", stopping)):
        if name is not None and name not in known:
            hint = ""
            if name.startswith("eval/") and evaluation.every_steps is None:
                hint = "; metrics of eval/ are measured with evaluation.every_steps"
            raise ValueError(f"{key} is {name!r}, but it should be one of {', '.join(known)}{hint}")
