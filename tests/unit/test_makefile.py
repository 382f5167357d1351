"""The verbs of make: each is one line that calls the command, with variables and without."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KIND = "$(cat deploy/kubernetes/overlays/kind/words) --image llmtrain:local"


def line_of(verb: str, *variables: str, folder: Path = ROOT) -> str:
    """The last line that make would run, without what is before `llmtrain`."""
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), "-C", str(folder), "-o", "install", verb, *variables]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "bin/llmtrain " in line]
    assert len(lines) == 1, done.stdout
    return " ".join(lines[0].partition("bin/llmtrain ")[2].split())


@pytest.mark.parametrize(
    ("verb", "variables", "line"),
    [
        ("train", [], "train quickstart"),
        ("train", ["TRAIN_CONFIG=finetune-lora"], "train finetune-lora"),
        ("train", ["CONFIG=mine.yaml", "TRAIN_CONFIG=other", "ARGS=run.seed=1"], "train mine.yaml run.seed=1"),
        ("eval", [], "eval"),
        ("eval", ["MODEL=runs/one", "EVAL_CONFIG=eval"], "eval runs/one --config eval"),
        ("eval-baseline", ["EVAL_CONFIG=eval-baseline"], "eval --config eval-baseline evaluation.subject=base"),
        ("eval-baseline", [], "eval evaluation.subject=base"),
        ("compare", [], "eval --baseline auto"),
        ("compare", ["MODEL=one", "BASELINE=two", "CONFIG=eval"], "eval one --config eval --baseline two"),
        ("publish", [], "publish"),
        ("publish", ["MODEL=one", "LICENSE=mit", "TO=there"], "publish one --license mit --to there"),
        ("publish-hf", ["LICENSE=mit"], "publish --license mit --to hub"),
        ("convert", [], "convert 'data/*.json' data/rows.jsonl"),
        ("k8s-train", ["CONFIG=a/mine.yaml", "ARGS=--follow"], f"launch k8s a/mine.yaml {KIND} --name mine --follow"),
        ("k8s-train", [], f"launch k8s quickstart {KIND} --name quickstart"),
        ("k8s-logs", [], "launch k8s status quickstart --follow"),
        ("convert", ["IN=export.zip", "OUT=rows"], "convert export.zip rows"),
        ("push", [], "launch ssh push"),
        ("ssh-init", ["CONFIG=mine.yaml"], "launch ssh init mine.yaml"),
        ("ssh-train", ["TRAIN_CONFIG=finetune-lora"], "launch ssh train finetune-lora"),
        ("ssh-train-bg", ["ENV_FILE=secrets"], "launch ssh train quickstart --detach --env-file secrets"),
        ("ssh-eval", ["EVAL_CONFIG=eval"], "launch ssh eval --config eval"),
        (
            "ssh-eval-baseline",
            ["MODEL=one", "EVAL_CONFIG=eval-baseline"],
            "launch ssh eval one --config eval-baseline evaluation.subject=base",
        ),
    ],
)
def test_a_verb_is_one_line(tmp_path: Path, verb: str, variables: list[str], line: str) -> None:
    assert line_of(verb, *variables, folder=tmp_path) == line


def test_questions_in_data_eval_are_asked_without_being_named(tmp_path: Path) -> None:
    (tmp_path / "data" / "eval").mkdir(parents=True)
    (tmp_path / "data" / "eval" / "test.jsonl").write_text("")
    assert line_of("eval", folder=tmp_path) == "eval --config eval"
    assert line_of("eval-baseline", folder=tmp_path) == "eval --config eval evaluation.subject=base"
