"""Questions that stand among the training rows: word for word, and by 13 words in a row; boilerplate does not count."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llmtrain.data.chat.shapes import Chat, Example, PromptCompletion, Text, example_of
from llmtrain.evaluation.contamination import BOILERPLATE_ROWS, find_overlaps
from llmtrain.evaluation.questions import Question

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def question(prompt: str, completion: str = "yes") -> Question:
    return Question("q.jsonl", "q.jsonl:1", PromptCompletion(prompt, completion), completion)


def chat(*turns: str) -> Example:
    roles = ("user", "assistant")
    return example_of({"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]})


def sourced(*examples: Example) -> Iterator[tuple[Example, str]]:
    return ((example, f"train.jsonl:{number}") for number, example in enumerate(examples, 1))


def test_an_identical_prompt_is_found_with_its_training_row() -> None:
    questions = [question("What is it?"), question("Why?"), question("Who?")]
    training = sourced(chat("Who?", "me"), PromptCompletion("something else", "no"), chat(" What  is\nit? ", "a cat"))
    found = find_overlaps(questions, training)
    assert [tuple(one) for one in found] == [(0, "exact", "train.jsonl:3"), (2, "exact", "train.jsonl:1")]


def test_thirteen_consecutive_words_are_an_overlap_and_twelve_are_not() -> None:
    words = LONG.split()
    shares_13 = question(f"Tell me: {' '.join(words[:13]).upper()}, and then?")
    shares_12 = question(f"Tell me: {' '.join(words[:12])}, and then?")
    found = find_overlaps([shares_13, shares_12], sourced(Text(f"so {LONG} it is")))
    assert [tuple(one) for one in found] == [(0, "13-gram", "train.jsonl:1")]


@pytest.mark.parametrize(
    "text",
    [
        "从前有座山山里有座庙庙里有个老和尚",
        "วันนี้อากาศดีมากเราไปเที่ยวทะเลกัน",
        "एक दिन मैं अपने दोस्त के साथ नदी के किनारे घूमने के लिए गया था",
    ],
    ids=["Chinese", "Thai", "Hindi"],
)
def test_thirteen_words_are_found_in_scripts_that_have_no_spaces_or_marks_within_words(text: str) -> None:
    assert [one.kind for one in find_overlaps([question(f"问：{text}")], sourced(Text(f"答：{text}")))] == ["13-gram"]
    assert find_overlaps([question(f"问：{text[: len(text) // 3]}")], sourced(Text(f"答：{text}"))) == []


def test_the_expected_answer_is_searched_too() -> None:
    assert find_overlaps([question("Count.", LONG)], sourced(chat("Count, please.", LONG)))[0].kind == "13-gram"


def test_words_that_many_rows_share_are_no_overlap_but_an_identical_prompt_is() -> None:
    system = chat("x", "y")
    assert isinstance(system, Chat)
    rows = [PromptCompletion(f"{LONG} {number}", "a") for number in range(BOILERPLATE_ROWS + 1)]
    assert find_overlaps([question(f"{LONG} new")], sourced(*rows)) == []
    assert find_overlaps([question(f"{LONG} new")], sourced(*rows[:-1]))[0].kind == "13-gram"
    assert find_overlaps([question(f"{LONG} 3")], sourced(*rows))[0].kind == "exact"
