"""Rows as questions: which text a model is given, what it should answer, and which rows ask nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.row_faults import RowError
from llmtrain.errors import ConfigError
from llmtrain.evaluation.questions import Question, read_questions, render_question, short_names
from tests.support.chat import CHATML, HEADED, tiny_chat_tokenizer


def write_rows(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def turns(*texts: str) -> dict[str, Any]:
    roles = ["user", "assistant"]
    return {"messages": [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]}


def read(*paths: str, **options: Any) -> list[Question]:
    return read_questions(paths, key="evaluation.data", **options)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate(tiny_chat_tokenizer(CHATML))


def test_a_prompt_is_rendered_as_it_is_or_as_a_users_turn(tmp_path: Path, template: ChatTemplate) -> None:
    (question,) = read(write_rows(tmp_path / "a.jsonl", {"prompt": "What is it?", "completion": " a cat"}))
    assert (question.prompt, question.expected, question.source) == ("What is it?", " a cat", f"{tmp_path}/a.jsonl:1")
    plain = render_question(question, template, chat=False)
    assert (plain.text, plain.is_complete) == ("What is it?", False)
    turn = render_question(question, template, chat=True)
    assert turn.text == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert turn.is_complete
    assert turn.with_answer.text == f"{turn.text}a cat<|im_end|>\n"


def test_the_last_answer_of_a_conversation_is_expected(tmp_path: Path, template: ChatTemplate) -> None:
    (question,) = read(write_rows(tmp_path / "a.jsonl", turns("hi", "hello", "who?", "me", "and?")))
    assert question.expected == "me"
    assert question.prompt == "user: hi\n\nassistant: hello\n\nuser: who?"
    rendered = render_question(question, template, chat=False)
    assert rendered.text.endswith("user\nwho?<|im_end|>\n<|im_start|>assistant\n")
    assert "hello" in rendered.text
    assert "and?" not in rendered.with_answer.text


def test_values_that_a_model_is_not_shown_are_named_or_a_fault(tmp_path: Path, template: ChatTemplate) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    first, *others = turns("hi", "hello", "more?")["messages"]
    (question,) = read(write_rows(tmp_path / "a.jsonl", {"messages": [{**first, "name": "Ann"}, *others], "id": 3}))
    assert render_question(question, template, chat=False).unused == ("id", "turns after the last answer", "turn.name")
    (question,) = read(write_rows(tmp_path / "b.jsonl", {"messages": [first, call, *others[:1]]}))
    shows_no_calls = ChatTemplate(tiny_chat_tokenizer(HEADED))
    with pytest.raises(RowError, match="does not show the call of 'f' in turn 2"):
        render_question(question, shows_no_calls, chat=False)


def test_equal_questions_have_equal_keys(tmp_path: Path, template: ChatTemplate) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}, {"prompt": "a", "completion": "b"}]
    keys = [
        render_question(question, template, chat=False).key
        for question in read(write_rows(tmp_path / "a.jsonl", *rows))
    ]
    assert keys[0] == keys[2] != keys[1]


def test_the_first_rows_of_each_file_are_taken(tmp_path: Path) -> None:
    files = [
        write_rows(tmp_path / name, *({"prompt": f"{name}{number}", "completion": "x"} for number in range(5)))
        for name in ("b.jsonl", "a.jsonl")
    ]
    found = read(*files, max_samples=2)
    assert [question.prompt for question in found] == ["b.jsonl0", "b.jsonl1", "a.jsonl0", "a.jsonl1"]
    assert short_names(question.file for question in found) == {files[0]: "b.jsonl", files[1]: "a.jsonl"}
    assert short_names(["x/test.jsonl", "y/test.jsonl"]) == {
        "x/test.jsonl": "x/test.jsonl",
        "y/test.jsonl": "y/test.jsonl",
    }


def test_rows_without_a_question_are_named_by_file_and_line(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    file = write_rows(
        tmp_path / "bad.jsonl",
        {"prompt": "a", "completion": "b"},
        {"text": "just text"},
        {"messages": [{"role": "assistant", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, call]},
    )
    with pytest.raises(ConfigError) as caught:
        read(file)
    message = str(caught.value)
    assert f"{file}:2: is a row of text, which asks nothing" in message
    assert f"{file}:3: begins with the assistant's turn" in message
    assert f"{file}:4: expects an answer without text" in message
    assert f"{file}:1" not in message
