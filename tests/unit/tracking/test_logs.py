from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import pytest

from llmtrain.config.sections.running import LoggingConfig
from llmtrain.errors import ConfigError, Preempted, RunError
from llmtrain.tracking.logs import log_end_reason, setup_logging
from tests.support.terminal import terminal_as_stderr

model_log = logging.getLogger("llmtrain.model")


def test_a_line_on_stderr_has_time_level_and_stage(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LoggingConfig(), run_folder=None, rank=0)
    model_log.info("14.2M parameters")
    model_log.debug("not at this level")
    logging.getLogger("llmtrain.training.checkpoint").warning("%s is [bold]damaged[/bold]", "step_000500" + " x" * 90)

    out, err = capsys.readouterr()

    assert out == ""
    first, second = err.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO  \[model\] 14\.2M parameters", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARN  \[checkpoint\] step_000500( x){90} is \[bold\]damaged\[/bold\]", second)


def test_each_line_is_written_once_after_setting_up_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LoggingConfig(), run_folder=None, rank=0)
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    model_log.info("once")

    assert capsys.readouterr().err.count("once") == 1
    assert (tmp_path / "logs" / "train.log").read_text().count("once") == 1
    assert len(logging.getLogger("llmtrain").handlers) == 2


def test_a_resumed_run_appends_to_its_log(tmp_path: Path) -> None:
    for word in ("before", "after"):
        setup_logging(LoggingConfig(file_name="run.log"), run_folder=tmp_path, rank=0)
        model_log.info(word)

    lines = (tmp_path / "logs" / "run.log").read_text().splitlines()

    assert [line.rpartition(" ")[2] for line in lines] == ["before", "after"]
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ INFO  \[model\] before", lines[0])


def test_other_ranks_write_to_a_file_of_their_own_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=3)
    model_log.warning("here is rank 3")
    setup_logging(LoggingConfig(log_to_file=False), run_folder=tmp_path, rank=2)
    model_log.error("here is rank 2")

    assert capsys.readouterr() == ("", "")
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["rank_3.log"]
    assert (tmp_path / "logs" / "rank_3.log").read_text().endswith("WARN  [model] here is rank 3\n")


def test_json_lines_have_stage_rank_metrics_and_tracebacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LoggingConfig(json_output=True), run_folder=tmp_path, rank=0)
    logging.getLogger("llmtrain.train").info("step %d", 5, extra={"step": 5, "metrics": {"train/loss": 3.5}})
    try:
        raise KeyError("token=abcdef")
    except KeyError:
        model_log.exception("no good")

    text = capsys.readouterr().err
    first, second = (json.loads(line) for line in text.splitlines())

    assert text == (tmp_path / "logs" / "train.log").read_text()
    assert {key: value for key, value in first.items() if key != "time"} == {
        "level": "INFO",
        "stage": "train",
        "rank": 0,
        "message": "step 5",
        "step": 5,
        "metrics": {"train/loss": 3.5},
    }
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["time"])
    assert second["message"].startswith("no good\nTraceback")
    assert "abcdef" not in text


def test_secrets_do_not_reach_the_terminal_or_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    model_log.info("fetching %s with --token %s", "https://me:pass1@host/x", "abcdef")

    for text in (capsys.readouterr().err, (tmp_path / "logs" / "train.log").read_text()):
        assert text.endswith("fetching https://***@host/x with --token ***\n")


def test_loggers_of_other_libraries_are_not_changed(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    setup_logging(LoggingConfig(level="DEBUG"), run_folder=None, rank=0)
    other = logging.StreamHandler()
    root.addHandler(other)  # as logging.warning() of some library would
    model_log.warning("once")
    root.removeHandler(other)

    assert root.handlers == before
    assert root.level == logging.WARNING
    assert capsys.readouterr().err.count("once") == 1


def test_a_log_file_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")

    with pytest.raises(ConfigError, match=r"cannot write the log file .*logs/train.log: .*logging.log_to_file=false"):
        setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)


def test_a_full_disk_ends_the_log_file_with_one_line_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.log").symlink_to("/dev/full")
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    for step in range(3):
        model_log.info("step %d", step)

    lines = [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()]

    path = tmp_path / "logs" / "train.log"
    assert lines == ["step 0", f"{path} cannot be written any more; the run goes on without it", "step 1", "step 2"]


def test_the_reason_for_a_runs_end_is_in_its_log_file_and_not_twice_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    log_end_reason(RunError("the disk is full"))
    log_end_reason(Preempted("step 3 is saved"))
    log_end_reason(ZeroDivisionError("oops"))
    text = (tmp_path / "logs" / LoggingConfig().file_name).read_text()
    assert "ERROR [run] the disk is full" in text
    assert "WARN  [run] step 3 is saved" in text
    assert "ZeroDivisionError: oops" in text
    assert capsys.readouterr().err == ""


def test_a_terminal_line_is_wrapped_between_words_and_a_pipe_gets_one_line_a_record(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = "step 120/900  val 3.100  perplexity 22.2  bits/byte 1.460  exact_match 0.25  rougeL 0.5  eta 6m30s"
    for name in ("COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    setup_logging(LoggingConfig(), run_folder=tmp_path, rank=0)
    model_log.info(line)
    assert capsys.readouterr().err.count("\n") == 1
    for columns in (80, 60):
        with terminal_as_stderr(columns=columns) as tty:
            model_log.info(line)
        first, *rest = tty.screen()
        assert all(len(part) <= columns for part in (first, *rest))
        assert all(part.startswith("         ") for part in rest)
        assert " ".join([first[len("12:01:33 ") :], *rest]).split() == ["INFO", "[model]", *line.split()]
    assert line in (tmp_path / "logs" / "train.log").read_text()
