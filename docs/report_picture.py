"""Draws docs/report.png: trains a small model for some minutes, stops it once with SIGTERM, resumes it, and takes a
picture of its report in Chromium.

    python -m docs.report_picture
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.support.browser import chromium_path

CONFIG = """
schema_version: 1
run: {name: standard-library, tags: [pretraining], notes: "Source files of json, email, asyncio, http and others"}
prepare:
  input: ${sysconfig:stdlib}
  include: ["json/*.py", "email/*.py", "asyncio/*.py", "collections/*.py", "http/*.py", "unittest/*.py", "logging/*.py"]
  tokenizer: {kind: bpe, vocab_size: 2048}
  output: shards
  val_fraction: 0.1
data: {name: tokens, train: shards/train, val: shards/val, seq_len: 128}
model: {max_seq_len: 256, d_model: 128, num_layers: 3, attention: {num_heads: 4, qk_norm: true}}
trainer:
  {max_steps: 400, micro_batch_size: 8, log_every_steps: 1, eval_every_steps: 40, eval_steps: 16, save_every_steps: 80}
optimizer: {name: muon, lr: 3.0e-3}
scheduler: {name: wsd, warmup_ratio: 0.04, decay_ratio: 0.4, min_lr_ratio: 0.0}
output: {run_id: standard-library}
"""
STOP_AT_STEP = 220
MAX_BYTES = 200_000
PICTURE = Path(__file__).with_name("report.png")


def main() -> None:
    """Train, stop, resume, draw."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(CONFIG)
        run = Path(folder, "runs", "standard-library")
        first = start(folder, "train", "config.yaml")
        while first.poll() is None and last_step(run / "metrics.jsonl") < STOP_AT_STEP:
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
        if first.wait() != 75 or start(folder, "train", "--resume", "standard-library").wait() != 0:
            raise SystemExit("the run did not go as it should; its lines are above")
        draw(run / "report.html")


def start(folder: str, *words: str) -> subprocess.Popen[bytes]:
    """llmtrain in `folder`."""
    return subprocess.Popen([sys.executable, "-m", "llmtrain", *words], cwd=folder, env=dict(os.environ))


def last_step(metrics: Path) -> int:
    """Of the last whole line; 0 before there is one."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def draw(report: Path) -> None:
    """The top of the page, as a reader on a laptop meets it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1140}, color_scheme="light")
        page.goto(report.as_uri())
        for plot in page.locator(".plot").all()[:3]:
            plot.locator(".main-svg").first.wait_for()
        page.screenshot(path=PICTURE, animations="disabled")
        browser.close()
    size = PICTURE.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{PICTURE} has {size:,} bytes, more than {MAX_BYTES:,}")
    print(f"{PICTURE} ({size:,} bytes)")


if __name__ == "__main__":
    main()
