"""Shapes: each row is told by its keys, brought into one form, or refused with what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from llmtrain.data.chat.faults import RowError
from llmtrain.data.chat.shapes import Chat, Completion, Text, example_of

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
    assert example_of({"prompt": "p", key: " c", "id": 3}) == Completion("p", " c")


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


def test_turns_of_weight_zero_are_not_learned_from() -> None:
    found = chat({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})
    assert found.supervised == {3}
    assert found.messages[1] == ANSWER


def test_text_rows_and_a_named_column() -> None:
    assert example_of({"text": "t"}) == Text("t")
    assert example_of({"body": "t", "messages": [USER, ANSWER]}, text_column="body") == Text("t")
    assert isinstance(example_of({"messages": [USER, ANSWER], "text": None}, text_column="text"), Chat)


def test_tool_turns_and_calls_are_kept_with_their_arguments_as_objects() -> None:
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
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert found.messages[1]["content"] == ""
    assert found.messages[2] == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]
    assert found.supervised == {1, 3}


def test_content_in_parts_is_put_together() -> None:
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    assert chat({"messages": [{"role": "user", "content": parts}, ANSWER]}).messages[0]["content"] == "q?"


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
