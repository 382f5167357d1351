"""ChatGPT's tree of turns becomes the one branch that was on the screen, and what is no turn is counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llmtrain.data.convert.chatgpt import turns_of
from llmtrain.data.files.row_faults import RowError


def node(
    name: str, parent: str | None, role: str | None, *parts: Any, content: dict[str, Any] | None = None, **message: Any
) -> tuple[str, dict[str, Any]]:
    """A node as exports have it; without a role, the root, which has no message."""
    body = {"author": {"role": role}, "content": content or {"content_type": "text", "parts": list(parts)}, **message}
    return name, {"id": name, "parent": parent, "children": [], "message": body if role else None}


def conversation(*nodes: tuple[str, dict[str, Any]], current: str | None) -> dict[str, Any]:
    mapping = dict(nodes)
    for name, one in nodes:
        if one["parent"] in mapping:
            mapping[one["parent"]]["children"].append(name)
    return {"title": "A talk", "mapping": mapping, "current_node": current}


def turns(*nodes: tuple[str, dict[str, Any]], current: str | None) -> tuple[list[tuple[str, str]], dict[str, int]]:
    left_out: Counter[str] = Counter()
    found = turns_of(conversation(*nodes, current=current), left_out)
    return [(turn["role"], turn["content"]) for turn in found], dict(left_out)


FORK = (
    node("root", None, None),
    node("system", "root", "system", ""),
    node("q1", "system", "user", "Why?"),
    node("old", "q1", "assistant", "An answer that was asked for again."),
    node("a1", "q1", "assistant", "Because."),
    node("q2", "a1", "user", "And then?"),
    node("a2", "q2", "assistant", "Nothing."),
    node("q2b", "a1", "user", "Really?"),
    node("a2b", "q2b", "assistant", "Yes."),
)


@pytest.mark.parametrize(
    ("current", "last"),
    [
        ("a2", [("user", "And then?"), ("assistant", "Nothing.")]),
        ("a2b", [("user", "Really?"), ("assistant", "Yes.")]),
        (None, [("user", "Really?"), ("assistant", "Yes.")]),
        ("gone", [("user", "Really?"), ("assistant", "Yes.")]),
    ],
)
def test_the_current_nodes_branch_is_taken_or_else_the_newest(current: str | None, last: list[tuple[str, str]]) -> None:
    assert turns(*FORK, current=current) == ([("user", "Why?"), ("assistant", "Because."), *last], {"empty": 1})


def test_what_was_not_on_the_screen_is_left_out_and_counted() -> None:
    found, left_out = turns(
        node("root", None, None),
        node("s", "root", "system", "Be brief."),
        node("c", "s", "user", content={"content_type": "user_editable_context", "user_profile": "I am"}),
        node("h", "c", "user", "hidden", metadata={"is_visually_hidden_from_conversation": True}),
        node("q", "h", "user", "What is 2 + 2?"),
        node("t", "q", "assistant", content={"content_type": "thoughts", "thoughts": []}),
        node("before", "t", "assistant", "Let me see."),
        node("call", "before", "assistant", content={"content_type": "code", "text": "2+2"}, recipient="python"),
        node("result", "call", "tool", content={"content_type": "execution_output", "text": "4"}),
        node("old", "result", "assistant", "5", weight=0.0),
        node("late", "old", "system", "Be long."),
        node("a", "late", "assistant", "It is 4.\ue200cite\ue202turn0\ue201 【1†source】", recipient="all"),
        current="a",
    )
    assert found == [
        ("system", "Be brief."),
        ("user", "What is 2 + 2?"),
        ("assistant", "Let me see.\n\nIt is 4."),
    ]
    assert left_out == {
        "custom instructions": 1,
        "hidden": 2,
        "reasoning": 1,
        "call of a tool": 1,
        "result of a tool": 1,
        "system text between turns": 1,
    }


def test_a_spoken_turn_is_its_transcription() -> None:
    spoken = [
        {"content_type": "audio_transcription", "text": "Hello?"},
        {"content_type": "real_time_user_audio_video_asset_pointer", "audio_asset_pointer": {}},
    ]
    found, _ = turns(node("q", None, "user", *spoken), node("a", "q", "assistant", "Hello."), current="a")
    assert found == [("user", "Hello?"), ("assistant", "Hello.")]


def test_an_image_in_a_turn_is_a_fault() -> None:
    image = {"content_type": "image_asset_pointer", "asset_pointer": "file://x"}
    with pytest.raises(RowError, match=r"^a turn of the user has a part of type 'image_asset_pointer'; only text"):
        turns(node("q", None, "user", image, "What is this?"), current="q")


def test_a_branch_whose_parents_form_a_circle_is_read_once() -> None:
    found, _ = turns(node("q", "a", "user", "Why?"), node("a", "q", "assistant", "So."), current="a")
    assert found == [("user", "Why?"), ("assistant", "So.")]
