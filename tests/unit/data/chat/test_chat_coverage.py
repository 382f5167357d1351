"""Nothing that a row holds is lost in silence: it is rendered, or counted as unused by name, or the row is invalid."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.coverage import AFTER_LAST_ANSWER
from llmtrain.data.chat.sample_maker import SampleMaker, samples_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.chat.unused import Unused, unused_line
from llmtrain.data.files.read import Row
from llmtrain.data.files.row_faults import RowFaults
from tests.support import chat as kinds
from tests.support.chat import tiny_chat_tokenizer

ASK = {"role": "user", "content": "weather in Paris?"}
ANSWER = {"role": "assistant", "content": "It is 18C."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "18C"}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "parameters": {}}}
NO_TOOLS = """\
{%- for message in messages %}
    {%- if message["role"] in ("user", "assistant") %}
        {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""Knows nothing but the turns of user and assistant, and of these nothing but their content."""
CALLS_SHOWN = NO_TOOLS.replace(
    '+ message["content"] +',
    '+ message["content"] + ((message["tool_calls"] | tojson) if message["tool_calls"] else "") +',
)
ONLY_LAST_TAGGED = '{% if loop.last %}{% generation %}{{ message["content"] }}{% endgeneration %}{% endif %}'


def read(row: dict[str, Any], template: str | None, **options: Any) -> tuple[list[str], list[str], Tally, list[str]]:
    """The texts of the samples, what of them is learned, what was counted, and the faults."""
    tokenizer = tiny_chat_tokenizer(template)
    tally, faults = Tally(), RowFaults()
    maker = SampleMaker(ChatTemplate(tokenizer), ChatConfig(train="rows.jsonl", seq_len=1 << 20, **options))
    samples = list(samples_of(lambda: iter([Row(row, "rows.jsonl:7")]), maker, tally=tally, faults=faults))
    texts = [tokenizer.decode(sample.input_ids) for sample in samples]
    learned = [tokenizer.decode(sample.input_ids[sample.supervised]) for sample in samples]
    return texts, learned, tally, faults.lines()


def unused(row: dict[str, Any], template: str | None = kinds.CHATML, **options: Any) -> set[str]:
    texts, _, tally, faults = read(row, template, **options)
    assert texts
    assert faults == []
    assert set(tally.unused.values()) <= {Unused(1, "rows.jsonl:7")}
    return set(tally.unused)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": [ASK, CALLS, RESULT, ANSWER]}, NO_TOOLS, "does not show the call of 'weather' in turn 2"),
        ({"messages": [ASK, CALLS, RESULT, ANSWER]}, CALLS_SHOWN, "does not show turn 3 (tool)"),
        ({"messages": [ASK, ANSWER], "tools": [TOOL]}, NO_TOOLS, "does not show the tool 'weather'"),
        ({"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}]}, NO_TOOLS, "the reasoning of turn 2"),
        ({"messages": [ASK, {**ANSWER, "thinking": "Hm."}]}, NO_TOOLS, "the reasoning of turn 2"),
        (
            {"messages": [ASK, {"role": "assistant", "content": "<think>Hm.</think>It is."}]},
            NO_TOOLS.replace('message["content"]', '(message["content"].split("</think>") | last)'),
            "the reasoning of turn 2",
        ),
        (
            {"messages": [ASK, CALLS]},
            kinds.CHATML.replace('call["function"] | tojson', 'call["function"]["name"]'),
            "does not show the arguments of the call of 'weather' in turn 2",
        ),
        (
            {"messages": [{"role": "assistant", "content": "Hi."}, ASK, ANSWER]},
            NO_TOOLS.replace("in messages", "in messages[1:]"),
            "turn 1",
        ),
        (
            {"messages": [ASK, {"role": "assistant", "content": "<think>\n\n</think>\n\n"}]},
            NO_TOOLS,
            "an answer of which nothing would be learned but the end token",
        ),
        (
            {"messages": [ASK, ANSWER, ASK, {"role": "assistant", "content": "No."}]},
            NO_TOOLS.replace('{{- "<|im_start|>"', ONLY_LAST_TAGGED + '{{- "<|im_start|>"'),
            "shows turn 2, but nothing of it would be learned",
        ),
    ],
)
def test_a_template_that_loses_what_is_learned_from_makes_the_row_invalid(
    row: dict[str, Any], template: str, message: str
) -> None:
    texts, _, _, faults = read(row, template)
    assert texts == []
    assert len(faults) == 1
    assert faults[0].startswith("rows.jsonl:7: ")
    assert message in faults[0]


def test_text_of_the_system_that_is_not_shown_is_counted() -> None:
    system = {"role": "system", "content": "Be kind."}
    assert unused({"messages": [system, ASK, ANSWER]}, NO_TOOLS) == {"turn.content (system)"}
    assert unused({"messages": [ASK, ANSWER], "system": "Be kind."}, NO_TOOLS) == {"turn.content (system)"}


def test_what_is_neither_shown_nor_used_is_counted_by_name_with_its_first_row() -> None:
    call = {**CALL, "id": "call_1"}
    tool = {"type": "function", "function": {**TOOL["function"], "strict": True, "parameters": {"type": "object"}}}
    row = {
        "messages": [
            {**ASK, "name": "Ann", "train": True},
            {**CALLS, "tool_calls": [call]},
            {**RESULT, "tool_call_id": "call_1", "name": "weather"},
            {**ANSWER, "score": 0.5, "audio": None},
            {"role": "user", "content": "Thanks."},
        ],
        "tools": [tool],
        "id": 3,
        "meta": {"from": "me"},
        "history": [],
        "note": None,
    }
    named = {
        *("turn.name", "turn.train (user)", "turn.tool_calls.id", "turn.tool_call_id", "turn.score"),
        *("id", "meta", AFTER_LAST_ANSWER),
    }
    assert unused(row) == named
    names_alone = kinds.CHATML.replace("(tool | tojson)", 'tool["function"]["name"]')
    assert unused(row, names_alone) == named | {"tools.function.parameters", "tools.function.strict"}


def test_reasoning_of_answers_that_are_not_learned_is_counted() -> None:
    old = {**ANSWER, "reasoning_content": "Hm."}
    row = {"messages": [ASK, {**old, "weight": 0}, ASK, {"role": "assistant", "content": "Yes."}]}
    assert unused(row, NO_TOOLS) == {"turn.reasoning_content"}
    assert unused({"messages": [ASK, old, *row["messages"][2:]]}, NO_TOOLS, supervise="last") == {
        "turn.reasoning_content"
    }


def test_reasoning_beside_the_tags_is_shown_and_counted_as_not_learned() -> None:
    beside = kinds.CHATML_TAGGED.replace("{%- generation", '{{- message["reasoning_content"] }}{%- generation')
    row = {"messages": [ASK, {**ANSWER, "reasoning_content": "Hm."}]}
    assert unused(row, beside) == {"turn.reasoning_content, which is shown but not learned"}


OLD_REASONING_DROPPED = """\
{%- set answered = messages[-1]["role"] == "assistant" and not messages[-1]["tool_calls"] %}
{%- for message in messages %}
    {{- "<|im_start|>" + message["role"] + "\\n" }}
    {%- if message["role"] == "assistant" %}{% generation %}
        {%- if message["reasoning_content"] and (loop.last or not answered) %}
            {{- "<think>" + message["reasoning_content"] + "</think>" }}
        {%- endif %}
        {{- message["tool_calls"] | tojson if message["tool_calls"] else "" }}{{ message["content"] + "<|im_end|>" }}
    {%- endgeneration %}{% else %}{{ message["content"] + "<|im_end|>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}"""
"""Reasoning is shown until the final answer follows, as gpt-oss does it, or while nothing follows at all."""


def test_reasoning_that_is_dropped_once_others_follow_is_learned_in_a_text_of_its_own() -> None:
    call = {**CALLS, "reasoning_content": "I call."}
    final = {**ANSWER, "reasoning_content": "I see."}
    texts, learned, tally, faults = read({"messages": [ASK, call, RESULT, final]}, OLD_REASONING_DROPPED)
    assert (faults, tally.unused, tally.rows_by_turn) == ([], {}, 1)
    assert [text.partition("</think>")[0] for text in learned] == ["<think>I call.", "<think>I see."]
    assert "I call." in texts[1], "as it is while the answer is asked for"


def test_the_plain_template_shows_reasoning() -> None:
    _, learned, _, faults = read({"messages": [ASK, {**ANSWER, "reasoning": "Hm."}]}, None)
    assert (learned, faults) == (["<think>\nHm.\n</think>\n\nIt is 18C.</s>"], [])


def test_other_shapes_name_what_they_do_not_use() -> None:
    assert unused({"prompt": "a", "completion": " b", "system": "s", "history": [["c", "d"]]}) == {"system", "history"}
    assert unused({"text": "a", "title": "b"}) == {"title"}
    assert unused({"body": "a", "text": "b", "id": ""}, text_column="body") == {"text"}
    assert unused({"instruction": "a", "output": "b", "history": "c", "tools": ""}) == {"history"}


def test_templates_that_look_at_ids_show_them() -> None:
    strict = kinds.CHATML.replace(
        '{{- "<tool_call>"',
        '{% if call["id"] | length != 9 %}{{ raise_exception("nine, please") }}{% endif %}{{- "<tool_call>"',
    )
    row = {"messages": [ASK, {**CALLS, "tool_calls": [{**CALL, "id": "call56789"}]}], "x": 1}
    assert unused(row, strict) == {"x"}


def test_counts_of_batches_are_added_and_told_in_one_line() -> None:
    tally, later = Tally(), Tally()
    tally.count_unused(["id"], "a:1")
    later.count_unused(["turn.name", "id"], "a:2")
    later.count_unused(["id"], "a:3")
    tally.add(later)
    assert tally.unused == {"id": Unused(3, "a:1"), "turn.name": Unused(1, "a:2")}
    assert unused_line(tally.unused) == (
        "rows hold what is neither shown to the model nor used otherwise: id (3 rows, the first is a:1), turn.name "
        "(1 row, the first is a:2)"
    )
    assert unused_line({}) is None


# -- any row, any template ---------------------------------------------------------------------------------------------


def template_of(shows: dict[str, bool]) -> str:
    """A template that shows some things and not others."""
    answer = '{{ message["content"] }}'
    if shows["calls"]:
        answer += '{% for call in message["tool_calls"] or [] %}<call>{{ call["function"] | tojson }}{% endfor %}'
    if shows["tags"]:
        answer = "{% generation %}" + answer + "{% endgeneration %}"
    if shows["reasoning"]:
        answer = (
            '{% if message["reasoning_content"] %}<think>{{ message["reasoning_content"] }}</think>{% endif %}' + answer
        )
    hidden = [role for role in ("system", "tool") if not shows[role]]
    tools = "(tool | tojson)" if shows["schemas"] else 'tool["function"]["name"]'
    name = '{{ message["name"] or "" }}' if shows["name"] else ""
    return (
        ("{% for tool in tools or [] %}{{ " + tools + " }}\n{% endfor %}" if shows["tools"] else "")
        + "{% for message in messages if message['role'] not in "
        + f"{hidden} %}}"
        + '<|im_start|>{{ message["role"] }}\n'
        + name
        + '{% if message["role"] == "assistant" %}'
        + answer
        + '{% else %}{{ message["content"] }}{% endif %}<|im_end|>\n{% endfor %}'
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Conversations whose every text begins with a word of its own: w0001, w0002 …"""
    words = iter(range(1, 10_000))
    tails = st.text(st.sampled_from('ab é中😀"\\{}<\n'), max_size=5)

    def text() -> str:
        return f"w{next(words):04d}{draw(tails)}"

    def some(**values: Any) -> dict[str, Any]:
        return {key: value() for key, value in values.items() if draw(st.booleans())}

    def call() -> dict[str, Any]:
        arguments = draw(st.sampled_from([{}, {"city": text(), "days": [text(), None]}]))
        return {"type": "function", **some(id=text), "function": {"name": text(), "arguments": arguments}}

    def turn(role: str, **more: Any) -> dict[str, Any]:
        return {
            "role": role,
            "content": text(),
            **some(name=text, meta=lambda: {"a": [text()]}, empty=lambda: None),
            **more,
        }

    turns = [turn("system")] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(turn("user"))
        if draw(st.booleans()):
            turns += [turn("assistant", tool_calls=[call()]), turn("tool", tool_call_id=text())]
        turns.append(turn("assistant", **some(reasoning_content=text, weight=lambda: 0)))
    turns.append({**turn("assistant"), **some(reasoning_content=text)})
    if draw(st.booleans()):
        turns.append(turn("user"))
    tool = {
        "type": "function",
        "function": {"name": text(), "description": text(), "parameters": {"properties": {"p": {"enum": [text()]}}}},
    }
    return {
        "messages": turns,
        **some(tools=lambda: [tool], id=text, meta=lambda: {"deep": {"er": text()}}, none=lambda: None),
    }


def words_in(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Every word of a row, and the name under which it would be counted."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from words_in(inner, f"{name}.{'*' if name.endswith('.properties') else key}")
    elif isinstance(value, list):
        for inner in value:
            yield from words_in(inner, name)
    elif isinstance(value, str) and (word := re.match(r"w\d{4}", value)):
        yield word[0], name


FLAGS = ("tools", "schemas", "calls", "reasoning", "system", "tool", "name", "tags")


@settings(max_examples=120, deadline=None)
@given(
    row=rows(),
    shows=st.fixed_dictionaries({flag: st.sampled_from([True, True, False]) for flag in FLAGS}),
    supervise=st.sampled_from(["assistant", "last", "all"]),
)
def test_what_is_rendered_and_what_is_reported_is_what_the_row_holds(
    row: dict[str, Any], shows: dict[str, bool], supervise: str
) -> None:
    texts, learned, tally, faults = read(row, template_of(shows), supervise=supervise)
    turns = row["messages"]
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    answers = [
        turn
        for index, turn in enumerate(turns)
        if turn["role"] == "assistant" and turn.get("weight") != 0 and (supervise != "last" or index == last)
    ]
    if faults:
        needed = {
            "call": not shows["calls"] and any(turn.get("tool_calls") for turn in turns),
            "tool": not shows["tools"] and "tools" in row,
            "reasoning": not shows["reasoning"] and any("reasoning_content" in turn for turn in answers),
            "turn": not shows["tool"] and any(turn["role"] == "tool" for turn in turns),
        }
        assert any(needed.values()), faults
        assert re.search("|".join(name for name, is_lost in needed.items() if is_lost), faults[0])
        return
    text, counted = "".join(texts), {name.partition(",")[0] for name in tally.unused}
    for word, name in words_in({key: value for key, value in row.items() if key != "messages"}, ""):
        assert word in text or any(f".{one}" in (name, name[: len(one) + 1]) for one in counted), (name, counted)
    for index, turn in enumerate(turns):
        for word, name in words_in(turn, "turn"):
            is_counted = any(name.startswith(one.partition(" (")[0]) for one in counted)
            is_after = index > last and supervise != "all" and AFTER_LAST_ANSWER in counted
            assert word in text or is_counted or is_after, (name, counted)
        if turn in answers and supervise != "all":
            for key in ("content", "tool_calls", "reasoning_content"):
                for word, name in words_in(turn.get(key), f"turn.{key}"):
                    assert (
                        word in "".join(learned)
                        or ".id" in name
                        or f"{name}, which is shown but not learned" in tally.unused
                    )
