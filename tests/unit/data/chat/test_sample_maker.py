"""Samples: cut to length, counted, never without a supervised token; faults of all rows at once."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.sample_maker import SampleMaker, conclude, samples_of
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row, read_rows
from llmtrain.data.files.row_faults import RowFaults
from llmtrain.errors import ConfigError
from tests.support.chat import CHATML, QWEN3, tiny_chat_tokenizer

TEMPLATE = ChatTemplate(tiny_chat_tokenizer(CHATML, adds_bos=True))
EOS = TEMPLATE.tokenizer.eos_token_id
BOS = TEMPLATE.tokenizer.bos_token_id
LONG = {"prompt": "0123456789", "completion": "ABCDEFGHIJ"}
"""22 tokens: BOS, 10 given, 10 learned, and the end token."""


def samples(
    rows: list[dict[str, Any]], *, template: ChatTemplate = TEMPLATE, **options: Any
) -> tuple[list[Sample], Tally, list[str]]:
    tally, faults = Tally(), RowFaults()
    config = ChatConfig(train="rows.jsonl", **options)
    numbered = [Row(row, f"rows.jsonl:{line}") for line, row in enumerate(rows, 1)]
    found = list(samples_of(lambda: iter(numbered), SampleMaker(template, config), tally=tally, faults=faults))
    return found, tally, faults.lines()


def load(file: Path, config: ChatConfig) -> tuple[list[Sample], Tally, RowFaults]:
    tally, faults = Tally(), RowFaults()
    rows = partial(read_rows, str(file), key="data.train")
    found = list(samples_of(rows, SampleMaker(TEMPLATE, config), tally=tally, faults=faults))
    conclude(tally, faults, key="data.train", config=config)
    return found, tally, faults


def text(sample: Sample) -> str:
    return str(TEMPLATE.tokenizer.decode(sample.input_ids))


def test_rows_that_fit_are_complete() -> None:
    [sample], tally, faults = samples([LONG], seq_len=22)
    assert (text(sample), int(sample.supervised.sum()), sample.source) == (
        "<s>0123456789ABCDEFGHIJ</s>",
        11,
        "rows.jsonl:1",
    )
    assert (tally.rows_cut, tally.tokens, tally.supervised_tokens, faults) == (0, 22, 11, [])
    assert (sample.input_ids.dtype, sample.supervised.dtype) == (np.dtype(np.int32), np.dtype(np.bool_))


def test_right_cuts_the_end_and_counts_it() -> None:
    [one, other], tally, faults = samples([{"text": "a"}, LONG], seq_len=15)
    assert (text(one), text(other)) == ("<s>a</s>", "<s>0123456789ABCD")
    assert (tally.rows_cut, tally.tokens_cut, tally.supervised_tokens_cut, tally.first_cut) == (1, 7, 7, "rows.jsonl:2")
    assert (tally.tokens, tally.supervised_tokens, faults) == (18, 6, [])
    assert tally.lines(seq_len=15, truncation="right")[1] == (
        "1 row has more than 15 tokens: the end is cut off (7 tokens, 7 of them supervised; the first is "
        "rows.jsonl:2); raise data.seq_len to keep them, or change data.truncation"
    )


def test_left_cuts_the_beginning_and_keeps_bos_and_end() -> None:
    [sample], tally, _ = samples([LONG], seq_len=15, truncation="left")
    assert text(sample) == "<s>789ABCDEFGHIJ</s>"
    assert (int(sample.supervised.sum()), tally.tokens_cut, tally.supervised_tokens_cut) == (11, 7, 0)
    without_bos = ChatTemplate(tiny_chat_tokenizer(CHATML))
    [sample], _, _ = samples([LONG], template=without_bos, seq_len=15, truncation="left")
    assert text(sample) == "6789ABCDEFGHIJ</s>"
    [sample], _, _ = samples([LONG], template=without_bos, seq_len=5, truncation="left")
    assert (text(sample), sample.supervised.tolist()) == ("GHIJ</s>", [False, True, True, True, True])


def test_drop_leaves_out_and_counts() -> None:
    [sample], tally, faults = samples([{"text": "a"}, LONG], seq_len=15, truncation="drop")
    assert (text(sample), tally.rows_dropped, tally.first_dropped, faults) == ("<s>a</s>", 1, "rows.jsonl:2", [])
    assert "1 row has more than 15 tokens, and left out" in tally.lines(seq_len=15, truncation="drop")[1]


def test_error_makes_long_rows_faults() -> None:
    _, _, faults = samples([LONG, {"text": "a"}, LONG], seq_len=15, truncation="error")
    assert [line.split(",")[0] for line in faults] == ["rows.jsonl:1: has 22 tokens", "rows.jsonl:3: has 22 tokens"]
    assert "more than data.seq_len 15: raise it" in faults[0]


def test_a_row_whose_supervised_tokens_are_all_cut_is_a_fault_and_no_sample() -> None:
    found, tally, faults = samples([LONG], seq_len=11)
    assert (found, tally.samples, tally.rows_cut) == ([], 0, 0)
    assert faults == [
        "rows.jsonl:1: none of its 11 supervised tokens is among the first 11 of 22: raise data.seq_len, or let "
        "data.truncation be left or drop"
    ]


def test_a_text_of_one_token_has_nothing_to_learn() -> None:
    template = ChatTemplate(tiny_chat_tokenizer(CHATML))
    assert samples([{"text": "</s>"}], template=template)[2] == [
        "rows.jsonl:1: has no supervised token: nothing would be learned from it"
    ]


def test_rows_become_a_sample_for_each_answer_and_are_counted() -> None:
    template = ChatTemplate(tiny_chat_tokenizer(QWEN3))
    turns = [
        {"role": role, "content": content}
        for _ in range(3)
        for role, content in (("user", "What?"), ("assistant", "It is."))
    ]
    found, tally, _ = samples([{"text": "a"}, {"messages": turns}], template=template)
    assert (len(found), tally.rows_by_turn, tally.samples_by_turn, tally.first_by_turn) == (4, 1, 3, "rows.jsonl:2")
    assert tally.lines(seq_len=1024, truncation="right")[1] == (
        "the chat template shows turns differently once others follow: 1 row becomes 3 samples, one for each answer "
        "(the first is rows.jsonl:2)"
    )
    lengths = [len(sample.input_ids) for sample in found[1:]]
    # Answers beyond the cut are left out; the row is a fault only when none is left.
    cut, tally, faults = samples([{"messages": turns}], template=template, seq_len=lengths[0])
    assert (len(cut), tally.turns_left_out, tally.rows_cut, faults) == (1, 2, 1, [])
    dropped, tally, _ = samples([{"messages": turns}], template=template, seq_len=lengths[1], truncation="drop")
    assert (len(dropped), tally.turns_left_out, tally.rows_dropped) == (2, 1, 0)
    assert len(samples([{"messages": turns}], template=template, seq_len=10)[2]) == 1


def test_control_tokens_in_what_somebody_wrote_are_said() -> None:
    turns = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "It is."}]
    _, tally, _ = samples([{"messages": turns}])
    assert tally.lines(seq_len=1024, truncation="right")[1] == (
        "1 row holds control tokens in text, which are read as such (the first is rows.jsonl:1, '<|im_end|>')"
    )


@given(
    rows=st.lists(st.tuples(st.text("ab é", max_size=12), st.text("cd ", min_size=1, max_size=12)), max_size=8),
    seq_len=st.integers(2, 20),
    truncation=st.sampled_from(["right", "left", "drop"]),
)
def test_every_sample_fits_and_has_something_to_learn_and_every_row_is_counted(
    rows: list[tuple[str, str]], seq_len: int, truncation: Literal["right", "left", "drop"]
) -> None:
    found, tally, faults = samples(
        [{"prompt": prompt, "completion": completion} for prompt, completion in rows],
        seq_len=seq_len,
        truncation=truncation,
    )
    for sample in found:
        assert 2 <= len(sample.input_ids) <= seq_len
        assert not sample.supervised[0]
        assert sample.supervised.any()
        assert sample.input_ids.tolist().count(BOS) == 1
        assert (sample.input_ids == EOS).sum() <= 1
    assert len(rows) == tally.rows == len(found) + tally.rows_dropped + len(faults)
    assert tally.tokens == sum(len(sample.input_ids) for sample in found)
    assert tally.supervised_tokens == sum(int(sample.supervised.sum()) for sample in found)


def test_all_faults_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['{"text": "a"}', "{", '{"txt": 1}', '{"messages": []}', json.dumps(LONG)]
    file.write_text("\n".join(lines))
    config = ChatConfig(train=str(file), seq_len=5)
    with pytest.raises(ConfigError) as raised:
        load(file, config)
    told = str(raised.value).splitlines()
    assert [line.split(": ")[0] for line in told[:-1]] == [f"{file}:{line}" for line in (2, 3, 4, 5)]
    assert told[-1] == "Correct these rows, or leave them out by data.on_error: skip."


def test_rows_with_faults_are_left_out_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{\n')
    found, tally, faults = load(file, ChatConfig(train=str(file), on_error="skip"))
    assert (len(found), tally.rows) == (1, 2)
    assert [line.split(" (")[0] for line in faults.lines()] == [f"{file}:2: is no JSON"]
    assert tally.lines(seq_len=8, truncation="right") == [
        "2 rows (text 1): 1 sample of 3 tokens, 66.7% of them supervised"
    ]


def test_half_of_a_surrogate_pair_in_reasoning_is_a_fault_that_can_be_skipped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    answer = {"role": "assistant", "content": "b", "reasoning_content": "\ud83d"}
    rows = [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}, answer]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _, faults = load(file, ChatConfig(train=str(file), on_error="skip"))
    half = "'messages[1].reasoning_content' holds half of a surrogate pair, which is no valid Unicode"
    assert (len(found), faults.lines()) == (1, [f"{file}:2: {half}"])
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: "):
        load(file, ChatConfig(train=str(file)))


def test_no_row_left_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(LONG))
    config = ChatConfig(train=str(file), seq_len=5, truncation="drop")
    with pytest.raises(ConfigError, match=r"data\.train: of 1 row none is left to train on"):
        load(file, config)


def test_val_and_val_fraction_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="give val or val_fraction, not both"):
        ChatConfig(train="a", val="b", val_fraction=0.1)
    with pytest.raises(ValueError, match="give all or none a weight"):
        ChatConfig.model_validate({"train": ["a", {"path": "b", "weight": 1}]})
