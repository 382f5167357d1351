"""Conversations of a ChatGPT export: a tree of turns, of which one branch was on the screen at last.

    mapping: {id: {message, parent, children}}, current_node   ─→   [{"role", "content"} …]

The export has no published format; what is known of it here was seen in exports. What was never on the screen (hidden
and system nodes, reasoning, calls of ChatGPT's own tools and their results) is left out, and counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llmtrain.data.files.row_faults import RowError

_CITATION = re.compile("\ue200[^\ue201]*\ue201|【[^】]*†[^】]*】")
"""Marks that the page shows as links to a search's results; as text they mean nothing."""

_INSTRUCTIONS = ("user_editable_context", "model_editable_context")
_REASONING = ("thoughts", "reasoning_recap")


def is_conversation(values: Mapping[str, Any]) -> bool:
    """Return whether this is a conversation as ChatGPT exports it."""
    mapping = values.get("mapping")
    return isinstance(mapping, dict) and all(isinstance(node, dict) for node in mapping.values())


def turns_of(conversation: Mapping[str, Any], left_out: Counter[str]) -> list[dict[str, str]]:
    """Return all turns of the branch that `current_node` ends, as messages; neighbours of one role are one turn.

    What is no turn is counted in `left_out` by its kind. Raises RowError where an image or another part that is not
    text stands in a turn: without it, what follows cannot be understood.
    """
    turns: list[dict[str, str]] = []
    for message in _branch(conversation):
        role = str(_object(message, "author").get("role"))
        reason = _why_left_out(message, role)
        text = "" if reason else _text(message, role)
        if reason or not text or (role == "system" and turns):
            left_out[reason or ("empty" if not text else "system text between turns")] += 1
        elif turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    return turns


def _branch(conversation: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the messages from the root to the current node."""
    nodes: Mapping[Any, Mapping[str, Any]] = conversation["mapping"]
    node_id = conversation.get("current_node")
    if node_id not in nodes:
        node_id = _last_leaf(nodes)
    branch: dict[Any, Mapping[str, Any]] = {}
    while node_id in nodes and node_id not in branch:
        branch[node_id] = nodes[node_id]
        node_id = nodes[node_id].get("parent")
    for node in reversed(branch.values()):
        if isinstance(node.get("message"), dict):
            yield node["message"]


def _last_leaf(nodes: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the node that the newest answer at every fork leads to."""
    node_id: str | None = next((key for key, node in nodes.items() if node.get("parent") not in nodes), None)
    seen: set[str] = set()
    while node_id is not None and node_id not in seen:
        seen.add(node_id)
        children = [child for child in nodes[node_id].get("children") or [] if child in nodes]
        if not children:
            break
        node_id = children[-1]
    return node_id


def _why_left_out(message: Mapping[str, Any], role: str) -> str | None:
    kind = _object(message, "content").get("content_type")
    if message.get("weight") == 0 or _object(message, "metadata").get("is_visually_hidden_from_conversation"):
        return "hidden"
    if kind in _INSTRUCTIONS:
        return "custom instructions"
    if kind in _REASONING:
        return "reasoning"
    if role == "tool":
        return "result of a tool"
    if role == "assistant" and message.get("recipient") not in (None, "all"):
        return "call of a tool"
    return None


def _text(message: Mapping[str, Any], role: str) -> str:
    content = _object(message, "content")
    parts = content.get("parts")
    if not isinstance(parts, list):
        parts = [content.get("text") or ""]
    texts = [part if isinstance(part, str) else _text_of_part(part) for part in parts if part]
    spoken = any(isinstance(part, dict) and part.get("content_type") == "audio_transcription" for part in parts)
    if None in texts and not spoken:
        other = parts[texts.index(None)]
        kind = other.get("content_type") if isinstance(other, dict) else type(other).__name__
        raise RowError(f"a turn of the {role} has a part of type {kind!r}; only text is learned")
    text = "\n".join(text for text in texts if text)
    return (_CITATION.sub("", text) if role == "assistant" else text).strip()


def _text_of_part(part: object) -> str | None:
    """Return the text of a part that is an object, None where it has none: a recording stands beside its text."""
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else None


def _object(message: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = message.get(key)
    return value if isinstance(value, dict) else {}
