"""`inspect` of a config with rows shows what a run would learn, and tells every fault; the tokenizer is enough."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmtrain.cli.app import run
from llmtrain.config.loading.load import LoadedConfig, load_config
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat import parts as parts_of_rows
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.packing import pack
from llmtrain.data.chat.parts import find_parts
from llmtrain.data.chat.prepare_rows import PreparedRows
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.tokenizer import load_fast_tokenizer
from llmtrain.data.inspection.chat import inspect_chat
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_run import write_config

WORDS = ["red", "green", "blue", "old", "new"]


def conversation(number: int) -> dict[str, Any]:
    words = [WORDS[number % 5], WORDS[number // 5 % 5]] * (1 + number % 3)
    return {
        "messages": [
            {"role": "user", "content": f"{number}: {' '.join(words)}"},
            {"role": "assistant", "content": " ".join(reversed(words))},
        ]
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_chat_tokenizer(CHATML, adds_bos=True).save_pretrained(folder)
    return folder


def write(folder: Path, tokenizer: Path, rows: list[Any], **data: Any) -> Path:
    """A config with these rows (text stands for a line as it is)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    keys = {
        "model": {"name": "huggingface", "path": str(tokenizer)},
        "data": {
            "name": "chat",
            "train": str(folder / "rows.jsonl"),
            "seq_len": 64,
            "cache_dir": str(folder / "cache"),
            **data,
        },
    }
    return write_config(folder / "c.yaml", keys)


def loaded(*arguments: Any, **data: Any) -> LoadedConfig:
    return load_config(str(write(*arguments, **data)))


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
def test_counts_are_those_of_the_samples_that_a_run_takes(tmp_path: Path, tokenizer: Path, truncation: str) -> None:
    config = loaded(tmp_path, tokenizer, [conversation(n) for n in range(60)], val_fraction=0.2, truncation=truncation)
    found = inspect_chat(config)
    assert not (tmp_path / "cache").exists(), "it keeps nothing"
    data = config.config.data
    assert isinstance(data, ChatConfig)
    parts = find_parts(data)
    prepared = PreparedRows(data, ChatTemplate(load_fast_tokenizer(tokenizer)), parts, num_workers=0)
    assert parts.validation is not None
    for split, part in (("train", parts.training[0]), ("val", parts.validation)):
        store, about = prepared.ensure(part)[0], found[split]
        assert (about["rows"], about["samples"]) == (store.manifest.account.rows, len(store))
        assert about["tokens"] == store.lengths.sum()
        assert about["supervised_tokens"] == store.num_supervised.sum()
        assert about["share_supervised"] == about["supervised_tokens"] / about["tokens"]
        assert about["packs"]["efficiency"] == pack(store.lengths, 64).efficiency
        assert sum(row["rows"] for row in about["lengths"]["histogram"]) == about["rows"]
        if truncation != "drop":
            assert about["tokens"] + about["tokens_cut"] == about["tokens_before_cutting"]
        for row, number in zip(about["first_rows"], range(3), strict=True):
            sample = store[number]
            assert (row["source"], row["tokens"]) == (sample.source, len(sample.input_ids))
    assert found["train"]["rows"] + found["val"]["rows"] == 60
    cut = "left out" if truncation == "drop" else "cut off"
    assert any(cut in note and "data.seq_len" in note for note in found["notes"])
    assert found["would_run"]


def test_first_rows_are_shown_with_what_is_learned_and_what_controls(tmp_path: Path, tokenizer: Path) -> None:
    rows = [conversation(6), {"prompt": "größe", "completion": " 日本 ok"}]
    found = inspect_chat(loaded(tmp_path, tokenizer, rows), num_rows=2)
    chat, completion = found["train"]["first_rows"]
    assert "".join(piece["text"] for piece in chat["pieces"] if piece["supervised"]) == "green green<|im_end|>"
    controls = [piece["text"] for piece in chat["pieces"] if piece["control"]]
    assert controls == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert "".join(piece["text"] for piece in completion["pieces"]) == "<s>größe 日本 ok</s>"
    assert "".join(piece["text"] for piece in completion["pieces"] if piece["supervised"]) == " 日本 ok</s>"


def test_every_fault_is_reported_by_its_line_and_the_exit_code_is_2(
    tmp_path: Path, tokenizer: Path, capsys: Any
) -> None:
    asked = {"role": "user", "content": "a"}
    faults = [
        ("{bad", "is no JSON"),
        ({"messages": [asked, {"role": "assistant", "content": " "}]}, "turn 2 (assistant) is empty"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"messages": [asked]}, "has no turn of the assistant to learn from"),
        ({"prompt": "the ans", "completion": "wer"}, "the prompt's tokens are not the first ones"),
        ({"text": "<s><s>twice"}, "begins with two BOS tokens"),
        ({"text": "long " * 100}, "more than data.seq_len 64"),
    ]
    config = write(tmp_path, tokenizer, [conversation(1), *(row for row, _ in faults)], truncation="error")
    assert run(["inspect", str(config), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [fault["source"] for fault in found["faults"]] == [f"{tmp_path}/rows.jsonl:{line}" for line in range(2, 9)]
    for fault, (_, message) in zip(found["faults"], faults, strict=True):
        assert message in fault["message"]
    assert (found["train"]["rows"], found["train"]["rows_with_faults"], found["train"]["samples"]) == (8, 7, 1)

    assert run(["inspect", str(config)]) == 2
    told = capsys.readouterr().out
    assert "\n7 faults\n" in told
    assert all(f"  {tmp_path}/rows.jsonl:{line}: " in told for line in range(2, 9))

    assert run(["inspect", str(config), "data.on_error=skip"]) == 0
    assert "\n7 faults, whose rows are left out (data.on_error: skip)\n" in capsys.readouterr().out


def test_a_row_that_would_lose_all_that_is_learned_is_a_fault(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    row = {"prompt": "long " * 60, "completion": "x"}
    assert run(["inspect", str(write(tmp_path, tokenizer, [conversation(1), row])), "--json"]) == 2
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault["source"].endswith("rows.jsonl:2")
    assert "supervised tokens is among the first 64" in fault["message"]


def test_no_row_left_is_exit_code_2_without_a_fault(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    config = write(tmp_path, tokenizer, [{"text": "long " * 100}], truncation="drop")
    assert run(["inspect", str(config)]) == 2
    assert "of 1 row none is left to train on" in capsys.readouterr().out
    (tmp_path / "val.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    config = write(tmp_path, tokenizer, [conversation(0)], truncation="drop", val=str(tmp_path / "val.jsonl"))
    assert run(["inspect", str(config)]) == 2
    assert "data.val: of 1 row none is left to validate on" in capsys.readouterr().out


def test_what_rows_hold_and_is_not_used_is_shown_with_and_without_a_config(
    tmp_path: Path, tokenizer: Path, capsys: Any
) -> None:
    named = {"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]}
    config = write(tmp_path, tokenizer, [conversation(1), {**named, "id": 3}, {**named, "id": 4}])
    assert run(["inspect", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    first = f"{tmp_path}/rows.jsonl:2"
    assert found["train"]["unused"] == {
        "id": {"rows": 2, "first": first},
        "turn.name": {"rows": 2, "first": first},
    }
    assert run(["inspect", str(config)]) == 0
    assert ["turn.name", "2", first] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert run(["inspect", str(tmp_path / "rows.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unused"] == {"id": {"rows": 2, "first": first}}


@pytest.mark.parametrize(("rows", "why"), [(3, "are few"), (8, "have one prompt")])
def test_rows_that_cannot_be_divided_are_all_for_training(
    rows: int, why: str, tmp_path: Path, tokenizer: Path, capsys: Any
) -> None:
    row = conversation(2) if why == "have one prompt" else None
    fraction = 0.99 if row else 0.001
    config = write(tmp_path, tokenizer, [row or conversation(n) for n in range(rows)], val_fraction=fraction)
    assert run(["inspect", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    side = "all" if row else "none"
    assert found["warnings"] == [
        f"data.val_fraction: {fraction} holds out {side} of {rows} rows, which {why}: the run trains on all of them, "
        "without validation; name other rows in data.val to have one"
    ]
    assert (found["train"]["samples"], found["val"]) == (rows, None)


def test_validation_prompts_among_the_training_rows_are_warned_of(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in (3, 90, 5)))
    rows = [conversation(n) for n in range(10)]
    config = write(tmp_path, tokenizer, rows, val=str(tmp_path / "val.jsonl"))
    assert run(["inspect", str(config), "--split", "val"]) == 0
    told = capsys.readouterr().out
    assert "data.train: 2 of 3 validation prompts stand word for word in the training rows" in told
    assert f"{tmp_path}/val.jsonl:1 = {tmp_path}/rows.jsonl:4" in told
    assert f"{tmp_path}/val.jsonl:2: " in told, "--split shows the first rows of that split"


def test_faults_of_rows_that_both_splits_read_are_reported_once(tmp_path: Path, tokenizer: Path) -> None:
    long = [{"prompt": f"{n} " + "long " * 60, "completion": "x"} for n in range(10)]
    found = inspect_chat(loaded(tmp_path, tokenizer, [*long, "{bad", *map(conversation, range(30))], val_fraction=0.3))
    assert [fault["source"].rpartition(":")[2] for fault in found["faults"]] == [str(line) for line in range(1, 12)]
    assert 2 <= found["val"]["rows_with_faults"] <= 10
    assert found["val"]["samples"] > 0


def test_supervised_text_is_in_brackets_in_a_pipe_and_in_colour_on_a_terminal(
    tmp_path: Path, tokenizer: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    config = str(write(tmp_path, tokenizer, [conversation(0)]))
    assert run(["inspect", config]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "⟦red red<|im_end|>⟧" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(["inspect", config]) == 0
    assert "\x1b[32mred red\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in capsys.readouterr().out


def test_without_validation_rows_there_is_none_to_show(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    assert run(["inspect", str(write(tmp_path, tokenizer, [conversation(0)])), "--split", "val"]) == 2
    assert "has no validation rows: name them in data.val" in capsys.readouterr().err


def test_a_decoder_needs_a_tokenizer_to_be_named(tmp_path: Path, tokenizer: Path, capsys: Any) -> None:
    config = write(tmp_path, tokenizer, [conversation(0)])
    model = 'model={"name": "decoder"}'
    assert run(["inspect", str(config), model]) == 2
    assert "data.tokenizer: the decoder has no tokenizer" in capsys.readouterr().err
    assert run(["inspect", str(config), model, f"data.tokenizer={tokenizer}"]) == 0


@pytest.mark.slow
def test_processes_find_the_same(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*(conversation(n) for n in range(1500)), "{bad", {"messages": []}, *(conversation(n) for n in range(9))]
    (tmp_path / "val.jsonl").write_text(json.dumps(conversation(7)) + "\n")
    config = loaded(tmp_path, tokenizer, rows, val=str(tmp_path / "val.jsonl"))
    alone = inspect_chat(config)
    monkeypatch.setattr(parts_of_rows, "_MANY_BYTES", 1)
    assert inspect_chat(config, num_workers=2) == alone
    assert [fault["source"][-5:] for fault in alone["faults"]] == [":1501", ":1502"]
    assert alone["train"]["samples"] == 1509


@pytest.mark.parametrize("packing", [True, False])
def test_rows_are_mixed_as_shards_are(tmp_path: Path, tokenizer: Path, packing: bool) -> None:
    config = write(tmp_path, tokenizer, [conversation(n) for n in range(40)], packing=packing)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(conversation(n)) + "\n" for n in range(10)))
    train = f"[{{path: {tmp_path}/rows.jsonl, weight: 1}}, {{path: {tmp_path}/few.jsonl, weight: 1}}]"
    overrides = [f"data.train={train}", "data.mixture={by: documents, max_epochs: 2}"]
    mixed = load_config(str(config), overrides)
    found = inspect_chat(mixed)
    assert [row["first_epoch"]["by"] for row in found["mixture"]] == ["documents"] * 2
    assert [row["max_epochs"] for row in found["mixture"]] == [2, 2]
    used_up = found["changes"][0]
    assert "few.jsonl is used up" in used_up["what"]
    assert found["changes"][-1]["what"].endswith("the data end")

    data = mixed.config.data
    assert isinstance(data, ChatConfig)
    parts = find_parts(data)
    prepared = PreparedRows(data, ChatTemplate(load_fast_tokenizer(tokenizer)), parts, num_workers=0)
    stores = [prepared.ensure(part)[0] for part in parts.training]
    items = RowItems(
        stores=stores, mixture=parts.mixture, seed=1337, seq_len=64, packing=packing, mask_documents=True, pad_id=0
    )
    mixture = items.order().mixture
    assert [change.item for change in mixture.changes] == [change["sequence"] for change in found["changes"]]
    assert mixture.end is not None
    reader = items.open(shuffled=True)
    names = Counter(reader.names(reader.locate(np.arange(mixture.end))))
    assert set(names.values()) == {2}
    assert len(names) == sum(map(len, stores))
