"""Supervision: token by token, which ones are learned, for each kind of chat template and each shape of row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.sample_maker import SampleMaker, samples_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row
from llmtrain.data.files.row_faults import RowFaults
from llmtrain.errors import ConfigError
from tests.support import chat as kinds
from tests.support.chat import tiny_chat_tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
ASK = {"role": "user", "content": "What?"}
ANSWER = {"role": "assistant", "content": "It is."}
ASK_AGAIN = {"role": "user", "content": "Who?"}
ANSWER_AGAIN = {"role": "assistant", "content": "The user."}
ONE = [ASK, ANSWER]
SEVERAL = [SYSTEM, ASK, ANSWER, ASK_AGAIN, ANSWER_AGAIN]

Runs = list[tuple[str, bool]]


@cache
def template_of(kind: str | None, adds_bos: bool = True) -> ChatTemplate:
    return ChatTemplate(tiny_chat_tokenizer(getattr(kinds, kind) if kind else None, adds_bos=adds_bos))


def encode(row: dict[str, Any], template: ChatTemplate, **options: Any) -> tuple[list[Sample], list[str]]:
    """The row's samples, and its faults."""
    faults = RowFaults()
    config = ChatConfig(train="rows.jsonl", **options)
    rows = [Row(row, "rows.jsonl:7")]
    samples = samples_of(lambda: iter(rows), SampleMaker(template, config), tally=Tally(), faults=faults)
    return list(samples), faults.lines()


def runs(sample: Sample, template: ChatTemplate) -> Runs:
    """The tokens' text, where the mask changes cut in two: every token is in one of the runs, with its mask."""
    found: list[tuple[list[int], bool]] = []
    for token, supervised in zip(sample.input_ids.tolist(), sample.supervised.tolist(), strict=True):
        if not found or found[-1][1] != supervised:
            found.append(([], supervised))
        found[-1][0].append(token)
    return [(template.tokenizer.decode(tokens), supervised) for tokens, supervised in found]


def learned(row: dict[str, Any], kind: str | None, **options: Any) -> list[Runs]:
    """The runs of each sample of a row that has no fault."""
    template = template_of(kind)
    samples, faults = encode(row, template, **options)
    assert faults == []
    return [runs(sample, template) for sample in samples]


def runs_of(marked: str) -> Runs:
    """`given«learned»given` as runs."""
    parts = [part for piece in marked.split("«") for part in piece.split("»")]
    return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


CHATML_ONE = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n«It is.<|im_end|>»\n"
CHATML_SEVERAL = (
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    "«It is.<|im_end|>»\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n«The user.<|im_end|>»\n"
)
LLAMA3_ONE = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«It is.<|eot_id|>»"
)
LLAMA3_SEVERAL = (
    "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«It is.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«The user.<|eot_id|>»"
)
QWEN3_ONE = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«It is.<|im_end|>»\n"
QWEN3_SEVERAL = [
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n«It is.<|im_end|>»\n",
    "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\nIt is.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n«The user.<|im_end|>»\n",
]
GEMMA_ONE = "<s><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n«It is.<end_of_turn>»\n"
GEMMA_SEVERAL = (
    "<s><start_of_turn>user\nBe kind.\n\nWhat?<end_of_turn>\n<start_of_turn>model\n«It is.<end_of_turn>»\n"
    "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\n«The user.<end_of_turn>»\n"
)
MISTRAL_SEVERAL = [
    "<s>[INST] Be kind.\n\nWhat? [/INST]« It is.</s>»",
    "<s>[INST] What? [/INST] It is.</s>[INST] Be kind.\n\nWho? [/INST]« The user.</s>»",
]
QWEN3_TAGGED_SEVERAL = (
    "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«It is.<|im_end|>»\n"
    "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n«The user.<|im_end|>»\n"
)
PHI3_SEVERAL = (
    "<|user|>\nWhat?<|im_end|>\n<|assistant|>\n«It is.<|im_end|>»\n"
    "<|user|>\nWho?<|im_end|>\n<|assistant|>\n«The user.<|im_end|>\n</s>»"
)
HEADED_SEVERAL = (
    "<|system|>\nBe kind.</s>\n<|user|>\nWhat?</s>\n<|assistant|>\n«It is.</s>»\n"
    "<|user|>\nWho?</s>\n<|assistant|>\n«The user.</s>»\n"
)
PLAIN_SEVERAL = (
    "<s>### System:\nBe kind.\n\n### User:\nWhat?\n\n### Assistant:\n«It is.</s>»\n\n"
    "### User:\nWho?\n\n### Assistant:\n«The user.</s>»\n\n"
)


@pytest.mark.parametrize(
    ("kind", "turns", "expected"),
    [
        ("CHATML", ONE, [CHATML_ONE]),
        ("CHATML", SEVERAL, [CHATML_SEVERAL]),
        ("CHATML_TAGGED", ONE, [CHATML_ONE]),
        ("CHATML_TAGGED", SEVERAL, [CHATML_SEVERAL]),
        ("LLAMA3", ONE, [LLAMA3_ONE]),
        ("LLAMA3", SEVERAL, [LLAMA3_SEVERAL]),
        ("QWEN3", ONE, [QWEN3_ONE]),
        ("QWEN3", SEVERAL, QWEN3_SEVERAL),
        ("GEMMA", ONE, [GEMMA_ONE]),
        ("GEMMA", SEVERAL, [GEMMA_SEVERAL]),
        ("GEMMA_STRICT", ONE, [GEMMA_ONE]),
        ("MISTRAL", ONE, ["<s>[INST] What? [/INST]« It is.</s>»"]),
        ("MISTRAL", SEVERAL[1:], ["<s>[INST] What? [/INST]« It is.</s>»[INST] Who? [/INST]« The user.</s>»"]),
        ("MISTRAL", SEVERAL, MISTRAL_SEVERAL),
        ("MISTRAL_ASKED", SEVERAL, MISTRAL_SEVERAL),
        ("MISTRAL_ASKED_TAGGED", SEVERAL, MISTRAL_SEVERAL),
        ("MISTRAL_ASKED_TAGGED", ONE, ["<s>[INST] What? [/INST]« It is.</s>»"]),
        ("QWEN3_TAGGED", SEVERAL[1:], [QWEN3_TAGGED_SEVERAL]),
        ("PHI3", SEVERAL[1:], [PHI3_SEVERAL]),
        ("HEADED", SEVERAL, [HEADED_SEVERAL]),
        ("OPENED", SEVERAL[1:], ["<|user|>What?<|assistant|>«It is.</s>»<|user|>Who?<|assistant|>«The user.</s>»"]),
        (None, SEVERAL, [PLAIN_SEVERAL]),
    ],
)
def test_the_assistants_turns_and_their_end_tokens_are_learned(
    kind: str | None, turns: list[dict[str, Any]], expected: list[str]
) -> None:
    assert learned({"messages": turns}, kind) == [runs_of(marked) for marked in expected]


@pytest.mark.parametrize("answer", ["a", "<", "<thing>", "ant", "|>", "s"])
def test_an_answer_that_also_stands_in_the_header_or_begins_like_its_block_is_found(answer: str) -> None:
    said = {"role": "assistant", "content": answer}
    opened = learned({"messages": [ASK, said]}, "OPENED")
    assert opened == [runs_of(f"<|user|>What?<|assistant|>«{answer}</s>»")]
    assert learned({"messages": [said, ASK, said]}, "OPENED") == [
        runs_of(f"<|assistant|>«{answer}</s>»<|user|>What?<|assistant|>«{answer}</s>»")
    ]
    [greeting] = learned({"messages": [said]}, "MISTRAL")
    assert "".join(text for text, is_learned in greeting if is_learned).strip() == f"{answer}</s>"


@pytest.mark.parametrize("kind", ["CHATML", "CHATML_TAGGED", "LLAMA3", "QWEN3", "GEMMA", "MISTRAL", "HEADED", None])
def test_only_the_last_answer_is_learned_when_asked(kind: str | None) -> None:
    everything = learned({"messages": SEVERAL}, kind)
    [last] = learned({"messages": SEVERAL}, kind, supervise="last")
    assert "".join(text for text, _ in last) == "".join(text for text, _ in everything[-1])
    assert [text for text, supervised in last if supervised] == [everything[-1][-1 if everything[-1][-1][1] else -2][0]]


@pytest.mark.parametrize("kind", ["CHATML", "CHATML_TAGGED", "QWEN3", "MISTRAL"])
def test_everything_is_learned_when_asked(kind: str) -> None:
    [[*given, (text, supervised)]] = learned({"messages": [SYSTEM, *ONE]}, kind, supervise="all")
    assert supervised
    assert "Be kind." in text
    assert len("".join(text for text, _ in given)) <= len("<|im_start|>")  # the first token, which nothing predicts


def test_answers_without_weight_are_read_and_not_learned() -> None:
    row = {"messages": [ASK, {**ANSWER, "weight": 0}, ASK_AGAIN, ANSWER_AGAIN]}
    for kind in ("CHATML", "CHATML_TAGGED", "LLAMA3"):
        [found] = learned(row, kind)
        assert [text.split("<|e")[0].split("<|im_e")[0] for text, supervised in found if supervised] == ["The user."]
        assert "It is." in found[0][0]


def test_turns_after_the_last_answer_are_left_out() -> None:
    assert learned({"messages": [*ONE, ASK_AGAIN]}, "CHATML") == [runs_of(CHATML_ONE)]


def test_an_answer_that_comes_first_is_learned() -> None:
    row = {"messages": [ANSWER, ASK_AGAIN, ANSWER_AGAIN]}
    assert learned(row, "CHATML") == [
        runs_of(
            "<|im_start|>assistant\n«It is.<|im_end|>»\n"
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n«The user.<|im_end|>»\n"
        )
    ]
    assert learned(row, "OPENED") == [runs_of("<|assistant|>«It is.</s>»<|user|>Who?<|assistant|>«The user.</s>»")]


CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
TOOL_ROW: dict[str, Any] = {
    "messages": [ASK, CALL, {"role": "tool", "content": "3"}, ANSWER],
    "tools": [{"type": "function", "function": {"name": "add"}}],
}


def test_tool_calls_are_learned_and_tool_results_are_not() -> None:
    tool = '{"type": "function", "function": {"name": "add"}}'
    assert learned(TOOL_ROW, "CHATML") == [
        runs_of(
            f"<|im_start|>system\n# Tools\n{tool}\n<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>\n"
            '<|im_start|>assistant\n«<tool_call>{"name": "add"}</tool_call><|im_end|>»\n'
            "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n«It is.<|im_end|>»\n"
        )
    ]


def test_arguments_are_text_for_templates_that_put_them_into_the_text_as_they_are() -> None:
    function = {"name": "add", "arguments": {"a": 1}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    [found] = learned({"messages": [ASK, call]}, "CALLS_AS_TEXT")
    assert found[1] == ('<tool_call>add{"a": 1}</tool_call><|im_end|>', True)
    [found] = learned({"messages": [ASK, call]}, "CHATML")
    assert found[1] == ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call><|im_end|>', True)


OWN_TEXT = '{"zoom": 1.10,  "name": "caf\\u00e9"}'
AS_OBJECT = '{"zoom": 1.1, "name": "café"}'
PRINTS = kinds.CHATML.replace('(call["function"] | tojson)', 'call["function"]["arguments"] | string')
WRITES_TEXT_AS_IT_IS = kinds.CHATML.replace(
    '(call["function"] | tojson)',
    "(call.function.arguments if call.function.arguments is string else call.function.arguments | tojson)",
)
ITERATES = kinds.CHATML.replace(
    '{{- "<tool_call>" + (call["function"] | tojson) + "</tool_call>" }}',
    '<tool_call>{% for k, v in call["function"]["arguments"].items() %}{{ k }}={{ v }};{% endfor %}</tool_call>',
)


@pytest.mark.parametrize(
    ("template", "given_text", "given_object"),
    [
        (PRINTS, OWN_TEXT, AS_OBJECT),
        (WRITES_TEXT_AS_IT_IS, OWN_TEXT, AS_OBJECT),
        (ITERATES, "zoom=1.1;name=café;", "zoom=1.1;name=café;"),
        (kinds.CHATML.replace('call["function"] |', 'call["function"]["arguments"] |'), AS_OBJECT, AS_OBJECT),
    ],
)
def test_arguments_reach_a_template_in_the_form_that_it_takes(
    template: str, given_text: str, given_object: str
) -> None:
    chat_template = ChatTemplate(tiny_chat_tokenizer(template))
    for arguments, expected in ((OWN_TEXT, given_text), ({"zoom": 1.1, "name": "café"}, given_object)):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
        assert f"<tool_call>{expected}</tool_call>" in chat_template.render(turns, None)
        assert f"<tool_call>{expected}</tool_call>" in chat_template.render(turns, TOOL_ROW["tools"])
    as_text: list[dict[str, Any]] = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": OWN_TEXT}}]},
    ]
    if given_text == OWN_TEXT:
        expected_text = chat_template.tokenizer.apply_chat_template(as_text, tokenize=False)
        assert chat_template.render(as_text, None) == expected_text


def test_the_plain_template_shows_tools_and_calls() -> None:
    call = '[{"type": "function", "function": {"name": "add"}}]'
    assert learned(TOOL_ROW, None) == [
        runs_of(
            f"<s>### Tools:\n{call}\n\n### User:\nWhat?\n\n### Assistant:\n«{call}\n</s>»\n\n"
            "### Tool:\n3\n\n### Assistant:\n«It is.</s>»\n\n"
        )
    ]


def test_reasoning_is_learned_where_the_template_shows_it() -> None:
    thought = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nIt is."}
    one, other = learned({"messages": [ASK, thought, ASK_AGAIN, ANSWER_AGAIN]}, "QWEN3")
    assert one[1] == ("<think>\nHm.\n</think>\n\nIt is.<|im_end|>", True)
    assert "Hm." not in other[0][0]
    separate = {"role": "assistant", "content": "It is.", "reasoning_content": "Hm."}
    assert learned({"messages": [ASK, separate]}, "QWEN3") == [one]


def test_an_empty_block_of_reasoning_is_not_learned_in_whatever_row() -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": "<think>\n\n</think>\n\nIt is."}]}
    assert learned(row, "QWEN3") == [runs_of(QWEN3_ONE)]
    assert learned(row, "CHATML") == [runs_of(QWEN3_ONE)]
    assert learned(row, "CHATML_TAGGED") == [runs_of(QWEN3_ONE)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "{{ messages[-1].tool_calls[0].function.arguments | tojson }}",
            "it writes a value as JSON that the row does not",
        ),
        ("{{ '{x}'.format(y=1) }}", "has no 'x'"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    ],
)
def test_a_template_that_fails_in_its_own_code_is_a_fault_of_the_row(text: str, said: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    template = ChatTemplate(tiny_chat_tokenizer(text))
    samples, [fault] = encode({"messages": [ASK, call]}, template)
    assert samples == []
    assert fault.startswith("rows.jsonl:7: the chat template does not take its turns (" + said)


@pytest.mark.parametrize(
    ("kind", "turns", "message"),
    [
        ("GEMMA_STRICT", SEVERAL, "the chat template does not take its turns (System role not supported)"),
        ("GEMMA", [ASK, ASK, ANSWER], "does not take its turns (Conversation roles must alternate"),
    ],
)
def test_what_a_template_rejects_is_a_fault_of_the_row(kind: str, turns: list[dict[str, Any]], message: str) -> None:
    samples, faults = encode({"messages": turns}, template_of(kind))
    assert samples == []
    assert len(faults) == 1
    assert faults[0].startswith("rows.jsonl:7: ")
    assert message in faults[0]


def test_tags_that_mark_nothing_are_a_fault() -> None:
    template = ChatTemplate(tiny_chat_tokenizer("{% if false %}{% generation %}{% endgeneration %}{% endif %}text"))
    _, faults = encode({"messages": ONE}, template)
    assert faults == ["rows.jsonl:7: the chat template's generation tags mark nothing in it"]


@pytest.mark.parametrize("kind", ["CHATML", "LLAMA3", "GEMMA", "MISTRAL", "HEADED", None])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_has_the_tokens_that_the_tokenizers_own_method_gives(kind: str | None, adds_bos: bool) -> None:
    template = template_of(kind, adds_bos)
    turns = SEVERAL if kind != "MISTRAL" else SEVERAL[1:]
    [sample], _ = encode({"messages": turns}, template)
    expected = template.tokenizer.apply_chat_template(
        turns, chat_template=template.text, tokenize=True, return_dict=True, date_string="26 Jul 2024"
    )
    assert sample.input_ids.tolist() == expected["input_ids"]
    if "<s>" in template.tokenizer.decode(expected["input_ids"]):
        assert sample.input_ids.tolist().count(template.tokenizer.bos_token_id) == 1


def test_instruction_rows_go_through_the_template() -> None:
    assert learned({"instruction": "What?", "input": "", "output": "It is."}, "CHATML") == [runs_of(CHATML_ONE)]


@pytest.mark.parametrize(
    ("row", "adds_bos", "options", "expected"),
    [
        ({"prompt": "Hello", "completion": " World"}, True, {}, "<s>Hello« World</s>»"),
        ({"prompt": "Hello", "completion": " World"}, False, {}, "Hello« World</s>»"),
        ({"prompt": "Hello", "response": " World</s>"}, False, {}, "Hello« World</s>»"),
        ({"prompt": "<s>Hello", "output": " World"}, True, {}, "<s>Hello« World</s>»"),
        ({"prompt": "", "completion": "World"}, True, {}, "<s>«World</s>»"),
        ({"prompt": "Hello", "completion": " World"}, True, {"supervise": "all"}, "<s>«Hello World</s>»"),
        ({"prompt": "Hello ", "completion": "World"}, True, {"supervise": "all"}, "<s>«Hello World</s>»"),
        ({"text": "Hello World"}, True, {}, "<s>«Hello World</s>»"),
        ({"text": "<s>Hello</s>"}, True, {"supervise": "last"}, "<s>«Hello</s>»"),
        ({"text": "<|im_start|>user\nHi<|im_end|>\n"}, True, {}, "<s>«<|im_start|>user\nHi<|im_end|>\n»"),
    ],
)
def test_plain_rows_begin_with_one_bos_and_end_with_one_learned_end_token(
    row: dict[str, Any], adds_bos: bool, options: dict[str, Any], expected: str
) -> None:
    template = template_of("CHATML", adds_bos)
    [sample], faults = encode(row, template, **options)
    assert faults == []
    assert runs(sample, template) == runs_of(expected)


def test_two_bos_tokens_are_a_fault() -> None:
    twice = "rows.jsonl:7: begins with two BOS tokens: take the one out of the row, or out of the chat template"
    assert encode({"text": "<s><s>Hello"}, template_of("CHATML"))[1] == [twice]
    template = ChatTemplate(tiny_chat_tokenizer("{{ bos_token }}" + kinds.LLAMA3))
    assert encode({"messages": ONE}, template)[1] == [twice]


def test_a_prompt_whose_tokens_are_not_the_first_is_a_fault() -> None:
    template = template_of("CHATML")
    assert len(template.tokenizer.encode(" user", add_special_tokens=False)) == 1
    samples, faults = encode({"prompt": "the ", "completion": "user"}, template)
    assert samples == []
    assert "rows.jsonl:7: the prompt's tokens are not the first ones of prompt and completion together" in faults[0]
    assert encode({"prompt": "the", "completion": " user"}, template)[1] == []


def test_pad_equal_to_end_masks_no_end_token() -> None:
    template = ChatTemplate(tiny_chat_tokenizer(kinds.HEADED, eos="<|endoftext|>", pad="<|endoftext|>"))
    assert template.tokenizer.pad_token_id == template.tokenizer.eos_token_id
    [sample], _ = encode({"messages": ONE}, template)
    end = sample.input_ids == template.tokenizer.eos_token_id
    assert sample.supervised[end].tolist() == [False, True]  # the user's, the assistant's
    [sample], _ = encode({"prompt": "a", "completion": " b"}, template)
    assert (sample.input_ids[-1], sample.supervised[-1]) == (template.tokenizer.eos_token_id, True)


def test_a_template_without_an_end_token_gets_a_learned_one() -> None:
    bare = '{% for message in messages %}{{ message["role"] + ": " + message["content"] + "\\n" }}{% endfor %}'
    template = ChatTemplate(tiny_chat_tokenizer(bare))
    [sample], _ = encode({"messages": ONE}, template)
    assert runs(sample, template) == runs_of("user: What?\nassistant:« It is.\n</s>»")


def test_a_token_that_begins_in_the_header_is_given_and_counted() -> None:
    spaced = (
        '{% for message in messages %}{{ message["role"] + ": " + message["content"] + eos_token }}{% endfor %}'
        '{% if add_generation_prompt %}{{ "assistant: " }}{% endif %}'
    )
    template = ChatTemplate(tiny_chat_tokenizer(spaced))
    tally = Tally()
    config = ChatConfig(train="rows.jsonl")
    rows = [Row({"messages": ONE}, "rows.jsonl:1")]
    [sample] = samples_of(lambda: iter(rows), SampleMaker(template, config), tally=tally, faults=RowFaults())
    assert runs(sample, template) == runs_of("user: What?</s>assistant: It« is.</s>»")
    assert (tally.rows_with_split_tokens, tally.first_split_token) == (1, "rows.jsonl:1")


def test_a_tokenizer_without_a_template_gets_the_plain_one_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        template = ChatTemplate(tiny_chat_tokenizer())
        encode({"messages": ONE}, template)
    assert [record.message for record in caplog.records] == [
        "The tokenizer has no chat template: a plain one is used (data.chat_template names another)"
    ]
    assert "{% generation -%}" in template.text


def test_a_template_from_a_file_replaces_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(kinds.CHATML)
    template = ChatTemplate(tiny_chat_tokenizer(kinds.LLAMA3), file=str(file))
    [sample], _ = encode({"messages": ONE}, template)
    assert runs(sample, template) == runs_of(CHATML_ONE)
    assert template.text == kinds.CHATML


def test_a_template_that_cannot_be_used_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*template\.jinja: cannot be read"):
        ChatTemplate(tiny_chat_tokenizer(), file=str(file))
    file.write_text("line one\n{% if %}")
    with pytest.raises(ConfigError, match=r"template\.jinja:2: is no Jinja template"):
        ChatTemplate(tiny_chat_tokenizer(), file=str(file))
    tokenizer = tiny_chat_tokenizer()
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(ConfigError, match=r"several chat templates \(rag, tool_use\)"):
        ChatTemplate(tokenizer)


def test_the_template_for_tools_is_taken_for_rows_with_tools() -> None:
    tokenizer = tiny_chat_tokenizer()
    tokenizer.chat_template = {"default": kinds.HEADED, "tool_use": kinds.CHATML}
    template = ChatTemplate(tokenizer)
    [with_tools], _ = encode(TOOL_ROW, template)
    [without], _ = encode({"messages": ONE}, template)
    assert "# Tools" in template.tokenizer.decode(with_tools.input_ids)
    assert runs(without, template) == runs_of("<|user|>\nWhat?</s>\n<|assistant|>\n«It is.</s>»\n")


def test_a_tokenizer_without_an_end_token_is_a_config_error() -> None:
    tokenizer = tiny_chat_tokenizer(kinds.CHATML)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end token"):
        encode({"messages": ONE}, ChatTemplate(tokenizer))


def test_the_tokenizer_that_is_given_stays_as_it_is() -> None:
    tokenizer = tiny_chat_tokenizer(kinds.CHATML, adds_bos=True)
    before = tokenizer.backend_tokenizer.to_str()
    encode({"text": "Hello"}, ChatTemplate(tokenizer))
    assert tokenizer.backend_tokenizer.to_str() == before


def _sentencepiece() -> Any:
    """As Llama 2's: blanks become ▁, a ▁ goes before each text, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"WhatIis.?[]/NST", "▁I", "▁It"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "I"), ("▁I", "t")]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _word_level() -> Any:
    """Blanks are in no token."""
    words = ["<unk>", "<s>", "</s>", "It", "is", ".", "What", "?", "[", "]", "/", "INST"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (_sentencepiece, ["▁It", "▁", "i", "s", "▁", "<0xC3>", "<0xA9>", ".", "</s>"]),
        (_word_level, ["It", "is", "<unk>", ".", "</s>"]),
    ],
)
def test_masks_are_right_for_tokenizers_of_other_kinds(make: Callable[[], Any], answer: list[str]) -> None:
    tokenizer = make()
    tokenizer.chat_template = kinds.MISTRAL
    template = ChatTemplate(tokenizer)
    turns = [ASK, {"role": "assistant", "content": "It is é."}]
    [sample], faults = encode({"messages": [*turns, *turns]}, template)
    assert faults == []
    pieces = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert [piece for piece, kept in zip(pieces, sample.supervised, strict=True) if kept] == answer * 2
    [sample], faults = encode({"prompt": "What?", "completion": " It is é."}, template)
    pieces = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    assert faults == []
    assert [piece for piece, kept in zip(pieces, sample.supervised, strict=True) if kept] == answer


KINDS = ["CHATML", "CHATML_TAGGED", "LLAMA3", "QWEN3", "GEMMA", "MISTRAL", "MISTRAL_ASKED", "HEADED", None]
words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=60)
@given(
    answers=st.lists(words, min_size=1, max_size=4),
    questions=st.lists(words, min_size=4, max_size=4),
    kind=st.sampled_from(KINDS),
    system=st.none() | words,
)
def test_learned_tokens_are_the_answers_and_what_is_before_them_is_the_prompt(
    answers: list[str], questions: list[str], kind: str | None, system: str | None
) -> None:
    template = template_of(kind)
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in zip(questions, answers, strict=False):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    samples, faults = encode({"messages": turns}, template, seq_len=4096)
    assert faults == []
    found = []
    for sample in samples:
        supervised = [text for text, is_learned in runs(sample, template) if is_learned]
        found += [_without_end(text, template).strip() for text in supervised]
    assert found == [answer.strip() for answer in answers]
    # What is given before the first learned token is what the model is given when it is asked.
    first = samples[0]
    num_given = int(first.supervised.argmax())
    num_turns = len(turns) - 2 * len(answers) + 1
    prompt = template.render(turns[:num_turns], None, add_generation_prompt=True)
    prompt_ids = template.tokenizer.encode(prompt, add_special_tokens=False)
    header = template.tokenizer.encode(template.header, add_special_tokens=False)
    tail = first.input_ids[len(prompt_ids) : num_given].tolist()
    assert first.input_ids[: len(prompt_ids)].tolist() == prompt_ids
    assert tail in ([], header, template.tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False))


def _without_end(text: str, template: ChatTemplate) -> str:
    end = template.end_of_turn
    assert text.endswith(end)
    return text.removesuffix(end)
