"""Text from runs, rows and models is text in every page and on every terminal: no markup, no escape codes."""

from __future__ import annotations

import json
import logging
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient

from llmtrain.cli.app import run
from llmtrain.cli.evaluate import _blocks
from llmtrain.cli.output import json_document, printable
from llmtrain.config.sections.running import LoggingConfig
from llmtrain.errors import RunError
from llmtrain.reports.bigram_picture import bigram_picture
from llmtrain.reports.block_page import block_page
from llmtrain.reports.blocks import Bars, Lines, Passage, Picture, Span, Table, Values
from llmtrain.reports.chart import columns, points, shares
from llmtrain.reports.document import page_document
from llmtrain.reports.evaluation_page import report_page
from llmtrain.reports.html import plotly_script
from llmtrain.reports.loss_picture import loss_picture
from llmtrain.reports.run_page import live_page, standalone_page
from llmtrain.reports.web_app import make_app
from llmtrain.screen import CONTROL
from llmtrain.tracking.live_view import LatestMetrics
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.terminal import set_live_bar
from tests.support.planted import HARMLESS, PLANTED, planted_evaluation, planted_row, planted_run


def assert_plain(text: str) -> None:
    """Nothing in it is obeyed by a terminal, and the text itself is there."""
    found = CONTROL.search(text)
    assert found is None, text[max(0, found.start() - 60) : found.end() + 60]
    assert "\\x1b[31mred" in text


def structure(page: str) -> list[tuple[str, list[str]]]:
    """The tags of a page with the names of their attributes, and the texts that run or link."""
    found: list[tuple[str, list[str]]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            found.append((tag, [name for name, _ in attributes]))

        def handle_endtag(self, tag: str) -> None:
            found.append((f"/{tag}", []))

    Reader().feed(page)
    return found


PAGES = {
    "evaluation": lambda text: report_page(planted_evaluation(text), [planted_row(text)]),
    "blocks": lambda text: block_page(title=text, blocks=every_block(text)),
    "live": lambda text: live_page(title=text, kind="runs"),
    "shares": lambda text: shares([(text, 0.5), ("x", 0.25)], title=text),
    "columns": lambda text: columns([(text, 3)], title=text, x_title=text, y_title=text),
    "points": lambda text: points([(1, 2, text)], title=text, x_title=text, y_title=text),
    "bigrams": lambda text: bigram_picture(drawn_bigrams(text), title=text),
    "picture": lambda text: loss_picture({"train/loss": {"step": [1, 2], "value": [3, 2]}}, title=text) or "",
}


def drawn_bigrams(text: str) -> dict[str, Any]:
    token = {"id": 1, "token": text, "transitions": 3, "x": 0.0, "y": 0.0}
    edges = [{"from_id": a, "to_id": b, "from": text, "to": text, "count": 3} for a, b in ((1, 1), (1, 2))]
    return {"tokens": [token, {**token, "id": 2, "x": 1.0}], "edges": edges}


def every_block(text: str) -> list[Any]:
    return [
        Values([(text, text)]),
        Table(text, ["", text], [[text, text]]),
        Bars(text, [(text, 1)], text),
        *(Lines(text, [text], kind) for kind in ("note", "warning", "fault")),
        Picture(text, shares([(text, 0.5)], title=text), Bars(text, [(text, 1)], text), text),
        Passage(text, [(text, [Span(text, supervised=True), Span(text, control=True)])]),
    ]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_the_same_elements_whatever_the_text_is(page: str) -> None:
    made = PAGES[page](PLANTED)
    assert structure(made) == structure(PAGES[page](HARMLESS))
    assert CONTROL.search(made) is None


def test_the_report_of_a_run_has_the_same_elements_and_its_data_are_the_text(tmp_path: Path) -> None:
    pages: list[str] = []
    for text in (PLANTED, HARMLESS):
        document = page_document([planted_run(tmp_path / str(len(pages)), "a", text)])
        pages.append(standalone_page(document, title=text).replace(plotly_script(), ""))
    assert structure(pages[0]) == structure(pages[1])
    assert CONTROL.search(pages[0]) is None
    data = pages[0].partition('<script type="application/json" id="document">')[2].partition("</script>")[0]
    (shown,) = json.loads(data)["runs"]
    assert (shown["name"], shown["notes"], shown["samples"][0]["completion"]) == (PLANTED, PLANTED, PLANTED)


def test_the_live_pages_hold_no_text_of_runs_but_their_titles(tmp_path: Path) -> None:
    name = planted_run(tmp_path, "a", PLANTED).name
    client = TestClient(make_app(tmp_path, host="127.0.0.1"), base_url="http://127.0.0.1")
    page = client.get("/runs", params={"run": name})
    assert structure(page.text) == structure(live_page(title="x", kind="runs"))
    assert CONTROL.search(page.text) is None
    for path in ("/api/runs", "/api/page"):
        answer = client.get(path, params={"run": name})
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["runs"][0]["name"] == PLANTED
    missing = client.get("/runs", params={"run": PLANTED})
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/json")


@pytest.mark.parametrize("colour", [False, True])
def test_blocks_on_a_terminal_are_plain(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1" if colour else "")
    for width in (60, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        text = printable(every_block(PLANTED))
        for own in ("\x1b[32m", "\x1b[36m", "\x1b[1;31m", "\x1b[1;33m", "\x1b[0m"):
            text = text.replace(own, "")
        assert_plain(text)


def test_commands_print_what_runs_hold_as_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (planted_run(tmp_path, run_id, PLANTED) for run_id in "ab")
    (first / "summary.json").write_text(PLANTED)
    for argv in (
        ["runs"],
        ["runs", first.name],
        ["runs", first.name, second.name],
        ["report", first.name, "-o", str(tmp_path / f"{first.name}.html")],
        ["runs", "nobody" + PLANTED.replace("/", "∕")],
        ["runs", "--state", PLANTED],
        ["runs", "rm", second.name],
        [PLANTED],
        ["train", "quickstart", f"run.nme={PLANTED}"],
        ["train", "quickstart", f"optimizer.name={PLANTED}"],
    ):
        run([*argv, "--root-dir", str(tmp_path)] if argv[0] in ("runs", "report") else argv)
        assert_plain("".join(capsys.readouterr()))


def test_rows_are_shown_as_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": PLANTED, "completion": PLANTED}, {"promt": PLANTED, PLANTED: PLANTED}, {"prompt": PLANTED}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "page.html"
    assert run(["inspect", str(rows), "--html", str(page)]) == 2
    assert_plain("".join(capsys.readouterr()))
    assert CONTROL.search(page.read_text()) is None
    run(["convert", str(rows), str(tmp_path / "out.jsonl")])
    assert_plain("".join(capsys.readouterr()))


def test_an_evaluation_is_printed_as_plain_text() -> None:
    assert_plain(printable(list(_blocks(planted_evaluation(PLANTED)))))


def test_what_a_model_writes_is_printed_as_plain_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    verb = ModuleType("llmtrain.verbs.generate")

    def converse(model: str, *, say: Any, **_: Any) -> list[Any]:
        say(PLANTED)
        return []

    result = {"prompt": PLANTED, "completion": PLANTED}
    vars(verb).update(generate=lambda *_, **__: [result], converse=converse)
    monkeypatch.setitem(sys.modules, "llmtrain.verbs.generate", verb)
    for argv in (["--prompt", "x"], ["--interactive"]):
        assert run(["generate", "m", *argv]) == 0
        assert_plain("".join(capsys.readouterr()))
    assert run(["generate", "m", "--prompt", "x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [result]


def test_a_json_document_is_the_text_without_control_characters() -> None:
    text = json_document({"name": PLANTED, PLANTED: 1})
    assert json.loads(text) == {"name": PLANTED, PLANTED: 1}
    assert CONTROL.search(text) is None


def test_errors_and_tracebacks_are_plain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (RunError(PLANTED), KeyError(PLANTED), RuntimeError(PLANTED)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setitem(sys.modules, "llmtrain.verbs.train", SimpleNamespace(train=fail))
        run(["train", "quickstart"])
        text = "".join(capsys.readouterr())
        assert CONTROL.search(text) is None
        assert "[31mred" in text


def test_log_lines_and_the_note_below_the_bar_are_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latest = LatestMetrics()
    set_live_bar(latest.warned)
    try:
        setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
        logging.getLogger("llmtrain.train").warning("%s", PLANTED)
        setup_logging(LoggingConfig(json_output=True, file_name="train.jsonl"), run_folder=tmp_path, rank=0)
        logging.getLogger("llmtrain.train").warning("%s", PLANTED, extra={"row": PLANTED})
    finally:
        set_live_bar(None)
    plain, as_json = capsys.readouterr().err.split("\n{", 1)
    assert_plain(plain)
    assert_plain(latest.note())
    assert_plain((tmp_path / "logs" / "train.log").read_text())
    assert CONTROL.search(as_json) is None
    assert json.loads("{" + as_json)["row"] == PLANTED
