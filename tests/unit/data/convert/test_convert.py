"""`convert` writes rows that `train` reads: whole or not at all, never in place, and says what it left out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.cli.app import run
from llmtrain.data.chat.shapes import example_of
from llmtrain.data.convert.columns import Columns
from llmtrain.data.files.read import Row, read_rows
from llmtrain.errors import ConfigError, RunError
from llmtrain.verbs.convert import convert

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHAREGPT = {"id": "x1", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]}


def chatgpt(*turns: tuple[str, str], title: str = "A talk") -> dict[str, Any]:
    """A conversation as ChatGPT exports it, without forks."""
    mapping: dict[str, Any] = {"0": {"id": "0", "message": None, "parent": None, "children": ["1"]}}
    for number, (role, text) in enumerate(turns, 1):
        message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
        mapping[str(number)] = {"parent": str(number - 1), "children": [str(number + 1)], "message": message}
    return {"title": title, "mapping": mapping, "current_node": str(len(turns))}


def rows(path: Path) -> list[Any]:
    """The rows of a JSONL file, each of them one that can be trained on."""
    found = list(read_rows(str(path), key="data.train"))
    assert all(isinstance(row, Row) and example_of(row.values) for row in found)
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]


def skips(result: dict[str, Any]) -> list[tuple[str, str]]:
    """(place within the folder, reason)"""
    return [(skip["source"].rpartition("/")[2], skip["reason"]) for skip in result["skips"]]


def test_a_chatgpt_export_becomes_messages_and_what_cannot_is_named_by_title(tmp_path: Path) -> None:
    long = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    export = [chatgpt(*long), chatgpt(("user", "Anyone?"), title="Alone"), chatgpt(*long[:2], title="Two")]
    (tmp_path / "conversations.json").write_text(json.dumps(export))
    result = convert([str(tmp_path / "conversations.json")], str(tmp_path / "out.jsonl"))
    messages = [{"role": role, "content": text} for role, text in long]
    assert rows(tmp_path / "out.jsonl") == [{"messages": messages}, {"messages": messages[:2]}]
    reason = "has no turn of the assistant to learn from in 'messages' (user)"
    assert skips(result) == [("conversations.json:1 (row 2) 'Alone'", reason)]
    assert (result["rows"], result["converted"], result["skipped"]) == (2, 2, 1)


@pytest.mark.parametrize("packed", [False, True])
def test_of_an_export_only_the_conversations_are_read(tmp_path: Path, packed: bool) -> None:
    members = {"user.json": "{}", "chat.html": "", "shared_conversations.json": "[{}]"}
    members |= {
        f"conversations-00{n}.json": json.dumps([chatgpt(("user", f"{n}"), ("assistant", "b"))]) for n in (0, 1)
    }
    source = tmp_path / "export"
    source.mkdir()
    for name, text in members.items():
        (source / name).write_text(text)
    if packed:
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            for name in members:
                archive.write(source / name, f"inner/{name}")
        source = tmp_path / "export.zip"
    result = convert([str(source)], str(tmp_path / "out.jsonl"))
    assert [row["messages"][0]["content"] for row in rows(tmp_path / "out.jsonl")] == ["0", "1"]
    assert (result["rows"], result["skipped"]) == (2, 0)


@pytest.mark.parametrize("layout", ["array", "pretty array", "pretty objects", "wrapped"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_over_several_lines_becomes_a_line_a_row_whatever_its_suffix(
    layout: str, suffix: str, tmp_path: Path
) -> None:
    values = [{"prompt": "é\n", "completion": " x", "id": 7}, {"messages": TURNS, "topic": None}]
    texts = {
        "array": json.dumps(values),
        "pretty array": json.dumps(values, indent=2),
        "pretty objects": "\n".join(json.dumps(value, indent=4) for value in values),
        "wrapped": json.dumps({"data": values}, indent=1),
    }
    (tmp_path / f"in{suffix}").write_text(texts[layout])
    result = convert([str(tmp_path / f"in{suffix}")], str(tmp_path / "out.jsonl"))
    assert rows(tmp_path / "out.jsonl") == values
    assert (result["converted"], result["copied"], result["skipped"]) == (2, 0, 0)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json"])
def test_valid_jsonl_is_copied_byte_for_byte(suffix: str, tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"prompt":"a",  "completion" : " \\u00e9"}\r\n\n'
        b'{"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}], "x": 1}\n{"text":"d"}'
    )
    (tmp_path / f"in{suffix}").write_bytes(content)
    result = convert([str(tmp_path / f"in{suffix}")], str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert (result["copied"], result["converted"], result["skipped"]) == (3, 0, 0)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as stream:
        stream.write(content)
    convert([str(tmp_path / "packed.jsonl.gz")], str(tmp_path / "unpacked.jsonl"))
    assert (tmp_path / "unpacked.jsonl").read_bytes() == content


def test_of_jsonl_with_bad_lines_the_others_are_copied_and_each_bad_one_is_named(tmp_path: Path) -> None:
    good = b'{"text":  "a"}\n'
    bad = b'{"text": "b"\n{"text": ""}\n{"promt": "a", "completion": "b"}\n\xff\n'
    (tmp_path / "in.jsonl").write_bytes(bad + good + b'{"question": "q", "answer": " a"}\n' + good)
    result = convert([str(tmp_path / "in.jsonl")], str(tmp_path / "out.jsonl"))
    named = b'{"prompt": "q", "completion": " a"}\n'
    assert (tmp_path / "out.jsonl").read_bytes() == good + named + good
    found = skips(result)
    assert [place for place, _ in found] == ["in.jsonl:1", "in.jsonl:2", "in.jsonl:3", "in.jsonl:4"]
    assert found[1][1] == "'text' is empty"
    assert "did you mean 'prompt' by 'promt'" in found[2][1]
    assert (result["copied"], result["converted"], result["skipped"]) == (2, 1, 4)


def test_files_that_are_put_together_are_cut_at_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text":"a"}')
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text":"b"}\n')
    (tmp_path / "c.json").write_text('[{"text": "c"}]')
    convert([str(tmp_path / "*.json*")], str(tmp_path / "out" / "all.jsonl"))
    assert (tmp_path / "out/all.jsonl").read_bytes() == b'{"text":"a"}\n{"text":"b"}\n{"text": "c"}\n'


def test_a_folder_becomes_a_folder_of_the_same_names(tmp_path: Path) -> None:
    for name in ("train.json", "deep/test.csv", "deep/test.jsonl"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "in/train.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]))
    (tmp_path / "in/deep/test.csv").write_text("text\nc\n")
    (tmp_path / "in/deep/test.jsonl").write_text('{"text":"d"}\n')
    (tmp_path / "in/package.json").write_text('{"name": "x"}')
    result = convert([str(tmp_path / "in")], str(tmp_path / "out"))
    names = {"train.jsonl": 2, "deep/test.csv.jsonl": 1, "deep/test.jsonl.jsonl": 1}
    assert {one["name"]: one["rows"] for one in result["outputs"]} == names
    assert {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.jsonl")} == set(names)
    assert result["skipped"] == 1
    with pytest.raises(ConfigError, match="must not be mixed"):
        convert([str(tmp_path / "in")], str(tmp_path / "out.jsonl"))


def test_sharegpt_becomes_messages(tmp_path: Path) -> None:
    system = {"system": "Be brief.", "conversations": SHAREGPT["conversations"], "tools": '[{"name": "f"}]'}
    (tmp_path / "in.json").write_text(json.dumps([SHAREGPT, system, {"conversations": []}]))
    result = convert([str(tmp_path / "in.json")], str(tmp_path / "out.jsonl"))
    brief = {"role": "system", "content": "Be brief."}
    assert rows(tmp_path / "out.jsonl") == [
        {"messages": TURNS},
        {"messages": [brief, *TURNS], "tools": [{"type": "function", "function": {"name": "f"}}]},
    ]
    assert result["skipped"] == 1
    assert result["unused"] == {"id": {"rows": 1, "first": f"{tmp_path}/in.json:1"}}


def test_calls_of_sharegpt_become_tool_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [
        {"from": "human", "value": "Why?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Because.", "loss": False},
    ]
    (tmp_path / "in.jsonl").write_text(json.dumps({"conversations": talk, "tools": '[{"name": "f"}]', "n": 1}) + "\n")
    assert run(["convert", str(tmp_path / "in.jsonl"), str(tmp_path / "copy.jsonl")]) == 0
    assert (tmp_path / "copy.jsonl").read_bytes() == (tmp_path / "in.jsonl").read_bytes(), "a valid row already"
    (tmp_path / "in.json").write_text(json.dumps([{"conversations": talk, "tools": '[{"name": "f"}]', "n": 1}]))
    assert run(["convert", str(tmp_path / "in.json"), str(tmp_path / "out.jsonl")]) == 0
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert rows(tmp_path / "out.jsonl") == [
        {
            "messages": [
                TURNS[0],
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "1"},
                {**TURNS[1], "weight": 0},
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        }
    ]
    assert "left out of rows" in capsys.readouterr().out


def test_half_characters_are_skipped_wherever_they_stand(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": " b"}
    bad = [{**good, "meta": {"a": "\ud83d"}}, {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "\ud83d"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*bad, good]))
    result = convert([str(tmp_path / "in.jsonl")], str(tmp_path / "out.jsonl"))
    assert rows(tmp_path / "out.jsonl") == [good]
    half = "holds half of a surrogate pair, which is no valid Unicode"
    where = {"in.jsonl:1": "meta.a", "in.jsonl:2": "messages[1].reasoning_content"}
    assert skips(result) == [(place, f"{path!r} {half}") for place, path in where.items()]


def test_columns_that_become_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("question,answer,id,system,empty\na,b,7,s,\nc,d,8,,\n")
    result = convert([str(tmp_path / "in.csv")], str(tmp_path / "out.jsonl"))
    assert result["unused"] == {"id": {"rows": 2, "first": f"{tmp_path}/in.csv:2"}}
    (tmp_path / "in.json").write_text(
        json.dumps([{"prompt": "a", "completion": "b", "system": "s", "history": [["c", "d"]]}])
    )
    result = convert([str(tmp_path / "in.json")], str(tmp_path / "out"), as_messages=True)
    assert result["unused"] == {"history": {"rows": 1, "first": f"{tmp_path}/in.json:1"}}
    (row,) = rows(tmp_path / "out/in.jsonl")
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("prompt,completion", {"prompt": "a", "completion": "b"}),
        ("Question,Answer", {"prompt": "a", "completion": "b"}),
        (" INPUT , Output ", {"prompt": "a", "completion": "b"}),
        ("query,response", {"prompt": "a", "completion": "b"}),
        ("instruction,output", {"instruction": "a", "output": "b"}),
        ("prompt,response", {"prompt": "a", "completion": "b"}),
        ("text,label", {"text": "a"}),
    ],
)
def test_usual_names_of_columns_are_found_alone(header: str, row: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text(f"{header},id\na,b,7\n")
    convert([str(tmp_path / "in.csv")], str(tmp_path / "out.jsonl"))
    assert rows(tmp_path / "out.jsonl") == [row]


def test_columns_are_named_by_options_in_any_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("q;a;s\nWhy?;Because.;Be brief.\nHow?;So.;\n;x;y\n")
    (tmp_path / "in.jsonl").write_text('{"q": "Why?", "answer": "Because.", "text": "no"}\n{"Q": "How?"}\n')
    columns = Columns(prompt="q", completion="a", system="s")
    result = convert([str(tmp_path / "in.csv")], str(tmp_path / "a.jsonl"), columns=columns)
    brief = {"role": "system", "content": "Be brief."}
    assert rows(tmp_path / "a.jsonl") == [{"messages": [brief, *TURNS]}, {"prompt": "How?", "completion": "So."}]
    assert skips(result) == [("in.csv:4", "turn 2 (user) is empty")]
    result = convert([str(tmp_path / "in.jsonl")], str(tmp_path / "b.jsonl"), columns=Columns(prompt="q"))
    assert rows(tmp_path / "b.jsonl") == [{"prompt": "Why?", "completion": "Because."}]
    assert skips(result) == [("in.jsonl:2", "has no column 'q' (--prompt-column); did you mean 'Q'?")]
    (tmp_path / "turns.csv").write_text(
        f"talk,s\n{json.dumps(json.dumps(TURNS)).replace(chr(92), chr(34))},Be brief.\n"
    )
    columns = Columns(messages="talk", system="s")
    convert([str(tmp_path / "turns.csv")], str(tmp_path / "d.jsonl"), columns=columns)
    assert rows(tmp_path / "d.jsonl") == [{"messages": [brief, *TURNS]}]
    convert([str(tmp_path / "in.jsonl")], str(tmp_path / "c.jsonl"), columns=Columns(text="answer"))
    assert rows(tmp_path / "c.jsonl") == [{"text": "Because."}]


def test_prompts_become_conversations_when_asked_to(tmp_path: Path) -> None:
    values = [{"prompt": "Why?", "completion": "Because."}, {"instruction": "Why?", "input": "", "output": "Because."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    convert([str(tmp_path / "in.jsonl")], str(tmp_path / "out.jsonl"), as_messages=True)
    assert rows(tmp_path / "out.jsonl") == [{"messages": TURNS}] * 2


def test_parquet_and_lists_of_turns_lose_what_is_null(tmp_path: Path) -> None:
    turns = [{**TURNS[0], "weight": None}, {**TURNS[1], "weight": 0}, {**TURNS[1], "weight": 1}]
    parquet.write_table(pa.table({"messages": [turns], "made": [1.5]}), tmp_path / "in.parquet")
    convert([str(tmp_path / "in.parquet")], str(tmp_path / "out.jsonl"))
    assert rows(tmp_path / "out.jsonl") == [{"messages": [TURNS[0], {**TURNS[1], "weight": 0}, TURNS[1]]}]


def test_arrow_and_zstd_are_read_as_everywhere(tmp_path: Path) -> None:
    table = pa.table({"question": ["Why?"], "answer": ["Because."]})
    with pa.ipc.new_stream(tmp_path / "in.arrow", table.schema) as writer:
        writer.write_table(table)
    with pa.output_stream(tmp_path / "more.jsonl.zst", compression="zstd") as stream:
        stream.write(b'{"text":  "a"}\n')
    result = convert([str(tmp_path / "in.arrow"), str(tmp_path / "more.jsonl.zst")], str(tmp_path / "out"))
    assert {one["name"]: one["rows"] for one in result["outputs"]} == {"in.jsonl": 1, "more.jsonl": 1}
    assert rows(tmp_path / "out/in.jsonl") == [{"prompt": "Why?", "completion": "Because."}]
    assert (tmp_path / "out/more.jsonl").read_bytes() == b'{"text":  "a"}\n'


def test_an_export_that_is_damaged_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        archive.writestr("conversations.json", json.dumps([chatgpt(("user", "Why?"), ("assistant", "Because."))]))
    content = (tmp_path / "export.zip").read_bytes()
    (tmp_path / "export.zip").write_bytes(content.replace(b"Because.", b"Because!"))
    with pytest.raises(ConfigError, match=r"export\.zip/conversations\.json: cannot be read \(Bad CRC-32"):
        convert([str(tmp_path / "export.zip")], str(tmp_path / "out.jsonl"))


def test_datasets_on_disk_are_read_by_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_list([{"question": name, "answer": "b"}] * 2) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "both"))
    splits["test"].save_to_disk(str(tmp_path / "one"))
    expected = [{"prompt": "test", "completion": "b"}]
    convert([str(tmp_path / "both")], str(tmp_path / "a.jsonl"), split="test[:1]")
    assert rows(tmp_path / "a.jsonl") == expected
    convert([str(tmp_path / "one")], str(tmp_path / "b.jsonl"))
    assert rows(tmp_path / "b.jsonl") == expected * 2
    result = convert([str(tmp_path / "both")], str(tmp_path / "out"))
    assert {one["name"]: one["rows"] for one in result["outputs"]} == {"train.jsonl": 2, "test.jsonl": 2}
    with pytest.raises(ConfigError, match='Unknown split "dev"'):
        convert([str(tmp_path / "both")], str(tmp_path / "c.jsonl"), split="dev")
    with pytest.raises(ConfigError, match="is no Hugging Face dataset"):
        convert([str(tmp_path / "a.jsonl")], str(tmp_path / "c.jsonl"), split="dev")


def test_splits_that_are_left_out_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    splits = {name: datasets.Dataset.from_list([{"prompt": name, "completion": "b"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk("both")
    splits["test"].save_to_disk("one")
    assert run(["convert", "both", "a.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "both/train is one split; test of the same dataset is left out: name a split with --split" in " ".join(
        said.split()
    )
    for arguments in (["both", "b.jsonl", "--split", "test"], ["both", "out"], ["one", "c.jsonl"]):
        assert run(["convert", *arguments]) == 0
        assert "left out" not in capsys.readouterr().out
    splits["train"].info.splits = datasets.SplitDict()
    for name in ("train", "validation"):
        splits["train"].info.splits.add(datasets.SplitInfo(name))
    monkeypatch.setattr("llmtrain.data.files.datasets.open_dataset", lambda _: splits["train"])
    assert convert(["hf://squad"], "d.jsonl")["other_splits"] == {"hf://squad:train": ["validation"]}
    assert convert(["hf://squad:train"], "e.jsonl")["other_splits"] == {}


def test_a_name_of_the_hub_is_asked_for_with_its_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def open_dataset(part: Any) -> Any:
        wanted.append(tuple(part))
        return datasets.Dataset.from_list([{"question": "a", "answer": "b"}])

    monkeypatch.setattr("llmtrain.data.files.datasets.open_dataset", open_dataset)
    convert(["openai/gsm8k"], str(tmp_path / "a.jsonl"), split="test[:1%]", subset="main")
    convert(["hf://squad"], str(tmp_path / "b.jsonl"))
    result = convert(["openai/gsm8k@main:test"], str(tmp_path / "c"))
    assert result["outputs"][0]["name"] == "gsm8k.jsonl"
    assert wanted.pop() == ("hf://openai/gsm8k", "main", "test", None)
    with pytest.raises(ConfigError, match="names what --split train names"):
        convert(["openai/gsm8k:test"], str(tmp_path / "d.jsonl"), split="train")
    assert wanted == [("hf://openai/gsm8k", "main", "test[:1%]", None), ("hf://squad", None, "train", None)]
    assert rows(tmp_path / "a.jsonl") == [{"prompt": "a", "completion": "b"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text('[{"text": "a"}]')
    return tmp_path / "in"


def test_nothing_is_converted_in_place(source: Path, tmp_path: Path) -> None:
    (source / "b.jsonl").write_text('{"text":"b"}\n')
    os.link(source / "b.jsonl", tmp_path / "linked.jsonl")
    (tmp_path / "symbolic").symlink_to(source)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    for named, out in [
        (source / "b.jsonl", source / "b.jsonl"),
        (source / "*", source / "b.jsonl"),
        (source / "b.jsonl", tmp_path / "linked.jsonl"),
        (source, source / "c.jsonl"),
        (source, source / "deep" / "c.jsonl"),
        (source, tmp_path / "symbolic" / "c.jsonl"),
        (source, source),
        (source / "b.jsonl", source),
        (source / "b.jsonl", tmp_path),
    ]:
        with pytest.raises(ConfigError, match=r"^OUT: .*(converted|other files)"):
            convert([str(named)], str(out), force=True)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


def test_what_is_there_is_replaced_only_by_force(source: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "out.jsonl", tmp_path / "out"):
        convert([str(source)], str(out))
        with pytest.raises(ConfigError, match="is there already: name another, or replace it with --force"):
            convert([str(source)], str(out))
    (source / "b.json").write_text('[{"text": "b"}]')
    (tmp_path / "out/old.jsonl").write_text('{"text":"old"}\n')
    for out in (tmp_path / "out.jsonl", tmp_path / "out"):
        assert convert([str(source)], str(out), force=True)["rows"] == 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.jsonl", "b.jsonl"]
    assert len(rows(tmp_path / "out.jsonl")) == 2
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other files in it \(notes.txt\)"):
        convert([str(source)], str(tmp_path / "out"), force=True)


@pytest.mark.parametrize("out", ["out.jsonl", "out"])
def test_an_output_that_fails_leaves_what_was_there(
    out: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert([str(source)], str(tmp_path / out))
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\)"):
        convert([str(source)], str(tmp_path / out), force=True)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_without_a_row_there_is_no_output_and_the_reasons_are_told(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError) as caught:
        convert([str(tmp_path / "in.csv")], str(tmp_path / "out.jsonl"))
    message = str(caught.value)
    assert "in.csv:2: has none of the known shapes" in message
    assert message.endswith("there is no row to write, so nothing was written")
    assert [file.name for file in tmp_path.iterdir()] == ["in.csv"]


@pytest.mark.parametrize(
    ("given", "out", "said"),
    [
        ("in/a.json", "out.csv", "should end in .jsonl, or be a folder"),
        ("in/a.json", "s3://b/out.jsonl", "only paths of this machine work"),
        ("in/b.json", "out.jsonl", "no such file"),
        ("in/rows", "out.jsonl", "there is no file or folder in/rows, so it was taken for a dataset of the Hub"),
        ("in/*.csv", "out.jsonl", "there are no rows at in/*.csv"),
        ("memory://nowhere/rows", "out.jsonl", "memory://nowhere/rows: there is no such object"),
        ("in/x.zip", "out.jsonl", "in/x.zip cannot be read"),
        ("in/a.json in/a.json", "out.jsonl", "in/a.json is named twice"),
        ("in/a.json --text-column a --prompt-column b", "out.jsonl", "a row has one shape"),
    ],
)
def test_a_wrong_in_out_or_option_gives_one_message(
    given: str,
    out: str,
    said: str,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (source / "x.zip").write_text("no zip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(source.parent)
    assert run(["convert", *given.split(), out]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") <= 2


def test_the_program_prints_counts_and_what_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.csv").write_text("question,answer\na,b\n" + "a,\n" * 30)
    assert run(["convert", "in.csv", "out.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "converted            1\nskipped              30\n" in text
    assert "  in.csv:3: 'completion' is empty\n" in text
    assert "… and 10 more" in text
    assert "--as-messages turns them into conversations" in text
    assert run(["convert", "in.csv", "out.jsonl", "--force", "--json", "--as-messages"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["rows"], document["shapes"], len(document["skips"])) == (1, {"messages": 1}, 30)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: not text.isspace()
)


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8))
def test_any_text_comes_through_csv_and_json_as_it_was(
    pairs: list[tuple[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    table = io.StringIO()
    writer = csv.writer(table, quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "completion"), *pairs])
    (folder / "in.csv").write_text(table.getvalue(), "utf-8", newline="")
    values = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    (folder / "in.json").write_text(json.dumps(values, ensure_ascii=False, indent=1), "utf-8")
    for name in ("in.csv", "in.json"):
        convert([str(folder / name)], str(folder / f"{name}.jsonl"))
        assert [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()] == values
