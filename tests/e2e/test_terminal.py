"""What a person at a terminal sees of a run, and what a program reads there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.tracking import terminal
from llmtrain.verbs.train import train
from tests.support.terminal import terminal_as_stderr

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("CI", "KUBERNETES_SERVICE_HOST", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    yield
    terminal.forget_console()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_shows_its_figures_below_the_bar_and_leaves_the_bar_and_the_results(
    config_file: Path, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "sleep@stepped:2.5:step=25")  # time to look
    keys = ["tracking.system_interval_sec=0.05"]
    with terminal_as_stderr(columns=columns) as tty:
        train(load_config(str(config_file), keys))

    seen = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", tty.raw)
    assert re.search(r"training ━+[╸╺]?━+ 2\d/30", seen)
    for row in (
        r"  loss   \d\.\d{3}  [▁▂▃▄▅▆▇█]{16,24} ",
        r"  lr      \d\.\de-0\d  grad \d\.\d\d",
        r"  speed  [\d.]+k? tok/s ",
        r"  memory  \d\.\d GB, peak \d\.\d",
        r"  val    \d\.\d{3} at step 20, the best ",
        r"  saved   step 20, \ds ago",
    ):
        assert re.search(row, seen), row
    screen = tty.screen()
    assert re.fullmatch(r"✓ done ━+ 30/30 loss [\d.]+  val [\d.]+  [\d.]+k? tok/s", screen[-1])
    assert sum("  val " in line and "[train] step" in line for line in screen) == 3
    assert not any(line.lstrip().startswith(("loss ", "speed ", "memory ", "saved ")) for line in screen)


def test_json_lines_are_all_that_a_terminal_gets_where_they_are_asked_for(config_file: Path, shards: Path) -> None:
    again = f"prepare.output={config_file.parent}/again"  # so that the shards are made as well
    data = [f"data.train={config_file.parent}/again/train", f"data.val={config_file.parent}/again/val"]
    with terminal_as_stderr() as tty:
        train(load_config(str(config_file), ["logging.json_output=true", again, *data]))

    lines = [json.loads(line) for line in tty.raw.splitlines()]
    assert {"time", "level", "stage", "rank", "message"} <= set(lines[0])
    assert {"prepare", "model", "train"} <= {line["stage"] for line in lines}
    assert [line["step"] for line in lines if "train/loss" in line.get("metrics", {})] == list(range(1, 31))
    assert "\x1b" not in tty.raw


def test_ctrl_c_says_what_it_saved_and_how_to_go_on(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "int@stepped:step=12")
    with terminal_as_stderr(columns=400) as tty:
        code = run(["train", str(config_file), "output.run_id=one"])

    folder = config_file.parent / "runs" / "one"
    assert code == 75
    *_, saving, view, said = tty.screen()
    assert "WARN  [train] SIGINT: saving step 12, then stopping" in saving
    assert "12/30" in view
    assert said == f"stopped: step 12 is saved; to go on: llmtrain train --resume {folder}"
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    assert run(["train", *said.partition("llmtrain train ")[2].split()]) == 0
