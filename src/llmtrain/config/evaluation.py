"""`evaluation`: what a model is asked, how it answers, and what its answers are measured by."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmtrain.config.base import Section, opt

AUTO_BASELINE = "auto"
LAST_PUBLISHED = "last-published"


class EvaluationConfig(Section):
    """For `eval`, and for what a model is asked while it trains."""

    data: str | list[str] = opt(
        [], "Files of prompts with completions, or of messages, that a model is asked: a path, or a list of them."
    )
    tasks: list[str] = opt(
        [],
        "Standard benchmarks to measure in place of data: names of lm-evaluation-harness, or YAML files of its kind "
        "(pip install 'llmtrain[eval]').",
    )
    num_fewshot: int | None = opt(None, "Examples before each question of a task; its own number when not given.", ge=0)
    metrics: list[str] = opt(
        ["exact_match", "jaccard", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"],
        "What answers are measured by; also functions of your own, my_pkg.metrics:length_ratio, which are called with "
        "(prediction, expected).",
        min_length=1,
    )
    ignore_case: bool = opt(False, "exact_match takes upper and lower case for the same.")
    max_samples: int | None = opt(None, "Only the first rows of each file; all when not given.", ge=1)
    max_new_tokens: int = opt(256, "The longest answer, in tokens.", ge=1)
    temperature: float = opt(0.0, "0 takes the likeliest token each time.", ge=0)
    top_p: float | None = opt(None, "Sample from the fewest likeliest tokens that have this share.", gt=0, le=1)
    batch_size: int = opt(16, "Prompts that are answered at a time; the answers stay the same.", ge=1)
    chat: bool | None = opt(
        None,
        "Whether a prompt is put through the chat template as a user's turn; as the model was tuned when not given.",
    )
    subject: Literal["model", "base"] = opt("model", "base: measure the model that MODEL was tuned from.")
    baseline: str | None = opt(
        AUTO_BASELINE,
        "The MODEL to compare with, row by row. auto: the one that MODEL was tuned from, if any; last-published: what "
        "publish accepted last; null: none.",
        min_length=1,
    )
    resamples: int = opt(1000, "Bootstrap samples for the intervals of differences.", ge=100)
    contamination: bool = opt(True, "Look for the rows among those that the run was trained on.")
    every_steps: int | None = opt(
        None,
        "Ask a model while it trains, every so many steps and at the end; the figures are eval/rougeL and so on.",
        ge=1,
    )
    train_samples: int = opt(64, "Rows that a model is asked while it trains, drawn from all files.", ge=1)

    @property
    def files(self) -> list[str]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def figures(self) -> list[str]:
        """What the figures of a model in training are called."""
        return [figure_name(metric) for metric in self.metrics] if self.every_steps is not None else []

    @model_validator(mode="after")
    def _agrees(self) -> EvaluationConfig:
        if self.every_steps is not None and not self.files:
            raise ValueError("every_steps asks rows of evaluation.data, which names none: name a file, or remove it")
        if len(set(self.figures)) < len(self.figures):
            raise ValueError(f"metrics of one name would be one figure ({', '.join(self.figures)}): rename a function")
        return self


def figure_name(metric: str) -> str:
    """What a metric is called among a run's figures: eval/rougeL; of my_pkg.metrics:length_ratio eval/length_ratio."""
    return f"eval/{metric.rpartition(':')[2]}"
