"""Statistics of answers, and their results: scores, the comparison, the lines of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.evaluation.answers import TOO_LONG, Answer
from llmtrain.evaluation.comparison import TIE, compare, row_gains
from llmtrain.evaluation.contamination import Overlap
from llmtrain.evaluation.metrics import metrics_named
from llmtrain.evaluation.questions import Question, short_names
from llmtrain.evaluation.scores import Measure, Statistics, measures_of, row_statistics, scores

MAX_NAMED = 20
"""Largest number of rows that are listed as worse than the baseline's, for each metric."""
_TOKEN_METRICS = ("loss", "perplexity")
_LOSS_METRICS = (*_TOKEN_METRICS, "bits_per_byte")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Answers and statistics of a model, and of its baseline if there is one."""

    questions: Sequence[Question]
    answers: Sequence[Answer]
    baseline_answers: Sequence[Answer] | None
    measures: Sequence[Measure]
    statistics: Mapping[str, Statistics]
    baseline: Mapping[str, Statistics] | None
    precisions: Sequence[str]
    """Precision of the model, and that of its baseline."""
    seed: int
    num_resamples: int

    def document(self) -> dict[str, Any]:
        """Return the scores and the comparison of all rows and of each file, for metrics.json."""
        names = short_names(question.file for question in self.questions)
        all_rows = self._part(None)
        files = {
            name: self._part(np.array([question.file == path for question in self.questions]))
            for path, name in names.items()
        }
        return {
            "data": ", ".join(names.values()),
            **dict(zip(("precision", "baseline_precision"), self.precisions, strict=False)),
            "tokens": int(self.statistics["loss"][:, 1].sum()),
            **{name: all_rows["scores"][name] for name in _LOSS_METRICS},
            **all_rows,
            "files": files,
            "got_worse": self._got_worse(),
            "prompts_too_long": sum(answer.ended_by == TOO_LONG for answer in self.answers),
            "rows_without_loss": int((self.statistics["loss"][:, 1] == 0).sum()),
            "empty_predictions": sum(not answer.prediction.strip() for answer in self.answers),
            "rows_not_defined": self._rows_not_defined(),
            "definitions": {measure.name: self._definition(measure) for measure in self.measures},
            "signatures": {measure.name: measure.signature for measure in self.measures if measure.signature},
        }

    def rows(self, overlaps: Sequence[Overlap]) -> list[dict[str, Any]]:
        """Return lines for predictions.jsonl, in the order of the questions.

        `change` is by the first metric of generated text that differs between the models in any row, else by the loss.
        """
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

    def _definition(self, measure: Measure) -> str:
        if measure.name not in _LOSS_METRICS:
            return measure.definition
        names = list(dict.fromkeys(self.precisions))
        baseline = "" if len(names) == 1 else f", of the baseline in {names[1]}"
        return f"{measure.definition}; computed in {names[0]}{baseline}"

    def _part(self, rows: NDArray[np.bool_] | None) -> dict[str, Any]:
        """Return the metrics of all rows, or of the chosen ones."""
        found: dict[str, Any] = {
            "rows": len(self.questions) if rows is None else int(rows.sum()),
            "scores": scores(self.measures, self.statistics, rows),
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
        found["baseline_scores"] = scores(self.measures, self.baseline, rows)
        found["comparison"] = {name: {**asdict(one), "verdict": one.verdict} for name, one in differences.items()}
        return found

    def _comparable(self) -> list[Measure]:
        """Return the measures that compare the two models; without those per token if their tokenizers differ."""
        assert self.baseline is not None
        same_tokens = np.array_equal(self.statistics["loss"][:, 1], self.baseline["loss"][:, 1])
        return [measure for measure in self.measures if same_tokens or measure.name not in _TOKEN_METRICS]

    def _rows_not_defined(self) -> dict[str, int]:
        """Return by metric the number of rows for which it is not defined; only metrics with any."""
        written = [measure for measure in self.measures if measure.higher_is_better]
        found = {
            measure.name: sum(np.isnan(measure.row_score(row)) for row in self.statistics[measure.name].tolist())
            for measure in written
        }
        return {name: int(count) for name, count in found.items() if count}

    def _got_worse(self) -> dict[str, list[str]]:
        """Return by metric the rows on which the baseline is better, the worst first."""
        if self.baseline is None:
            return {}
        found = {}
        for measure in self._comparable():
            gains = row_gains(measure, self.statistics[measure.name], self.baseline[measure.name])
            worst = [int(row) for row in np.argsort(gains, kind="stable") if gains[row] < -TIE]
            found[measure.name] = [self.questions[row].source for row in worst[:MAX_NAMED]]
        return found

    def _gains(self) -> NDArray[np.float64]:
        if self.baseline is not None:
            written = [measure for measure in self.measures if measure.higher_is_better]
            for measure in [*written, *(measure for measure in self.measures if measure.name == "bits_per_byte")]:
                gains = row_gains(measure, self.statistics[measure.name], self.baseline[measure.name])
                if gains.any():
                    return gains
        return np.zeros(len(self.questions))

    def _row_scores(self, statistics: Mapping[str, Statistics], row: int) -> dict[str, float | None]:
        values = {measure.name: measure.row_score(statistics[measure.name][row].tolist()) for measure in self.measures}
        return {name: value if np.isfinite(value) else None for name, value in values.items()}


def measure(
    questions: Sequence[Question],
    answers: Sequence[Answer],
    baseline_answers: Sequence[Answer] | None,
    settings: EvaluationConfig,
    *,
    precisions: Sequence[str],
    seed: int,
) -> Measured:
    """Compute the statistics of every row, for the model and the baseline, which computed in the `precisions`.

    A row that is too long for the context of one of them has no loss for either. Raises ConfigError if a metric of the
    user's own returns no number.
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
        written = row_statistics(pairs, settings.metrics, **settings.metric_options)
        return {**dict.fromkeys(_LOSS_METRICS, loss), **written}

    expected = [question.expected for question in questions]
    metrics = metrics_named(settings.metrics, **settings.metric_options, expected=expected)
    return Measured(
        questions=questions,
        answers=answers,
        baseline_answers=baseline_answers,
        measures=measures_of(metrics, with_loss=True),
        statistics=statistics(answers),
        baseline=None if baseline_answers is None else statistics(baseline_answers),
        precisions=precisions,
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
