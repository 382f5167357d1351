"""Answers with their statistics, and what follows from them: scores, the comparison, the lines of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.evaluation import EvaluationConfig
from llmtrain.evaluation.comparison import TIE, compare, row_gains
from llmtrain.evaluation.contamination import Overlap
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.questions import Question, short_names
from llmtrain.evaluation.scores import Figure, Statistics, figures_of, row_statistics, scores
from llmtrain.recipes.evaluation.answers import TOO_LONG, Answer

MAX_NAMED = 20
"""Rows that are named of those that got worse."""
_OF_TOKENS = ("loss", "perplexity")
_LOSS_FIGURES = (*_OF_TOKENS, "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the rows of a model, and of its baseline if there is one, come to."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    baseline_answers: Sequence[Answer] | None
    figures: Sequence[Figure]
    statistics: Mapping[str, Statistics]
    baseline: Mapping[str, Statistics] | None
    seed: int
    num_resamples: int

    def document(self) -> dict[str, Any]:
        """Scores and comparison of all rows, and of each file."""
        names = short_names(question.file for question in self.questions)
        all_rows = self._part(None)
        files = {
            name: self._part(np.array([question.file == path for question in self.questions]))
            for path, name in names.items()
        }
        return {
            "data": ", ".join(names.values()),
            "tokens": int(self.statistics["loss"][:, 1].sum()),
            **{name: all_rows["scores"][name] for name in _LOSS_FIGURES},
            **all_rows,
            "files": files,
            "got_worse": self._got_worse(),
            "prompts_too_long": sum(answer.ended_by == TOO_LONG for answer in self.answers),
            "rows_without_loss": int((self.statistics["loss"][:, 1] == 0).sum()),
            "empty_predictions": sum(not answer.prediction.strip() for answer in self.answers),
            "definitions": {figure.name: figure.definition for figure in self.figures},
            "signatures": {figure.name: figure.signature for figure in self.figures if figure.signature},
        }

    def rows(self, overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
        """For predictions.jsonl, in the order of the questions. `change` is by the first figure that tells two rows
        apart, of those that more is better of, else by the loss."""
        trained_on = {overlap.question: f"{overlap.trained_on} ({overlap.kind})" for overlap in overlaps}
        gains = self._gains()
        found = []
        for row, (question, answer) in enumerate(zip(self.questions, self.answers, strict=True)):
            line = {
                "file": question.file,
                "source": question.source,
                "prompt": question.prompt,
                "expected": question.expected,
                **_side(answer, self._row_scores(self.statistics, row)),
            }
            if row in trained_on:
                line["trained_on"] = trained_on[row]
            if self.baseline is not None and self.baseline_answers is not None:
                line["baseline"] = _side(self.baseline_answers[row], self._row_scores(self.baseline, row))
                line["change"] = "better" if gains[row] > TIE else "worse" if gains[row] < -TIE else "same"
            found.append(line)
        return found

    def _part(self, rows: NDArray[np.bool_] | None) -> dict[str, Any]:
        """Of all rows, or of those chosen."""
        found: dict[str, Any] = {
            "rows": len(self.questions) if rows is None else int(rows.sum()),
            "scores": scores(self.figures, self.statistics, rows),
        }
        if self.baseline is None:
            return {**found, "comparison": {}}
        differences = compare(
            self._comparable(),
            self.statistics,
            self.baseline,
            seed=self.seed,
            num_resamples=self.num_resamples,
            rows=rows,
        )
        found["baseline_scores"] = scores(self.figures, self.baseline, rows)
        found["comparison"] = {name: {**asdict(one), "verdict": one.verdict} for name, one in differences.items()}
        return found

    def _comparable(self) -> list[Figure]:
        """Without the loss of a token where the two models' tokens are not the same; bits are, of bytes."""
        assert self.baseline is not None
        same_tokens = np.array_equal(self.statistics["loss"][:, 1], self.baseline["loss"][:, 1])
        return [figure for figure in self.figures if same_tokens or figure.name not in _OF_TOKENS]

    def _got_worse(self) -> dict[str, list[str]]:
        """By figure, the rows on which the baseline is better, the worst first."""
        if self.baseline is None:
            return {}
        found = {}
        for figure in self._comparable():
            gains = row_gains(figure, self.statistics[figure.name], self.baseline[figure.name])
            worst = [int(row) for row in np.argsort(gains, kind="stable") if gains[row] < -TIE]
            found[figure.name] = [self.questions[row].source for row in worst[:MAX_NAMED]]
        return found

    def _gains(self) -> NDArray[np.float64]:
        if self.baseline is not None:
            written = [figure for figure in self.figures if figure.higher_is_better]
            for figure in [*written, *(figure for figure in self.figures if figure.name == "bits_per_byte")]:
                gains = row_gains(figure, self.statistics[figure.name], self.baseline[figure.name])
                if gains.any():
                    return gains
        return np.zeros(len(self.questions))

    def _row_scores(self, statistics: Mapping[str, Statistics], row: int) -> dict[str, float | None]:
        values = {figure.name: figure.row_score(statistics[figure.name][row].tolist()) for figure in self.figures}
        return {name: value if np.isfinite(value) else None for name, value in values.items()}


def measure(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline_answers: Sequence[Answer] | None,
    settings: EvaluationConfig,
    *,
    seed: int,
) -> Measured:
    """The statistics of every row, for the model and the baseline.

    A row that is too long for the context of one of them has no loss on either side. Raises ConfigError for a metric
    of the user's own that gives no number.
    """
    sides = [answers] if baseline_answers is None else [answers, baseline_answers]
    has_loss = [all(side[row].loss_tokens for side in sides) for row in range(len(questions))]

    def statistics(of: Sequence[Answer]) -> dict[str, Statistics]:
        pairs = [(answer.prediction, question.expected) for answer, question in zip(of, questions, strict=True)]
        loss = np.array(
            [
                (answer.loss_sum, answer.loss_tokens, len(question.expected.encode())) if fits else (0, 0, 0)
                for answer, question, fits in zip(of, questions, has_loss, strict=True)
            ],
            np.float64,
        )
        written = row_statistics(pairs, settings.metrics, ignore_case=settings.ignore_case)
        return {**dict.fromkeys(_LOSS_FIGURES, loss), **written}

    metrics = metrics_named(settings.metrics, ignore_case=settings.ignore_case)
    return Measured(
        questions=questions,
        answers=answers,
        baseline_answers=baseline_answers,
        figures=figures_of(metrics, with_loss=True),
        statistics=statistics(answers),
        baseline=None if baseline_answers is None else statistics(baseline_answers),
        seed=seed,
        num_resamples=settings.resamples,
    )


def _side(answer: Answer, row_scores: Mapping[str, float | None]) -> dict[str, Any]:
    return {
        "prediction": answer.prediction,
        "ended_by": answer.ended_by,
        "tokens": answer.tokens,
        "scores": dict(row_scores),
    }
