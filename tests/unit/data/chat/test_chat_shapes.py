"""Shapes: each row is recognised by its keys, brought into one form, or rejected with what is wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmtrain.data.chat.shapes import Chat, PromptCompletion, Text, example_of
from llmtrain.data.files.row_faults import RowError

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def chat(row: dict[str, Any]) -> Chat:
    found = example_of(row)
    assert isinstance(found, Chat)
    return found


def test_messages_and_conversations_become_the_same_turns() -> None:
    one = chat({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]})
    other = chat(
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        }
    )
    assert one.messages == other.messages == [{"role": "system", "content": "s"}, USER, ANSWER]
    assert one.supervised == {2}
    assert (one.shape, other.shape) == ("messages", "conversations")


@pytest.mark.parametrize("key", ["completion", "response", "output"])
def test_prompt_rows_with_each_name_of_the_completion(key: str) -> None:
    assert example_of({"prompt": "p", key: " c", "id": 3}) == PromptCompletion("p", " c")


def test_instruction_rows_become_a_turn_and_an_answer() -> None:
    with_input = chat({"instruction": "Add.", "input": "1 2", "output": "3"})
    assert [turn["content"] for turn in with_input.messages] == ["Add.\n\n1 2", "3"]
    assert [turn["content"] for turn in chat({"instruction": "Hi.", "input": "", "output": "3"}).messages] == [
        "Hi.",
        "3",
    ]
    assert with_input.supervised == {1}


def test_turns_in_a_prompt_are_not_learned_from() -> None:
    found = chat({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert found.supervised == {3}
    assert chat({"prompt": [USER], "completion": "a"}).messages == [USER, ANSWER]


@pytest.mark.parametrize("key", ["weight", "train", "loss", "trainable"])
@pytest.mark.parametrize("no", [0, False])
def test_turns_that_say_so_are_not_learned_from(key: str, no: Any) -> None:
    found = chat({"messages": [USER, {**ANSWER, key: no}, {**USER, key: no}, {**ANSWER, key: 1}]})
    assert found.supervised == {3}
    assert found.messages[1] == ANSWER
    assert found.unused == ()
    both = chat({"messages": [USER, {**ANSWER, key: True}, {**USER, key: True}, {**ANSWER, "loss": None, "weight": 1}]})
    assert both.supervised == {1, 3}
    assert both.unused == (f"turn.{key} (user)",), "a question is not learned, whatever it says"


def test_system_text_beside_the_turns_comes_first() -> None:
    system = {"role": "system", "content": "s"}
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"instruction": "q", "output": "a"},
        {"messages": [system, USER, ANSWER]},
    ]
    for row in rows:
        found = chat({**row, "system": "s"})
        assert found.messages == [system, USER, ANSWER]
        assert (set(found.supervised), found.unused) == ({2}, ())
    found = chat({"messages": [system, USER, ANSWER], "system": {"a": 1}})
    assert (found.messages[0], found.unused) == (system, ("system",))


def test_input_context_and_history_of_an_instruction_are_used() -> None:
    found = chat({"instruction": "q", "input": " ", "context": "c", "output": "a", "history": [["b", "d"]]})
    earlier = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "d"}]
    assert found.messages == [*earlier, {"role": "user", "content": "q\n\nc"}, ANSWER]
    assert (set(found.supervised), found.unused) == ({1, 3}, ())
    both = chat({"instruction": "q", "input": "i", "context": "c", "output": "a", "history": '[["b", "d"]]'})
    assert both.messages[2]["content"] == "q\n\ni\n\nc"
    assert chat({"instruction": "q", "output": "a", "history": earlier}).messages[:2] == earlier


def test_fields_that_no_shape_uses_are_named() -> None:
    row = {"messages": [USER, ANSWER], "context": "c", "id": 0, "note": None, "tags": [], "topic": " "}
    assert example_of(row).unused == ("context", "id")
    assert example_of({"prompt": "p", "completion": "c", "system": "s"}).unused == ("system",)
    assert example_of({"text": "t", "meta": {"a": 1}}).unused == ("meta",)


def test_a_row_is_text_by_its_text_key_or_by_the_named_column() -> None:
    assert example_of({"text": "t"}) == Text("t")
    assert example_of({"body": "t", "messages": [USER, ANSWER]}, text_column="body") == Text("t")
    assert isinstance(example_of({"messages": [USER, ANSWER], "text": None}, text_column="text"), Chat)


def test_tool_turns_and_calls_are_kept_as_they_are() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    found = chat(
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "", "tool_call_id": "1", "name": None},
                ANSWER,
            ],
            "tools": '[{"type": "function", "function": {"name": "add"}}]',
        }
    )
    assert found.messages[1]["tool_calls"] == [call]
    assert found.messages[1]["content"] == ""
    assert found.messages[2] == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]
    assert found.supervised == {1, 3}


def test_an_empty_list_of_calls_is_none() -> None:
    assert chat({"messages": [USER, {**ANSWER, "tool_calls": []}]}).messages == [USER, ANSWER]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "add", "arguments": {"a": 1}}',
        '[{"name": "add", "arguments": {"a": 1}}]',
        '{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}',
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n',
    ],
)
@pytest.mark.parametrize("role", ["function_call", "tool_call", "FUNCTION_CALL"])
def test_calls_results_and_tools_of_sharegpt_become_those_that_templates_know(role: str, value: str) -> None:
    found = chat(
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": role, "value": value},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "add", "parameters": {}}]',
        }
    )
    result = {"role": "tool", "content": "3"}
    assert found.messages == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, ANSWER]
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert (set(found.supervised), found.unused) == ({1, 3}, ())


def test_function_call_and_functions_are_the_older_names() -> None:
    call = {"name": "add", "arguments": '{"a": 1.10}'}
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "function_call": call}, {**USER, "role": "function"}],
        "functions": [{"name": "add"}],
    }
    found = chat(row)
    assert found.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert (found.tools, found.unused) == ([{"type": "function", "function": {"name": "add"}}], ())


HALF = "\ud800"


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"messages": [{**USER, "content": HALF}, ANSWER]}, "messages[0].content"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": HALF}]}, "messages[1].reasoning_content"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": {"a": HALF}}}]}]},
            "arguments.a",
        ),
        (
            {
                "messages": [
                    USER,
                    {**ANSWER, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]},
                ]
            },
            "the call of 'f'.a",
        ),
        ({"messages": [USER, ANSWER], "tools": [{"name": "f", "description": HALF}]}, "tools[0].description"),
        ({"messages": [USER, ANSWER], "tools": '[{"name": "\\ud800"}]'}, "tools[0].name"),
        ({"messages": [USER, ANSWER], "meta": {"a": [HALF]}}, "meta.a[0]"),
        ({"prompt": "p", "completion": "c", HALF: 1}, ""),
        ({"text": HALF}, "text"),
    ],
)
def test_half_of_a_surrogate_pair_is_a_fault_wherever_it_stands(row: dict[str, Any], where: str) -> None:
    with pytest.raises(RowError, match="holds half of a surrogate pair") as raised:
        example_of(row)
    assert where in str(raised.value)
    str(raised.value).encode()


def test_turns_may_be_json_text_in_every_format() -> None:
    rows = [{"messages": json.dumps([USER, ANSWER])}, {"instruction": "do", "output": "y", "history": '[["a", "b"]]'}]
    assert [[turn["role"] for turn in chat(row).messages] for row in rows] == [
        ["user", "assistant"],
        ["user", "assistant", "user", "assistant"],
    ]
    assert chat(rows[0]) == chat({"messages": [USER, ANSWER]})
    for key in ("messages", "conversations"):
        with pytest.raises(RowError, match="half of a surrogate pair"):
            example_of({key: '[{"role": "user", "content": "\\ud83c"}, {"role": "assistant", "content": "a"}]'})
    with pytest.raises(RowError, match="half of a surrogate pair"):
        example_of({"instruction": "do", "output": "y", "history": '[["\\ud83c", "b"]]'})


def test_content_in_parts_is_put_together() -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    assert chat({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"] == "q?"


def test_the_text_of_a_part_of_another_type_is_not_taken_for_the_answer() -> None:
    parts = [{"type": "reasoning", "text": "hmm"}, {"type": "text", "text": "a"}]
    with pytest.raises(RowError, match=r"turn 2 \(assistant\) has a part of type 'reasoning'; only text is learned"):
        example_of({"messages": [USER, {"role": "assistant", "content": parts}]})
    said = [{"type": "output_text", "text": "a"}, {"type": None, "text": "b"}, "c"]
    assert chat({"messages": [USER, {"role": "assistant", "content": said}]}).messages[1]["content"] == "abc"


DEEP: Any = json.loads('{"a": [' * 400 + "]}" * 400)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "has no keys"),
        ({"mesages": []}, "only the keys 'mesages'; did you mean 'messages' by 'mesages'?"),
        ({"id": 1, "url": 2}, "has none of the known shapes"),
        ({"messages": None}, "'messages' is null"),
        ({"messages": "hi"}, "'messages' should be a list of turns, but is text"),
        ({"messages": []}, "has no turn of the assistant to learn from in 'messages' (no turns)"),
        ({"messages": [USER]}, "has no turn of the assistant to learn from in 'messages' (user)"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "has no turn of the assistant to learn from"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "turn 2 has the weight 0.5"),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, "turn 2 has the train 'no'"),
        (
            {"conversations": [{"from": "function_call", "value": "add 1"}]},
            "turn 1 should hold the call of a tool as JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": '{"a": 1}'}]}, "turn 1 should hold the call of a tool"),
        (
            {"conversations": [{"from": "function_call", "value": '{"function": null}'}]},
            "turn 1 should hold the call of a tool",
        ),
        ({"conversations": [{"from": "function_cal", "value": "x"}]}, "did you mean 'function_call'?"),
        ({"messages": [USER, ["a"]]}, "turn 2 should be an object with role and content, but is a list"),
        ({"messages": [{"content": "q"}, ANSWER]}, "turn 1 has no 'role', only the keys 'content'"),
        ({"messages": [{"role": "usr", "content": "q"}]}, "turn 1 has the unknown role 'usr'; did you mean 'user'?"),
        ({"messages": [{"role": 7, "content": "q"}]}, "known are system, developer, user, assistant, tool"),
        ({"messages": [{"role": "user", "content": " \n"}, ANSWER]}, "turn 1 (user) is empty"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "turn 2 (assistant) is empty"),
        ({"messages": [USER, {"role": "assistant"}]}, "turn 2 (assistant) has no 'content'"),
        ({"messages": [{"role": "user", "value": "q"}]}, "turn 1 (user) has 'value' beside 'role': name it 'content'"),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            "should have text as its content, but has a number",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has a part of type 'image_url'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            "has a part whose text is miss",
        ),
        ({"text": "a", "more": DEEP}, "'more' is nested more than 100 levels deep"),
        ({"messages": json.dumps([DEEP])}, "'messages' is nested more than 100 levels deep"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"conversations": [{"from": "human", "value": ""}]}, "turn 1 (human) is empty"),
        ({"prompt": "p"}, "has 'prompt' but no 'completion' (nor 'response' or 'output')"),
        ({"prompt": "p", "compleition": "c"}, "did you mean 'completion' by 'compleition'?"),
        ({"instruction": "p"}, "has 'instruction' but no 'output' (nor 'completion' or 'response')"),
        ({"prompt": "p", "completion": ""}, "'completion' is empty"),
        ({"prompt": "p", "completion": 4}, "'completion' should be text, but is a number"),
        ({"prompt": [USER], "completion": {}}, "'completion' is no list of turns, but 'prompt' is one"),
        ({"text": ["a"]}, "'text' should be text, but is a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{}]}]}, "turn 2 calls a tool without a name"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "turn 2: the arguments of the call of 'f' are no JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "x"}, "'tools' is text, but no JSON"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as raised:
        example_of(row)
    assert message in str(raised.value)
