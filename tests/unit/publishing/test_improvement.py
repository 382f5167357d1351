"""Whether a comparison shows a gain, and what is said of a metric that it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.publishing.improvement import Evaluation, check_improvement


def test_a_metric_by_its_older_name_is_answered_with_its_name_today() -> None:
    evaluation = Evaluation(Path("metrics.json"), {"comparison": {"jaccard": {"verdict": "better"}}})
    check_improvement(evaluation, "jaccard", how="llmtrain eval")
    with pytest.raises(ConfigError, match=r"avg_jaccard_overlap is jaccard now; metrics\.json compares jaccard"):
        check_improvement(evaluation, "avg_jaccard_overlap", how="llmtrain eval")
