"""`evaluation`: the rows that a model answers, how it answers them, and the metrics of its answers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from llmtrain.config.sections.base import Alternatives, Section, opt
from llmtrain.local_paths import ADDRESS, LOCAL

AUTO_BASELINE = "auto"
LAST_PUBLISHED = "last-published"


class EvaluationConfig(Section):
    """Settings of `eval`, and of the evaluation of answers while a model trains."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("data", "tasks"), may_agree=True),)

    data: str | list[str] = opt(
        [],
        "Files of prompts with completions, or of conversations, that a model is asked: a path or address, or a list.",
        json_schema_extra=ADDRESS,
    )
    tasks: list[str] = opt(
        [],
        "Standard benchmarks to run in place of data: names of lm-evaluation-harness, or YAML files of its kind "
        "(the extra eval).",
        json_schema_extra=LOCAL,
    )
    num_fewshot: int | None = opt(
        None, "Examples before each question of a task; the task's own number when not given.", ge=0
    )
    metrics: list[str] = opt(
        ["exact_match", "jaccard", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"],
        "Metrics of the answers; also functions of your own, my_pkg.metrics:length_ratio, which are called with "
        "(prediction, expected).",
        min_length=1,
    )
    ignore_case: bool = opt(False, "exact_match ignores the difference between upper and lower case.")
    bleu_tokenizer: Literal["auto", "13a", "zh", "char", "intl", "none", "ja-mecab", "ko-mecab"] = opt(
        "auto",
        "sacreBLEU's tokenizer for all rows. auto: by a row's expected text, zh for Chinese, char for other scripts "
        "without spaces, else 13a. ja-mecab and ko-mecab need sacreBLEU's extras ja and ko.",
    )
    max_samples: int | None = opt(
        None, "Number of rows of each file that are asked, the first ones; all when not given.", ge=1
    )
    max_new_tokens: int = opt(256, "The longest answer, in tokens.", ge=1)
    temperature: float = opt(0.0, "Sampling temperature; 0 takes the likeliest token each time.", ge=0)
    top_p: float | None = opt(
        None, "Sample from the fewest likeliest tokens that have this probability together.", gt=0, le=1
    )
    batch_size: int = opt(16, "Prompts that are answered at a time; the answers do not depend on it.", ge=1)
    chat: bool | None = opt(
        None,
        "Put a prompt through the chat template as a user's turn; as the model was tuned when not given.",
    )
    subject: Literal["model", "base"] = opt("model", "base evaluates the model that MODEL was tuned from.")
    baseline: str | None = opt(
        AUTO_BASELINE,
        "The MODEL to compare with, row by row. auto: the one that MODEL was tuned from, if any; last-published: the "
        "one that was published last; null: none.",
        min_length=1,
        json_schema_extra=LOCAL,
    )
    resamples: int = opt(1000, "Bootstrap samples for the confidence intervals of differences.", ge=100)
    contamination: bool = opt(True, "Look for evaluation rows among the training rows.")
    every_steps: int | None = opt(
        None,
        "Ask the model every N steps of training, and at the end; the metrics are eval/rougeL and so on.",
        ge=1,
    )
    train_samples: int = opt(64, "Rows of such an evaluation, drawn from all files.", ge=1)

    @property
    def files(self) -> list[str]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def metric_options(self) -> dict[str, Any]:
        """Options of the metrics that ship."""
        return {"ignore_case": self.ignore_case, "bleu_tokenizer": self.bleu_tokenizer}

    @property
    def training_metrics(self) -> list[str]:
        """Names of the metrics that a run measures while it trains."""
        return [name_in_training(metric) for metric in self.metrics] if self.every_steps is not None else []

    @model_validator(mode="after")
    def _agrees(self) -> EvaluationConfig:
        if self.every_steps is not None and not self.files:
            raise ValueError("every_steps asks rows of evaluation.data, which names none: name a file, or remove it")
        names = self.training_metrics
        if len(set(names)) < len(names):
            raise ValueError(f"two metrics have the same name ({', '.join(names)}): rename a function")
        return self


def name_in_training(metric: str) -> str:
    """Return a metric's name among those of a run: eval/rougeL; eval/length_ratio for my_pkg.metrics:length_ratio."""
    return f"eval/{metric.rpartition(':')[2]}"
