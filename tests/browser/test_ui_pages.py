"""The live pages in a real browser, served by the program itself: list, comparison, a run that trains, the chat box."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from llmtrain.config.loading.load import load_config
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.runs.events import EventLog
from llmtrain.runs.folders import locked
from llmtrain.verbs.train import train
from tests.support.browser import Visit
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.recorded_run import metrics_line, recorded_run
from tests.support.tiny import tiny_config as tiny_decoder
from tests.support.tiny_run import tiny_config, write_config

pytestmark = pytest.mark.slow

PATIENCE_MS = 60_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def server(root: Path, visit: Visit) -> Iterator[str]:
    """The address of `llmtrain ui` over `root`; it ended well at Ctrl-C."""
    root.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "llmtrain", "ui", "--root", str(root), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        found = re.match(r"(http://127\.0\.0\.1:\d+)/  \(Ctrl-C ends\)\n", process.stderr.readline())
        assert found
        yield found[1]
        visit.page.goto("about:blank")  # a page that is open complains when its server is gone
        process.send_signal(signal.SIGINT)
        _, complaints = process.communicate(timeout=60)
        assert (process.returncode, complaints) == (0, "")
    finally:
        process.kill()


def test_the_list_is_filtered_sorted_and_leads_to_a_comparison(visit: Visit, root: Path, server: str) -> None:
    for name, lr, state in (("low", 0.001, "finished"), ("high", 0.002, "failed"), ("<i>odd", 0.003, "finished")):
        recorded_run(root, name, lr=lr, num_steps=int(lr * 1e5), state=state)
    page = visit.page
    page.goto(server)
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(3)
    expect(page.locator("tbody b").first).to_have_text(re.compile("-name$"))
    assert "<i>odd-name" in page.locator("tbody b").all_inner_texts()
    page.get_by_role("button", name="Steps", exact=True).click()
    assert page.locator("tbody td:nth-child(4)").all_inner_texts() == ["100", "200", "300"]
    page.locator("#filter").fill("HIGH")
    expect(rows).to_have_count(1)
    page.locator("#filter").fill("")
    page.get_by_role("button", name="failed", exact=True).click()
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="failed", exact=True).click()
    expect(page.locator("#compare")).to_be_disabled()
    for name in ("low", "high"):
        page.get_by_label(f"Compare {name}").check()
    page.locator("#compare").click()
    page.wait_for_selector(".plot .main-svg")
    assert page.locator("h1").inner_text() == "2 runs"
    assert page.locator("#chips button").all_inner_texts() == ["low", "high"]
    assert "optimizer.lr" in page.locator("#config").inner_text()
    assert all(url.startswith(server) for url in visit.requests)


def test_a_run_that_trains_is_followed_to_its_end(visit: Visit, root: Path, server: str) -> None:
    folder = recorded_run(root, "live", num_steps=100, state="killed")
    with locked(folder):
        page = visit.open(f"{server}/runs?run=live")
        badge, steps = page.locator(".head .badge"), page.locator("[data-metric=steps] b")
        expect(badge).to_have_text("running")
        expect(steps).to_have_text("100")
        page.get_by_role("navigation").get_by_text("Log y").click()
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(101, 121):
                file.write(json.dumps(metrics_line(step)) + "\n")
            file.write(json.dumps({"step": 120, "time": metrics_line(120)["time"], "val/loss": 1.75}) + "\n")
        expect(steps).to_have_text("120", timeout=PATIENCE_MS)
        expect(page.locator("[data-metric=best_val_loss] b")).to_have_text("1.75")
        last = "() => document.querySelector('.card.wide .plot').data[0].x.at(-1)"
        page.wait_for_function(f"() => ({last})() === 120", timeout=PATIENCE_MS)
        EventLog(folder / "events.jsonl").add("skipped", step=110)
        skipped = "() => document.querySelector('.card.wide .plot').data.some((one) => one.name === 'skipped')"
        page.wait_for_function(skipped, timeout=PATIENCE_MS)
        page.locator("summary", has_text="Versions").click()
        top = page.evaluate("scrollY")
        assert top > 0
        (folder / "samples.jsonl").write_text('{"step": 120, "prompt": "def <b>f", "completion": "(x):"}\n')
        expect(page.locator("#samples pre")).to_have_text("def <b>f(x):", timeout=PATIENCE_MS)
        (folder / "summary.json").write_text(json.dumps({"state": "finished", "steps": 120, "goodput": 0.5}))
    expect(badge).to_have_text("finished", timeout=PATIENCE_MS)
    expect(page.locator("[data-metric=goodput] b")).to_have_text("50 %")
    # What the reader chose stays as it was.
    assert page.evaluate("scrollY") > 0.8 * top
    assert page.locator("details", has_text="Versions").get_attribute("open") is not None
    expect(page.locator("#toggle-logY")).to_be_checked()
    page.locator(".card.wide").scroll_into_view_if_needed()
    page.wait_for_selector(".card.wide .main-svg")
    assert page.evaluate("() => document.querySelector('.card.wide .plot').layout.yaxis.type") == "log"


def test_a_tab_that_nobody_looks_at_keeps_no_connection(visit: Visit, root: Path, server: str) -> None:
    folder = recorded_run(root, "live", num_steps=20, state="killed")
    page = visit.open(f"{server}/runs?run=live")
    turn = (
        "(hidden) => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true }); "
        "document.dispatchEvent(new Event('visibilitychange')); }"
    )
    with page.expect_event("requestfailed", lambda request: "/api/follow" in request.url):
        page.evaluate(turn, True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(21)) + "\n")
    page.evaluate(turn, False)
    expect(page.locator("[data-metric=steps] b")).to_have_text("21", timeout=PATIENCE_MS)


def test_a_metric_that_appears_later_gets_its_chart(visit: Visit, root: Path, server: str) -> None:
    folder = recorded_run(root, "live", num_steps=20, state="killed")
    page = visit.open(f"{server}/runs?run=live")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "time": metrics_line(21)["time"], "custom/late_metric": 1.0}) + "\n")
    expect(page.locator("figcaption", has_text="late metric")).to_be_visible(timeout=PATIENCE_MS)


def test_the_live_pages_fit_a_phone_in_the_dark(visit: Visit, root: Path, server: str) -> None:
    for name in ("20261120-100000-1a2b3c4-a-rather-long-name", "b"):
        recorded_run(root, name, num_steps=60)
    page = visit.page
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme="dark")
    page.goto(server)
    expect(page.locator("tbody tr")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    visit.open(f"{server}/runs?run=b")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_run_that_is_not_there_is_said(chromium: object, root: Path, server: str, visit: Visit) -> None:
    page = visit.page
    page.goto(server)
    answer = page.goto(f"{server}/runs?run=none")
    assert answer.status == 404
    visit.complaints.clear()  # Chromium's own line about the 404


def test_a_finished_model_writes_in_the_chat_box(visit: Visit, root: Path, tmp_path: Path, server: str) -> None:
    config = write_config(tmp_path / "tiny.yaml", tiny_config(tmp_path / "shards", root))
    train(load_config(str(config), ["trainer.max_steps=4", "trainer.eval_every_steps=null", "output.run_id=tiny"]))
    page = visit.open(f"{server}/runs?run=tiny")
    page.locator("#prompt").fill("def <b>f")
    page.get_by_role("spinbutton", name="Tokens").fill("12")
    page.get_by_label("Seed").fill("5")
    page.locator("#write").click()
    answer = page.locator("#answers pre").first
    note = answer.locator("small")
    expect(note).to_have_text(re.compile(r"^\d+ tokens, seed 5, ended by (length|end)$"), timeout=PATIENCE_MS)
    first = answer.inner_text()
    assert first.startswith("def <b>f")
    page.locator("#write").click()
    expect(page.locator("#answers pre")).to_have_count(2)
    expect(note).to_have_text(re.compile("ended by"), timeout=PATIENCE_MS)
    assert answer.inner_text() == first


def test_a_tuned_model_is_talked_with_turn_by_turn(visit: Visit, root: Path, tmp_path: Path, server: str) -> None:
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path / "base")
    shape = tiny_decoder(max_seq_len=96)
    about = {"config": shape, "vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id}
    write_model_folder(tmp_path / "base", state_dict=Decoder(shape, len(tokenizer)).state_dict(), **about)
    rows = [[{"role": "user", "content": f"{n} red"}, {"role": "assistant", "content": "green"}] for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": both}) + "\n" for both in rows))
    keys = tiny_config(tmp_path, root) | {
        "model": {"init_from": str(tmp_path / "base")},
        "data": {"name": "chat", "train": str(tmp_path / "rows.jsonl"), "seq_len": 32, "cache_dir": str(tmp_path)},
    }
    del keys["prepare"]
    config = write_config(tmp_path / "tuned.yaml", keys)
    asked = ["data.val_fraction=0.5", 'tracking.samples={prompts: ["red"], max_new_tokens: 4}']
    train(load_config(str(config), ["trainer.max_steps=2", "output.run_id=tuned", *asked]))
    page = visit.open(f"{server}/runs?run=tuned")
    assert page.locator("#samples pre").inner_text().startswith("red\n\n")
    page.get_by_role("spinbutton", name="Tokens").fill("4")
    answers = page.locator("#answers pre")
    for number, prompt in enumerate(("red", "and green?"), start=1):
        page.locator("#prompt").fill(prompt)
        with page.expect_request("**/api/generate") as request:
            page.locator("#write").click()
        expect(answers).to_have_count(number)
        expect(answers.first.locator("small")).to_have_text(re.compile("ended by"), timeout=PATIENCE_MS)
        expect(page.locator("#prompt")).to_have_value("")
    messages = request.value.post_data_json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user"]
    assert (messages[0]["content"], messages[2]["content"]) == ("red", "and green?")
    page.locator("#anew").click()
    expect(answers).to_have_count(0)
    expect(page.locator("#anew")).to_be_hidden()
