"""`eval` on rows: every file and all of them, a tuned model against its base, stopped and gone on, any batch size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run as command
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.errors import ConfigError
from llmtrain.evaluation import answers
from llmtrain.evaluation.answers import AnswerJournal
from llmtrain.evaluation.baseline import find_baseline
from llmtrain.evaluation.rows import Subjects, _identity
from llmtrain.generation import decoding as generation
from llmtrain.generation import language_model
from llmtrain.runs.stores import runs_folder
from llmtrain.verbs.evaluate import evaluate
from tests.support.tiny_huggingface import write_tiny_adapter, write_tiny_chat_folder
from tests.support.tiny_model import write_tiny_model

WORDS = ["red", "green", "blue", "round", "old", "new"]


def write_rows(file: Path, *, num: int, first: int = 0) -> str:
    """Prompts of very different lengths, with completions."""
    with file.open("w") as out:
        for number in range(first, first + num):
            words = [WORDS[(number * 5 + place) % 6] for place in range(1 + number * 7 % 11)]
            out.write(json.dumps({"prompt": f"{number} {' '.join(words)}", "completion": f" {words[0]}"}) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_tiny_adapter(base.parent / "adapter", base)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    return [write_rows(folder / "test.jsonl", num=13), write_rows(folder / "dev.jsonl", num=8, first=40)]


def evaluated(model: Path, rows: list[str], root: Path, **settings: Any) -> dict[str, Any]:
    return evaluate(str(model), settings={"data": rows, "max_new_tokens": 12, **settings}, root_dir=str(root))


def predictions(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(found["output"]) / "predictions.jsonl").read_text().splitlines()]


def test_an_adapter_is_compared_with_its_base_on_every_file_and_all(
    adapter: Path, base: Path, rows: list[str], tmp_path: Path
) -> None:
    found = evaluated(adapter, rows, tmp_path)
    written = json.loads((Path(found["output"]) / "metrics.json").read_text())
    assert (found["model"], found["baseline"]) == (str(adapter), str(base))
    assert {name: part["rows"] for name, part in written["files"].items()} == {"test.jsonl": 13, "dev.jsonl": 8}
    assert written["rows"] == 21
    parts = written["files"].values()
    for name in ("exact_match", "jaccard", "rougeL"):
        mean = sum(part["scores"][name] * part["rows"] for part in parts) / 21
        assert written["scores"][name] == pytest.approx(mean, abs=1e-9), "a total is of rows, not of files"

    compared = written["comparison"]["loss"]
    assert compared["base"] == written["baseline_scores"]["loss"]
    assert compared["tuned"] == written["scores"]["loss"] == written["loss"]
    assert compared["difference"] == pytest.approx(compared["tuned"] - compared["base"])
    assert compared["low"] < compared["difference"] < compared["high"]
    assert compared["wins"] + compared["losses"] + compared["ties"] == 21
    assert set(written["comparison"]) == set(written["scores"]) == set(written["definitions"])
    assert written["precision"] == written["baseline_precision"] == "float32"
    assert "sacre" not in written["signatures"]["bleu"]
    assert re.search(r"version:\d", written["signatures"]["bleu"])
    assert written["contamination"] == {"checked": False, "why": "the model's training data is not known"}

    lines = predictions(found)
    asked = [json.loads(line) for file in rows for line in Path(file).read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in asked], "in the order of the rows"
    assert [line["expected"] for line in lines] == [row["completion"] for row in asked]
    worse = [line["source"] for line in lines if line["scores"]["loss"] > line["baseline"]["scores"]["loss"]]
    assert set(written["got_worse"]["loss"]) == set(worse)
    page = (Path(found["output"]) / "report.html").read_text()
    assert lines[0]["prompt"] in page
    assert "Against the baseline" in page


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_the_same_at_any_batch_size(
    base: Path, rows: list[str], tmp_path: Path, temperature: float
) -> None:
    for model in (base, tmp_path / "decoder"):
        if model != base:
            write_tiny_model(model)
        alone, together = (
            predictions(evaluated(model, rows, tmp_path, batch_size=size, temperature=temperature, baseline=None))
            for size in (1, 16)
        )
        assert [line["prediction"] for line in alone] == [line["prediction"] for line in together]
        assert [line["ended_by"] for line in alone] == [line["ended_by"] for line in together]
        assert any(line["prediction"] for line in alone)
        losses = [[line["scores"]["loss"] for line in side] for side in (alone, together)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_baseline_of_another_precision_is_a_warning(
    adapter: Path, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = iter(["float32", "bfloat16"])
    monkeypatch.setattr(language_model, "named_precision", lambda *_: next(names))
    found = evaluated(adapter, rows[1:], tmp_path, max_new_tokens=1)
    assert (found["precision"], found["baseline_precision"]) == ("float32", "bfloat16")
    assert "the model computes in float32, but its baseline in bfloat16" in capsys.readouterr().err


def test_answers_of_another_precision_are_not_continued(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    subjects = Subjects(model=tmp_path, baseline=None, trained_on=None)
    one, again, other = (
        _identity(subjects, EvaluationConfig(), [], seed=1, precision=precision)
        for precision in ("float32", "float32", "bfloat16 (autocast)")
    )
    assert one == again != other


def test_a_stopped_evaluation_continues_and_answers_no_question_twice(
    adapter: Path, rows: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluated(adapter, rows, tmp_path / "whole", batch_size=1)
    asked: list[int] = []

    def generate(model: Any, prompts: Any, how: Any, **options: Any) -> Any:
        if len(asked) == 4:  # in the baseline's answers
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generation.generate(model, prompts, how, **options)

    monkeypatch.setattr(answers, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        evaluated(adapter, rows, tmp_path, batch_size=1)
    (begun,) = (tmp_path / "eval").iterdir()
    assert not (begun / "metrics.json").exists()
    with (begun / "baseline.part-0.jsonl").open("ab") as file:
        file.write('["cut off in the middle of 中'.encode()[:-1])
    asked.clear()
    found = evaluated(adapter, rows, tmp_path, batch_size=4)
    assert found["output"] == str(begun)
    assert sum(asked) == 21 - 8, "the baseline's first eight were answered"
    assert [line["prediction"] for line in predictions(found)] == [line["prediction"] for line in predictions(whole)]
    compared = found["comparison"]["rougeL"]
    assert compared == pytest.approx(whole["comparison"]["rougeL"])
    assert sorted(path.name for path in begun.iterdir()) == ["metrics.json", "predictions.jsonl", "report.html"]

    asked.clear()
    again = evaluated(adapter, rows, tmp_path, batch_size=4, baseline=None)
    assert again["output"] != str(begun), "what is finished is not gone on with"


def test_the_journal_reads_every_answer_that_it_wrote(tmp_path: Path) -> None:
    given = answers.Answer("one\u2028line\x85of\n中", 3, "end", 0.5, 2)
    (tmp_path / "model.part-0.jsonl").write_bytes(b'["cut off')
    AnswerJournal(tmp_path, "model", rank=0).append({"key": given})
    assert AnswerJournal(tmp_path, "model", rank=1).known == {"key": given}


def test_rows_that_do_not_fit_the_context_are_reported_and_have_no_loss(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "decoder", max_seq_len=16)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        json.dumps({"prompt": "def f(x)", "completion": ": return x"})
        + "\n"
        + json.dumps({"prompt": "qwertz " * 20, "completion": "a"})
        + "\n"
    )
    found = evaluated(tmp_path / "decoder", [str(file)], tmp_path)
    assert (found["prompts_too_long"], found["rows_without_loss"]) == (1, 1)
    long = predictions(found)[1]
    assert (long["prediction"], long["ended_by"], long["scores"]["loss"]) == ("", "prompt too long", None)
    assert found["loss"] == pytest.approx(predictions(found)[0]["scores"]["loss"])


def test_the_last_published_model_of_runs_in_a_store_is_recorded_beside_their_copies(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path))
    root = "s3://bucket/runs"
    settings = EvaluationConfig(baseline="last-published")
    with pytest.raises(ConfigError, match=f"nothing was published from {runs_folder(root)} yet"):
        find_baseline(tmp_path, settings, root=root)
    runs_folder(root).mkdir(parents=True)
    (runs_folder(root) / "last-published.json").write_text(json.dumps({"model": str(base)}))
    assert find_baseline(tmp_path, settings, root=root) == base


def test_the_loss_of_a_model_without_a_run_is_written_beside_the_copies_of_runs_in_a_store(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "red green blue"}\n')
    found = evaluate(str(base), settings={"data": ["text.jsonl"]}, root_dir="s3://bucket/runs")
    assert Path(found["output"]).parent == runs_folder("s3://bucket/runs") / "eval"
    assert not (tmp_path / "s3:").exists()


def test_a_baseline_may_be_named_or_the_last_published_model(
    base: Path, adapter: Path, rows: list[str], tmp_path: Path
) -> None:
    assert evaluated(base, rows[:1], tmp_path)["baseline"] is None, "it was tuned from nothing"
    assert evaluated(adapter, rows[:1], tmp_path, baseline=None)["comparison"] == {}
    assert evaluated(base, rows[:1], tmp_path, baseline=str(adapter))["baseline"] == str(adapter)
    assert evaluated(adapter, rows[:1], tmp_path, subject="base")["model"] == str(base)
    with pytest.raises(ConfigError, match=r"nothing was published from .* yet"):
        evaluated(adapter, rows, tmp_path, baseline="last-published")
    (tmp_path / "last-published.json").write_text(json.dumps({"model": str(base)}))
    assert evaluated(adapter, rows[:1], tmp_path, baseline="last-published")["baseline"] == str(base)
    (tmp_path / "last-published.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"last-published\.json does not say what was published last"):
        evaluated(adapter, rows, tmp_path, baseline="last-published")
    with pytest.raises(ConfigError, match="is the model itself"):
        evaluated(base, rows, tmp_path, baseline=str(base))
    with pytest.raises(ConfigError, match=r"the model from which .*base was tuned is not known"):
        evaluated(base, rows, tmp_path, subject="base")


def test_models_with_different_tokens_are_not_compared_by_loss_per_token(
    base: Path, rows: list[str], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "decoder")
    found = evaluated(tmp_path / "decoder", rows, tmp_path, baseline=str(base))
    assert "bits_per_byte" in found["comparison"]
    assert "loss" not in found["comparison"]
    assert "perplexity" not in found["comparison"]


def test_the_command_prints_scores_and_the_comparison(
    adapter: Path, rows: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(adapter), "--data", rows[0], "--data", rows[1], "--root-dir", str(tmp_path)]
    assert command([*line, "--max-new-tokens", "8", "--max-samples", "5", "evaluation.metrics=[rougeL, chrf]"]) == 0
    out = capsys.readouterr().out
    head, *table = out[out.index("\nscores\n") + 1 :].splitlines()[1:8]
    assert head.split() == ["test.jsonl", "dev.jsonl", "all"]
    assert table[0].split() == ["rows", "5", "5", "10"]
    assert [row.split()[0] for row in table[1:6]] == ["loss", "perplexity", "bits_per_byte", "rougeL", "chrf"]
    assert "against the baseline" in out
    assert "95 % interval" in out
    assert "report.html" in out

    assert command([*line, "--max-new-tokens", "8", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["comparison"]["bleu"]["verdict"] in ("better", "worse", "unclear")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps cuts a loss short"),
        (["evaluation.metrics=[blue]"], "there is no metric 'blue'; did you mean 'bleu'"),
        (["evaluation.max_new_token=3"], "max_new_token"),
        (["--data", "gone.jsonl"], r"gone\.jsonl: no such file"),
        (["--baseline", "no-such-run"], "no-such-run"),
    ],
)
def test_mistakes_are_one_message(
    base: Path, rows: list[str], tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(["eval", str(base), "--data", rows[0], "--root-dir", str(tmp_path), *words]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "Traceback" not in captured.err


def test_a_missing_model_is_not_searched_on_the_hub(rows: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'my-model'"):
        evaluate("my-model", settings={"data": rows}, root_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="there is no run 'latest'"):
        evaluate(settings={"data": rows}, root_dir=str(tmp_path))
