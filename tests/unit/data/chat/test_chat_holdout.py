"""Holding rows out: by the prompt's hash, and prompts on both sides are named."""

from __future__ import annotations

from functools import partial

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.holdout import ValidationPrompts, is_held_out, is_kept, prompt_hash, prompt_of
from llmtrain.data.chat.sample_maker import SampleMaker, samples_of
from llmtrain.data.chat.shapes import PromptCompletion, Text, example_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row
from llmtrain.data.files.row_faults import RowFaults
from tests.support.chat import tiny_chat_tokenizer

ROWS = [PromptCompletion(f"What is {number}?", f" {number}") for number in range(4000)]


def test_the_share_held_out_is_the_fraction_and_a_larger_one_holds_more() -> None:
    small = {row.prompt for row in ROWS if is_held_out(row, 0.05)}
    large = {row.prompt for row in ROWS if is_held_out(row, 0.2)}
    assert small < large
    assert (round(len(small) / 4000, 2), round(len(large) / 4000, 1)) == (0.05, 0.2)
    assert not any(is_held_out(row, 0.0) for row in ROWS)


def test_rows_that_ask_the_same_are_on_the_same_side_in_whatever_shape() -> None:
    asked = {"role": "user", "content": " What is\n7? "}
    rows = [
        PromptCompletion("What is 7?", " other"),
        example_of({"messages": [asked, {"role": "assistant", "content": "a"}]}),
        example_of({"conversations": [{"from": "human", "value": "What is 7?"}, {"from": "gpt", "value": "b"}]}),
        example_of({"instruction": "What is", "input": "7?", "output": "c"}),
    ]
    assert {prompt_of(row) for row in rows} == {"What is 7?"}
    system = {"role": "system", "content": "Be kind."}
    other = example_of({"messages": [system, asked, {"role": "assistant", "content": "a"}]})
    assert prompt_of(other) == "system: Be kind.\nuser: What is 7?"


def test_prompts_on_both_sides_are_named() -> None:
    prompts = ValidationPrompts()
    for line in range(1, 9):
        prompts.add(prompt_hash(ROWS[line]), f"val.jsonl:{line}")
    prompts.add(prompt_hash(Text("What is 9?")), "val.jsonl:9")
    assert prompts.warning() is None
    for line in (3, 5, 5, 9, 4000):
        prompts.look_for(prompt_hash(ROWS[line - 1]), f"train.jsonl:{line}")
    prompts.look_for(prompt_hash(Text(ROWS[1].prompt)), "train.jsonl:1")
    assert prompts.warning() == (
        "3 of 8 validation prompts stand word for word in the training rows, so the validation loss says less than it "
        "seems: val.jsonl:2 = train.jsonl:3, val.jsonl:4 = train.jsonl:5, val.jsonl:8 = train.jsonl:9"
    )
    assert str(prompts.warning(max_named=1)).endswith("val.jsonl:2 = train.jsonl:3 and 2 more")


def test_rows_that_are_not_selected_are_neither_sampled_nor_counted() -> None:
    template = ChatTemplate(tiny_chat_tokenizer())
    rows = [Row({"prompt": row.prompt, "completion": row.completion}, f"a:{i}") for i, row in enumerate(ROWS[:600])]
    held_out = {f"a:{i}" for i, row in enumerate(ROWS[:600]) if is_held_out(row, 0.1)}

    for select, expected in ((is_held_out, held_out), (is_kept, {row.source for row in rows} - held_out)):
        tally = Tally()
        maker = SampleMaker(template, ChatConfig(train="a"), partial(select, fraction=0.1))
        found = samples_of(lambda: iter(rows), maker, tally=tally, faults=RowFaults())
        assert {sample.source for sample in found} == expected
        assert (tally.rows, tally.samples, tally.shapes.total()) == (len(expected),) * 3
