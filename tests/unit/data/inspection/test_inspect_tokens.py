"""`inspect` shows what a run sees: the documents and their ends, and the very items of the run's order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.data.inspection.tokens import inspect_tokens
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokenizers import Tokenizer, train_bpe
from llmtrain.data.tokens import open_training_data
from tests.support.tiny_run import write_config
from tests.support.token_shards import write_token_shards

TEXTS = [f"def f_{number}(x):\n    return x + {number}\n" * (1 + number % 4) for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, vocab_size=300)


@pytest.fixture
def config_file(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    for name, texts in (("one", TEXTS[:30]), ("two", TEXTS[30:])):
        documents = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        splits = {"train": [[documents[:10]], [documents[10:]]] if name == "one" else [[documents]]}
        splits["val"] = [[documents[:2]]]
        write_token_shards(tmp_path / name, splits, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
        tokenizer.save(tmp_path / name / "tokenizer")
    keys = {
        "data": {
            "name": "tokens",
            "train": str(tmp_path / "one/train"),
            "val": str(tmp_path / "one/val"),
            "seq_len": 32,
        },
        "run": {"seed": 5},
    }
    return write_config(tmp_path / "c.yaml", keys)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(["inspect", *argv]) == 0
    return capsys.readouterr().out


def test_items_are_those_of_the_run(config_file: Path, tokenizer: Tokenizer) -> None:
    loaded = load_config(str(config_file))
    result = inspect_tokens(loaded, num_items=6)
    data = open_training_data(ensure_shards(loaded.config), seed=5)
    batches = data.batches(start_item=0, batch_size=1, end_item=6, micro_batch_size=1)
    for item, (batch,) in zip(result["items"], batches, strict=True):
        supervised = int((batch["labels"] != IGNORE_INDEX).sum())
        tokens = [*batch["input_ids"][0, :supervised].tolist(), int(batch["labels"][0, supervised - 1])]
        assert "".join(piece["text"] for piece in item["documents"]) == tokenizer.decode(tokens)
        assert item["supervised_tokens"] == supervised
        assert [piece["ends"] for piece in item["documents"][:-1]] == [True] * (len(item["documents"]) - 1)
        assert not any(piece["begins_before"] for piece in item["documents"][1:])
    assert any(item["documents"][0]["begins_before"] for item in result["items"])


def test_documents_have_their_end_token_and_counts_add_up(config_file: Path, tokenizer: Tokenizer) -> None:
    result = inspect_tokens(load_config(str(config_file)), num_documents=3)
    assert [one["text"] for one in result["first_documents"]] == [text + "<|endoftext|>" for text in TEXTS[:3]]
    lengths = [len(tokenizer.encode(text)) + 1 for text in TEXTS[:30]]
    assert (result["documents"], result["tokens"]) == (30, sum(lengths))
    assert result["lengths"]["longest"] == max(lengths)
    assert sum(row["documents"] for row in result["lengths"]["histogram"]) == 30
    assert result["sources"] == [{"source": "test", "documents": 30, "tokens": sum(lengths), "share": 1.0}]
    assert result["windows"]["items"] == -(-(sum(lengths) - 1) // 32)
    assert result["windows"]["padding"] == -(sum(lengths) - 1) % 32
    assert result["faults"] == []


def test_validation_windows_come_one_after_the_other(config_file: Path) -> None:
    result = inspect_tokens(load_config(str(config_file)), split="val", num_items=9)
    assert result["documents"] == 2
    assert [item["window"] for item in result["items"]] == list(range(result["windows"]["items"]))
    assert result["items"][-1]["padding"] == result["windows"]["padding"]


def test_text_that_is_tokenised_as_needed_is_for_inspect_too(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text)
    keys = {
        "name": "corpus",
        "train": str(tmp_path / "texts"),
        "cache_dir": str(tmp_path / "cache"),
        "tokenizer": {"kind": "char"},
        "val_fraction": 0.2,
        "seq_len": 16,
    }
    loaded = load_config(str(write_config(tmp_path / "c.yaml", {"data": keys})))
    train, val = inspect_tokens(loaded), inspect_tokens(loaded, split="val")
    assert train["documents"] + val["documents"] == 40
    assert train["sources"][0]["source"] == "texts"
    assert train["first_documents"][0]["text"].endswith("<|endoftext|>")
    assert len(train["items"]) == 2


def test_a_mixture_shows_each_sources_share(config_file: Path, tmp_path: Path) -> None:
    train = f"[{{path: {tmp_path}/one/train, weight: 3}}, {{path: {tmp_path}/two/train, weight: 1}}]"
    result = inspect_tokens(load_config(str(config_file), [f"data.train={train}"]), num_items=8)
    assert [row["share"] for row in result["mixture"]] == [0.75, 0.25]
    total = sum(row["tokens"] for row in result["mixture"])
    for row in result["mixture"]:
        assert row["passes_an_epoch"] == pytest.approx(row["share"] * total / row["tokens"])
    assert {item["source"] for item in result["items"]} == {0, 1}


@pytest.mark.parametrize("where", ["one", "one/train", "one/train/*.parquet"])
def test_a_path_of_shards_needs_no_config(where: str, config_file: Path, tmp_path: Path) -> None:
    result = inspect_tokens(str(tmp_path / where))
    assert (result["documents"], result["items"], result["windows"]) == (30, [], None)
    assert inspect_tokens(str(tmp_path / "one"), split="val")["documents"] == 2


def test_the_program_prints_bars_documents_and_items(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, str(config_file), "--num-documents", "1", "--num-items", "1")
    assert "documents          30\n" in text
    assert "█" in text
    assert "\ndocument 0: test:0, " in text
    assert "    │ <|endoftext|>" in text
    assert "\nsequence 0: window " in text
    document = json.loads(printed(capsys, str(config_file), "--json", "data.seq_len=16"))
    assert document["windows"]["seq_len"] == 16


def test_escape_sequences_in_documents_do_not_reach_the_terminal(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    document = [*tokenizer.encode("a\x1b[31m\rb"), tokenizer.eos_id]
    write_token_shards(tmp_path, {"train": [[[document]]]}, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "tokenizer")
    assert "    │ a\\x1b[31m\\x0db<|endoftext|>" in printed(capsys, str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"prepare": {"input": "x", "output": "s"}}, "llmtrain prepare c.yaml`"),
        ({}, "c.yaml has no `prepare` section"),
        ({"data": {"name": "synthetic"}}, "data.name is synthetic"),
    ],
)
def test_what_cannot_be_inspected_says_what_to_do(
    keys: dict[str, Any],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(Path("c.yaml"), {"data": {"name": "tokens", "train": "s/train"}, **keys})
    assert run(["inspect", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_path_with_nothing_there_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "nowhere"]) == 2
    assert "there are no token shards at nowhere" in capsys.readouterr().err
    assert run(["inspect", "nowhere", "data.seq_len=4"]) == 2
    assert "give a config for that" in capsys.readouterr().err


def test_a_mixture_shows_its_limits_its_stages_and_what_they_come_to(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = f"[{{path: {tmp_path}/one/train, weight: 1}}, {{path: {tmp_path}/two/train, weight: 1, max_epochs: 1}}]"
    mixture = "{by: tokens, stages: [{from_step: 500, weights: [0, 1]}]}"
    overrides = [f"data.train={train}", f"data.mixture={mixture}"]
    result = inspect_tokens(load_config(str(config_file), overrides))
    one, two = result["mixture"]
    assert two["first_epoch"]["epochs"] == 1
    assert one["first_epoch"]["share"] > 0.5 > two["first_epoch"]["share"]
    assert one["first_epoch"]["asked"] == two["first_epoch"]["asked"] == pytest.approx(0.5, abs=0.01)
    assert one["first_epoch"]["sequences"] + two["first_epoch"]["sequences"] == result["windows"]["items"]
    assert result["stages"][0]["begins"] == "step 500"
    assert list(result["stages"][0]["shares"].values()) == [0, 1]
    (change,) = result["changes"]
    assert change["sequence"] == pytest.approx(2 * two["first_epoch"]["sequences"], abs=2)
    text = printed(capsys, str(config_file), *overrides)
    assert "share of tokens" in text
    assert "from step 500: " in text
    assert f"sequence {change['sequence']}: {tmp_path}/two/train is used up" in " ".join(text.split())


def test_no_more_items_are_shown_than_there_are(config_file: Path, tmp_path: Path) -> None:
    train = f"data.train=[{{path: {tmp_path}/two/train, epochs: 0.1}}]"
    result = inspect_tokens(load_config(str(config_file), [train]), num_items=9)
    assert len(result["items"]) == result["mixture"][0]["first_epoch"]["sequences"] < 9
