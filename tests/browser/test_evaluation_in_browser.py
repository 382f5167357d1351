"""The page of an evaluation in a real browser: it is no wider than the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.evaluation.metrics import BUILT_IN
from llmtrain.reports.evaluation_page import report_page
from tests.support.browser import Visit
from tests.support.planted import planted_evaluation

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("width", [1200, 600])
def test_the_page_is_as_wide_as_the_window(visit: Visit, tmp_path: Path, width: int) -> None:
    assert EvaluationConfig().metrics == list(BUILT_IN)
    scores = dict.fromkeys(["loss", "perplexity", "bits_per_byte", *BUILT_IN], 123.4)
    compared = {"base": 123.4, "tuned": 12.34, "difference": -11.06, "low": -12.34, "high": -10.12, "verdict": "better"}
    compared |= {"wins": 1030, "losses": 0, "ties": 17}
    document: dict[str, Any] = planted_evaluation(
        "runs/20261121-083912-15083ae-quickstart/checkpoints/step_000450/model"
    )
    files = {name: {"rows": 1000, "scores": scores} for name in ("test.jsonl", "adversarial.jsonl")}
    document |= {"scores": scores, "files": files, "comparison": dict.fromkeys(scores, compared)}
    document["contamination"] |= {"scores_with": scores, "scores_without": scores}
    side = {"prediction": "", "scores": scores}
    row = {"source": "test.jsonl:1", "prompt": "Why?", "expected": "So.", **side, "baseline": side, "change": "same"}
    (tmp_path / "page.html").write_text(report_page(document, [row]))
    visit.page.set_viewport_size({"width": width, "height": 900})
    visit.page.goto((tmp_path / "page.html").as_uri())
    assert visit.page.evaluate("document.documentElement.scrollWidth") == width
    if width == 1200:
        assert visit.page.evaluate("[...document.querySelectorAll('.scroll')].every((box) => box.scrollWidth <= 1168)")
    assert visit.complaints == []
