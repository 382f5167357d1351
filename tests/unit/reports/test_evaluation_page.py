from __future__ import annotations

import base64
import hashlib
import html
import re
from typing import Any

from llmtrain.reports.evaluation_page import MAX_ROWS, report_page

EVIL = "</pre><script>alert('x')</script>"


def row(number: int, **changes: Any) -> dict[str, Any]:
    texts = {"prompt": EVIL, "expected": f"e{number}", "prediction": f"p{number}"}
    return {"source": f"rows.jsonl:{number}", **texts, "scores": {"loss": 1.25, "bleu": None}, **changes}


def document(**changes: Any) -> dict[str, Any]:
    """The metrics.json of an evaluation without a baseline."""
    scores = {"loss": 1.23456, "bleu": None}
    return {
        "model": EVIL,
        "rows": 1234,
        "scores": scores,
        "files": {EVIL: {"rows": 1, "scores": scores}},
        "comparison": {},
        "definitions": {"loss": "nats <b>"},
        "signatures": {"loss": EVIL},
        "settings": {"prompt": EVIL},
        **changes,
    }


def test_text_is_escaped_and_only_the_page_s_own_script_may_run() -> None:
    page = report_page(document(), [row(1)])
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert found
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert html.unescape(found[1]).startswith(f"default-src 'none'; script-src 'sha256-{digest}'; ")
    assert "alert" not in script
    assert (
        page.count(html.escape(EVIL).replace("&#x27;", "&#39;")) == 6
    )  # title, heading, file, signature, settings, prompt
    assert "<td>all</td><td>1,234</td><td>1.235</td><td>–</td></tr>" in page
    assert "Against the baseline" not in page
    assert 'value="worse"' not in page


def test_a_baseline_stands_beside_the_model() -> None:
    difference = {"base": 0.5, "tuned": 0.75, "difference": 0.25, "low": -0.125, "high": 0.625}
    found = {**difference, "wins": 1000, "losses": 2, "ties": 0, "verdict": "better"}
    contamination = {
        "checked": True,
        "rows": 3,
        "exact": 2,
        "scores_with": {"bleu": 1.0},
        "scores_without": {"bleu": 0.5},
    }
    changed = row(1, baseline={"prediction": "before"}, change="worse", trained_on=True)
    page = report_page(
        document(baseline="base", comparison={"bleu": found}, contamination=contamination),
        [changed, row(2, baseline={"prediction": "b2"})],
    )
    assert "against base" in page
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page[page.index("<h2>Against") :])
    assert cells[:9] == ["bleu", "0.5", "0.75", "+0.25", "-0.125 … +0.625", "1,000", "2", "0", "better"]
    assert cells[9:] == ["all rows", "1", "without them", "0.5"]
    assert "3 rows stand among the training rows (2 word for word)." in page
    assert '<div class="row worse"><small>rows.jsonl:1 · among the training rows</small>' in page
    assert '<div class="row "><small>rows.jsonl:2</small>' in page
    assert "<small>baseline</small><pre>before</pre>" in page


def test_an_empty_answer_is_marked() -> None:
    page = report_page(
        document(baseline="base"), [row(1, prediction="", baseline={"prediction": " \n"}, change="same")]
    )
    assert page.count('</small><p class="quiet">(empty)</p></div>') == 2
    assert "<pre></pre>" not in page


def test_what_was_not_looked_for_is_said() -> None:
    page = report_page(document(contamination={"checked": False, "why": "nothing says <what>"}), [])
    assert "Not looked for: nothing says &lt;what&gt;." in page


def test_of_many_rows_those_that_changed_are_shown_in_their_order() -> None:
    rows = [row(number) for number in range(MAX_ROWS + 10)]
    rows[-1]["change"], rows[-3]["change"] = "better", "worse"
    page = report_page(document(), rows)
    shown = [int(number) for number in re.findall(r"rows\.jsonl:(\d+)", page)]
    assert shown == [*range(MAX_ROWS - 2), MAX_ROWS + 7, MAX_ROWS + 9]
    assert f"Rows (500 of {MAX_ROWS + 10}; predictions.jsonl has all)" in page
