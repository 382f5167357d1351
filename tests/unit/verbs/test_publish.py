"""`publish` to a folder: the card, the preflight, what is refused, and the record that the next baseline comes from."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.cli.app import run
from llmtrain.config.sections.publishing import check_repo_id
from llmtrain.errors import ConfigError, RunError
from llmtrain.evaluation.baseline import _last_published
from llmtrain.evaluation.comparison import Difference
from llmtrain.generation.open_model import open_model
from llmtrain.publishing.exported import Request
from llmtrain.publishing.model_card import Card, front_matter
from llmtrain.publishing.public_text import public
from llmtrain.publishing.secret_files import check_no_secrets
from llmtrain.reports.loss_picture import loss_picture, ticks
from llmtrain.verbs.export import export
from llmtrain.verbs.publish import publish
from tests.support.recorded_run import recorded_run_with_model

MIT = {"license": "mit"}


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with figures and a checkpoint, in runs/ of the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = recorded_run_with_model(tmp_path / "runs", "one")
    state = {"identity": {"data": {"fingerprint": "f1a9e0"}}}
    (folder / "checkpoints" / "latest" / "state.json").write_text(json.dumps(state))
    return folder


def evaluated(trained: Path, *, low: float, high: float, time: str = "20261121-101500") -> None:
    model = trained / "checkpoints" / "step_000200" / "model"
    rows = {"wins": 30, "losses": 9, "ties": 81}
    found = Difference(base=0.44, tuned=0.61, difference=0.17, low=low, high=high, higher_is_better=True, **rows)
    document = {
        "model": str(model.resolve()),
        "baseline": "/elsewhere/base",
        "data": "test.jsonl",
        "rows": 120,
        "time": "2026-11-21T10:15:00+00:00",
        "comparison": {"exact_match": {**asdict(found), "verdict": found.verdict}},
        "contamination": {"checked": True, "rows": 3},
    }
    folder = trained / "eval" / time
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(document))


def test_a_published_model_loads_and_its_card_tells_all(trained: Path, tmp_path: Path) -> None:
    evaluated(trained, low=0.09, high=0.24)
    done = publish("one", given={**MIT, "require_improvement": "exact_match"})
    folder = tmp_path / "artifacts" / "models" / "one"
    assert done["to"] == str(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == 0
    assert open_model(str(folder), device="cpu").generate("def", max_new_tokens=3)[0].tokens == 3
    card = (folder / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert YAML(typ="safe").load(front) == {
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmtrain"],
    }
    for told in (
        "| exact_match | 0.61 | 0.44 | +0.17 | +0.09 … +0.24 | 30 / 81 / 9 | better |",
        "Against base on the same 120 rows of test.jsonl, on 2026-11-21.",
        "| command | `llmtrain train quickstart optimizer.lr=0.003` |",
        "| seed | 7 |",
        "f1a9e0",
        "d_model: 64",
        "3 of the rows that it was measured on stand among those that it was trained on",
        "![The loss by step](curves.svg)",
        'AutoTokenizer.from_pretrained(".")  # this folder',
        'AutoModelForCausalLM.from_pretrained(".")',
    ):
        assert told in body, told
    assert str(tmp_path) not in card
    assert ElementTree.parse(folder / "curves.svg").getroot().tag.endswith("svg")
    assert json.loads((folder / "publish.json").read_text())["files"].keys() >= {"README.md", "model.safetensors"}


def test_an_accepted_one_is_recorded_in_the_run_and_as_the_next_baseline(trained: Path, tmp_path: Path) -> None:
    publish("one", given={**MIT, "to": "first"})
    publish("one", given={**MIT, "to": "second"})
    assert _last_published("runs") == str(tmp_path / "second")
    lines = [json.loads(line) for line in (trained / "published.jsonl").read_text().splitlines()]
    assert [line["to"] for line in lines] == [str(tmp_path / "first"), str(tmp_path / "second")]
    assert lines[0]["checkpoint"] == "step_000200"


def test_what_is_not_shown_to_be_better_is_refused_with_exit_1(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["publish", "one", "--license", "mit", "--require-improvement", "exact_match"]
    assert run(arguments) == 1
    assert "this model was not compared with a baseline yet: llmtrain eval one --data" in capsys.readouterr().err
    evaluated(trained, low=-0.01, high=0.24)
    assert run(arguments) == 1
    assert "0.61 against 0.44, difference +0.17, 95 % interval -0.01 to +0.24" in capsys.readouterr().err
    assert run([*arguments[:-1], "rougeL"]) == 2
    assert "compares exact_match" in capsys.readouterr().err
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "runs" / "last-published.json").exists()
    evaluated(trained, low=0.01, high=0.24, time="20261121-111500")
    assert run(arguments) == 0
    assert "artifacts/models/one" in capsys.readouterr().out


def test_a_licence_and_a_free_place_are_asked_for_first(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="a published model needs a licence: name it with --license"):
        publish("one", given={"to": "hub:me/model"})
    assert publish("one", given={"to": "mine"})["license"] == "other"
    assert "no licence is named" in caplog.text
    assert "Ask whoever made it" in (tmp_path / "mine" / "README.md").read_text()
    with pytest.raises(ConfigError, match=r"publish\.license"):
        publish("one", given={"license": "Do What You Want"})
    publish("one", given=MIT)
    with pytest.raises(ConfigError, match=r"is there already.*--force"):
        publish("one", given=MIT)
    publish("one", given=MIT, force=True)
    assert sorted(path.name for path in (tmp_path / "artifacts" / "models").iterdir()) == ["one"]


def test_what_was_exported_from_a_run_is_published_with_the_runs_card(trained: Path, tmp_path: Path) -> None:
    evaluated(trained, low=0.09, high=0.24)
    export("one", Request(to="made", device="cpu", dtype="bfloat16"))
    done = publish("made", given={**MIT, "require_improvement": "exact_match"})
    assert done["to"] == str(tmp_path / "artifacts" / "models" / "one")
    card = Path(done["to"], "README.md").read_text()
    assert "| seed | 7 |" in card
    assert "| exact_match | 0.61 | 0.44 |" in card
    assert re.search(r"\| hf \| bfloat16; logits differ by at most \d\.\de-\d\d of the largest", card)
    assert (trained / "published.jsonl").is_file()
    told = json.loads(Path(done["to"], "evaluation.json").read_text())
    assert told.keys() == {"time", "data", "rows", "comparison"}
    (tmp_path / "made" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(RunError, match=r"model\.safetensors was changed after it was saved"):
        publish("made", given={**MIT, "to": "again"})


def test_missing_and_damaged_files_are_refused(trained: Path, tmp_path: Path) -> None:
    model = trained / "checkpoints" / "step_000200" / "model"
    (trained / "checkpoints" / "step_000200" / "MANIFEST.json").write_text(
        json.dumps({"files": {"model/model.safetensors": {"sha256": "0" * 64}}})
    )
    with pytest.raises(RunError, match=r"model\.safetensors was changed after it was saved"):
        publish("one", given=MIT)
    (model / "model.safetensors").rename(model / "elsewhere")
    with pytest.raises(ConfigError, match=r"lacks model\.safetensors"):
        publish("one", given=MIT)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", '{\n "note": "hf_abcdefghijklmnopqrstuvwx"\n}'),
        ("notes.md", "fine\npassword: hunter2hunter2\n"),
        ("tokenizer.json", '{"a": "AKIAABCDEFGHIJKLMNOP"}'),
        ("settings.yaml", "tracking_uri: https://me:letmein@mlflow\n"),
    ],
)
def test_a_secret_in_any_file_keeps_it_here(trained: Path, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(text)
    line = next(number for number, part in enumerate(text.split("\n"), 1) if re.search("hf_|pass|AKIA|letme", part))
    with pytest.raises(RunError, match=rf"not published: {re.escape(name)}: line {line} looks like a secret"):
        check_no_secrets(tmp_path / "model", environ={})


def test_the_value_of_a_secret_variable_is_found_and_words_of_a_vocabulary_are_not(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"password": 4711, "secret": 12, "api_key=": 7, "token": 3}')
    (tmp_path / "README.md").write_text("plain words zxcvbnm-asdf\n")
    check_no_secrets(tmp_path, environ={"HOME": "plain words", "SHORT_TOKEN": "plain"})
    with pytest.raises(RunError, match=r"README\.md: it contains the value of WANDB_API_KEY"):
        check_no_secrets(tmp_path, environ={"WANDB_API_KEY": "zxcvbnm-asdf"})


def test_secrets_of_the_config_do_not_reach_the_card(trained: Path, tmp_path: Path) -> None:
    config = trained / "checkpoints" / "step_000200" / "config.yaml"
    config.write_text(config.read_text() + "tracking:\n  mlflow:\n    tracking_uri: https://me:letmein@mlflow\n")
    publish("one", given=MIT)
    folder = tmp_path / "artifacts" / "models" / "one"
    assert "letmein" not in (folder / "README.md").read_text() + (folder / "config.yaml").read_text()
    assert "https://***@mlflow" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["me/model", "me/a.b-c_d", "Org-1/x"])
def test_names_that_the_hub_takes(name: str) -> None:
    check_repo_id(name)


@pytest.mark.parametrize("name", ["model", "a/b/c", "me/a--b", "me/.x", "me/x.git", "me/" + "x" * 100, "me/ü", "/x"])
def test_names_that_the_hub_does_not_take(name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid name on the Hub"):
        check_repo_id(name)


@pytest.mark.parametrize(
    "tag", ["no", "Yes", "on", "y", "null", "1:30", "2024", "1_000", "0x1f", "2024-01-01", "a: b", "~"]
)
def test_tags_are_text_for_every_reader_of_yaml(tag: str) -> None:
    card = Card(name="x", license="mit", library="peft", summary="", loading="", tags=[tag], base_model="off")
    read = yaml.safe_load(front_matter(card).strip("-\n"))
    assert (read["tags"], read["base_model"]) == (["llmtrain", tag], "off")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/models/hf", "hf"),
        ("/srv/My Models/hf", "hf"),
        ("llmtrain train /srv/a/x.yaml model.path=/srv/hf --to ~/out", "llmtrain train x.yaml model.path=hf --to out"),
        ("120 rows of /srv/rows.jsonl, on 2026", "120 rows of rows.jsonl, on 2026"),
        ("LD_PRELOAD /usr/lib/a.so:/usr/lib/b.so", "LD_PRELOAD a.so:b.so"),
        ("sqlite:////srv/mlflow.db file:///srv/x", "sqlite:///mlflow.db file://x"),
        ("https://host/a/b hf://datasets/me/x@main:train s3://bucket/a", None),
        ("30 / 81 / 9, tokens/s, and/or, me/model, data/rows.jsonl", None),
    ],
)
def test_paths_of_this_machine_become_names(text: str, expected: str | None) -> None:
    assert public(text) == (text if expected is None else expected)
    assert public({"a": [text]}) == {"a": [text if expected is None else expected]}


def test_ticks_are_round_and_hold_all_values() -> None:
    assert ticks(0, 450) == [0, 100, 200, 300, 400, 500]
    assert ticks(3.7, 9.1) == [3, 4, 5, 6, 7, 8, 9, 10]
    for low, high in ((0.001, 0.0013), (2.0, 2.0), (0.0, 0.0), (-3.0, 1e6)):
        found = ticks(low, high)
        assert found[0] <= low <= high <= found[-1]
        assert 2 <= len(found) <= 9


def test_a_picture_has_every_evaluation_as_a_dot() -> None:
    curve: dict[str, Any] = {"step": [1, 50, 100], "value": [9.0, 5.0, 4.0]}
    picture = loss_picture({"train/loss": curve, "val/loss": {"step": [50, 100], "value": [5.5, 4.5]}}, title="a & b")
    assert picture is not None
    root = ElementTree.fromstring(picture)
    assert len([node for node in root.iter() if node.tag.endswith("circle")]) == 2
    assert loss_picture({}, title="") is None
