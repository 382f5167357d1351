"""`prepare` of rows: tokenised once, found again by `train`, and made anew, in so many words, when anything changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain import prepare
from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.data.chat.items import RowItems
from llmtrain.data.chat.open_rows import open_rows
from llmtrain.data.chat.tokenizer import tokenizer_folder_of
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_run import write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """40 conversations, of which some have more than 20 tokens; a tokenizer; no weights."""
    tiny_chat_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "answer " * (1 + n % 9)}]}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "name": "chat",
        "train": str(tmp_path / "rows.jsonl"),
        "seq_len": 20,
        "val_fraction": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    keys = {"model": {"name": "huggingface", "path": str(tmp_path / "tokenizer")}, "data": data}
    return write_config(tmp_path / "c.yaml", keys)


def made(config: Path, *overrides: str) -> dict[str, Any]:
    return prepare(config, overrides=overrides)


def test_rows_are_tokenised_once_and_counted(config: Path, capsys: Any) -> None:
    assert run(["prepare", str(config), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["rows"] == first["samples"] == 40
    assert first["made_now"]
    assert [part["key"] for part in first["parts"]] == ["data.val_fraction", "data.train"]
    assert all(Path(part["folder"]).parent == Path(first["cache"]) for part in first["parts"])
    assert first["tokens"] == sum(part["tokens"] for part in first["parts"])
    again = prepare(config)
    assert not again["made_now"]
    assert again["parts"] == [{**part, "made_now": False} for part in first["parts"]]
    assert run(["prepare", str(config)]) == 0
    assert "\nrows      40\n" in capsys.readouterr().out


def test_train_finds_what_prepare_made_and_repeats_what_was_cut_off(config: Path, capsys: Any) -> None:
    prepared = made(config)
    loaded = load_config(str(config)).config
    assert isinstance(loaded.data, ChatConfig)
    engine = Engine(
        resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), DistributedConfig()),
        distributed=DistributedConfig(),
    )
    capsys.readouterr()
    opened = open_rows(loaded.data, tokenizer_folder=tokenizer_folder_of(loaded), seed=0, engine=engine)
    told = [line.partition("[data] ")[2] for line in capsys.readouterr().err.splitlines()]
    folders = [part["folder"] for part in prepared["parts"]]
    assert isinstance(opened.training.items, RowItems)
    assert [str(store.folder) for store in opened.training.items.stores] == folders[1:]
    assert [line for line in told if "found in" in line] == [
        f"data.val_fraction: {prepared['parts'][0]['samples']} samples found in {folders[0]}",
        f"data.train: {prepared['parts'][1]['samples']} samples found in {folders[1]}",
    ]
    (cut,) = [line for line in told if line.startswith("data.train: ") and "the end is cut off" in line]
    assert f"the first is {config.parent}/rows.jsonl:" in cut
    assert "raise data.seq_len" in cut


def test_what_rows_hold_and_is_not_used_is_warned_of_once_for_both_parts(config: Path, capsys: Any) -> None:
    lines = [json.loads(line) for line in (config.parent / "rows.jsonl").read_text().splitlines()]
    (config.parent / "rows.jsonl").write_text("".join(json.dumps({**line, "id": 7}) + "\n" for line in lines))
    for _ in range(2):  # made, and found
        made(config)
        told = [line for line in capsys.readouterr().err.splitlines() if "nor used otherwise" in line]
        assert len(told) == 1
        assert "id (40 rows, the first is " in told[0]


def test_few_rows_are_all_for_training_and_it_is_said(config: Path, capsys: Any) -> None:
    lines = (config.parent / "rows.jsonl").read_text().splitlines(keepends=True)
    (config.parent / "rows.jsonl").write_text("".join(lines[:4]))
    found = made(config, "data.val_fraction=0.01")
    assert [(part["key"], part["samples"]) for part in found["parts"]] == [("data.train", 4)]
    assert "data.val_fraction: 0.01 holds out none of 4 rows, which are few" in capsys.readouterr().err


def test_what_has_changed_is_named_when_rows_are_tokenised_anew(config: Path, capsys: Any) -> None:
    folder = config.parent
    (folder / "template.jinja").write_text(CHATML.replace("<|im_end|>", "<|eot_id|>"))

    def changed(*overrides: str) -> list[str]:
        assert made(config, *overrides)["made_now"]
        told = capsys.readouterr().err.splitlines()
        return [line.partition("): ")[2] for line in told if "[data] data.train (" in line and "changed" in line]

    anew = "changed since its rows were tokenised: tokenising them anew"
    assert changed() == []
    assert changed("data.seq_len=19") == [f"options have {anew}"]
    assert changed(f"data.chat_template={folder}/template.jinja") == [f"template has {anew}"]
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert changed() == [f"rows have {anew}"]
    tiny_chat_tokenizer(CHATML, adds_bos=True).save_pretrained(folder / "tokenizer")
    assert changed() == [f"tokenizer has {anew}"]
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"text": "and more"}\n')
    assert changed("data.truncation=left") == [f"rows and options have {anew}"]


def test_bad_rows_are_reported_and_nothing_is_kept(config: Path, capsys: Any) -> None:
    with (config.parent / "rows.jsonl").open("a") as file:
        file.write('{bad\n{"messages": []}\n')
    assert run(["prepare", str(config)]) == 2
    told = capsys.readouterr().err
    assert f"{config.parent}/rows.jsonl:41: is no JSON" in told
    assert f"{config.parent}/rows.jsonl:42: " in told
    assert not list((config.parent / "cache").glob("samples-*"))
    skipped = made(config, "data.on_error=skip")
    assert (skipped["rows"], skipped["samples"]) == (42 + 2, 40), "both parts have read the bad ones"
    (warning,) = skipped["parts"][1]["warnings"]
    assert warning.startswith(f"2 rows are left out (data.on_error: skip):\n  {config.parent}/rows.jsonl:41: ")
    assert made(config, "data.on_error=skip")["parts"][1]["warnings"] == [warning]


def test_a_prepare_section_is_not_for_rows(config: Path, capsys: Any) -> None:
    assert run(["prepare", str(config), 'prepare={"input": "x", "output": "y"}']) == 2
    assert "data.name is chat, whose rows need no `prepare` section" in capsys.readouterr().err
