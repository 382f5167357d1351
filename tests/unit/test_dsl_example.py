"""The example's language does what its README says, and its rows have right answers and share no prompt."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.dsl.generate import COUNTS, generate, normalised
from examples.dsl.language import LanguageError, Series, Sheet, evaluate
from examples.dsl.questions import LINE_ITEMS, Question
from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.data.chat.shapes import Chat, PromptCompletion, example_of
from llmtrain.data.files.read import Row, read_rows

ROOT = Path(__file__).parents[2]
SERIES = st.lists(st.none() | st.integers(-99, 99), min_size=1, max_size=12).map(tuple)
SHEET = Sheet(
    periods=("Jan", "Feb", "Mar"),
    line_items={"Net Revenue": (1, 2, 4)},
    mappings={("City", "Country"): {"Lyon": "France"}},
    dimensions={"City": ("Lyon", "Turin"), "Country": ("France", "Italy"), "Time": ("Jan", "Feb", "Mar")},
)


def roll(values: Series, count: int, direction: str) -> Series:
    formula = f"FLOWROLL(Units, {count}, {direction})"
    result = evaluate(formula, Sheet(tuple(map(str, range(len(values)))), {"Units": values}))
    assert isinstance(result, tuple)
    return result


@given(values=SERIES, count=st.integers(1, 15))
def test_a_window_is_summed_or_blank_where_it_is_incomplete(values: Series, count: int) -> None:
    result = roll(values, count, "BACKWARD")
    assert len(result) == len(values)
    for period, total in enumerate(result):
        window = [values[period - back] if back <= period else None for back in range(count)]
        known = [value for value in window if value is not None]
        assert total == (sum(known) if len(known) == count else None)


@given(values=SERIES, count=st.integers(1, 15))
def test_forward_is_backward_in_the_mirror(values: Series, count: int) -> None:
    assert roll(values, count, "FORWARD") == roll(values[::-1], count, "BACKWARD")[::-1]


@given(values=SERIES)
def test_a_window_of_one_changes_nothing_and_one_too_long_is_blank_everywhere(values: Series) -> None:
    for direction in ("BACKWARD", "FORWARD"):
        assert roll(values, 1, direction) == values
        assert set(roll(values, len(values) + 1, direction)) == {None}


@given(mapping=st.dictionaries(st.sampled_from("ABCDE"), st.sampled_from("xyz")), value=st.sampled_from("ABCDE"))
def test_a_value_is_looked_up_or_blank_without_a_mapping(mapping: dict[str, str], value: str) -> None:
    sheet = Sheet(mappings={("S", "T"): mapping}, dimensions={"S": tuple("ABCDE"), "T": tuple("xyz"), "U": ("u",)})
    assert evaluate(f"DIMMATCH({value}, S, T)", sheet) == mapping.get(value)
    assert evaluate(f"DIMMATCH({value}, S, U)", sheet) is None


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("FLOWROLL(Net Revenue, 2, BACKWARD)", (None, 3, 6)),
        (" FLOWROLL ( Net Revenue,2 ,FORWARD ) ", (3, 6, None)),
        ("DIMMATCH(Lyon, City, Country)", "France"),
        ("DIMMATCH(Turin, City, Country)", None),
        ("DIMMATCH(Feb, Time, Country)", None),
    ],
)
def test_formulas(formula: str, value: object) -> None:
    assert evaluate(formula, SHEET) == value


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("FLOWROLL(2, Net Revenue, BACKWARD)", "the line item comes first"),
        ("FLOWROLL(BACKWARD, 2, Net Revenue)", "the line item comes first"),
        ("FLOWROLL(Net Revenue, BACKWARD, 2)", "the direction comes last"),
        ("FLOWROLL(Revenue, 2, BACKWARD)", "there is no line item Revenue"),
        ("FLOWROLL(Net Revenue, 0, BACKWARD)", "PeriodCount is a whole number from 1, not 0"),
        ("FLOWROLL(Net Revenue, 1.5, BACKWARD)", "PeriodCount is a whole number from 1, not 1.5"),
        ("FLOWROLL(Net Revenue, 2, BACKWARDS)", "the direction is BACKWARD or FORWARD, not BACKWARDS"),
        ("FLOWROLL(Net Revenue, 2)", "FLOWROLL takes three arguments: LineItem, PeriodCount, Direction"),
        ("DIMMATCH(Lyon, City, Time)", "Time cannot be the target of DIMMATCH"),
        ("DIMMATCH(City, Lyon, Country)", "the value comes first"),
        ("DIMMATCH(Lyon, City, Planet)", "there is no dimension Planet"),
        ("DIMMATCH(Rome, City, Country)", "Rome is no value of City"),
        ("ROLLFLOW(Net Revenue, 2, BACKWARD)", "there is no function ROLLFLOW"),
        ("FLOWROL(Net Revenue, 2, BACKWARD)", "there is no function FLOWROL; it is FLOWROLL"),
        ("flowroll(Net Revenue, 2, BACKWARD)", "there is no function flowroll; it is FLOWROLL"),
        ("Net Revenue", "a formula is a function with its arguments in parentheses"),
    ],
)
def test_what_cannot_be_says_why(formula: str, message: str) -> None:
    with pytest.raises(LanguageError) as caught:
        evaluate(formula, SHEET)
    assert str(caught.value).startswith(message)


@pytest.fixture(scope="module")
def files() -> dict[str, list[Question]]:
    return generate(COUNTS, seed=7)


def test_files_are_as_large_as_wanted_and_share_no_prompt(files: dict[str, list[Question]]) -> None:
    assert {name: len(questions) for name, questions in files.items()} == COUNTS
    prompts = [normalised(question.prompt) for questions in files.values() for question in questions]
    assert len(prompts) == len(set(prompts)) == sum(COUNTS.values())


def test_traps_are_held_out_as_adversarial_and_kinds_are_even(files: dict[str, list[Question]]) -> None:
    kinds = {name: Counter(question.kind for question in questions) for name, questions in files.items()}
    assert set(kinds["adversarial"]) == {
        "wrong-order",
        "time-as-target",
        "unknown-direction",
        "window-too-long",
        "similar-function",
        "similar-line-items",
    }
    assert min(kinds["adversarial"].values()) >= 20
    assert set(kinds["dev"]) == set(kinds["test"])
    assert not set(kinds["test"]) & set(kinds["adversarial"])
    assert sum(kinds["train"][kind] for kind in kinds["adversarial"]) == COUNTS["train"] // 4
    blank = [question.answer for question in files["adversarial"] if question.kind == "window-too-long"]
    assert all(set(re.findall(r"\S+(?=,|$)", answer)) == {"blank"} for answer in blank)


def test_the_seed_alone_decides_and_a_smaller_file_is_the_beginning(files: dict[str, list[Question]]) -> None:
    small = dict.fromkeys(COUNTS, 40)
    assert generate(small, seed=7) == generate(small, seed=7)
    assert generate(small, seed=7)["test"] == files["test"][:40]
    assert generate(small, seed=8)["test"] != files["test"][:40]


def test_answers_are_what_the_prompts_own_words_give(files: dict[str, list[Question]]) -> None:
    """Each prompt is read anew, by another way than the one that wrote it."""
    checked: Counter[str] = Counter()
    for question in [question for questions in files.values() for question in questions]:
        formula = re.search(r"(FLOWROLL|DIMMATCH)\(([^,]+), ([^,]+), ([^)]+)\)", question.prompt)
        if question.kind in ("flowroll-series", "flowroll-period", "similar-line-items", "window-too-long"):
            assert formula
            tables = [line.partition(": ") for line in question.prompt.splitlines()[:-1]]
            series = {name: [pair.rpartition(" ") for pair in cells.split(", ")] for name, _, cells in tables}
            if formula[2] not in series:
                assert question.answer == f"Not valid: there is no line item {formula[2]}."
                continue
            cells = series[formula[2]]
            count, step = int(formula[3]), -1 if formula[4] == "BACKWARD" else 1
            expected = []
            for period, (name, _, _) in enumerate(cells):
                window = [period + step * index for index in range(count)]
                complete = all(0 <= at < len(cells) and cells[at][2] != "blank" for at in window)
                total = str(sum(int(cells[at][2]) for at in window)) if complete else "blank"
                expected.append(f"{name} {total}")
            if question.kind == "flowroll-period":
                asked = max((name for name, _, _ in cells if re.search(rf"\b{name}[?.]", question.prompt)), key=len)
                assert f"{asked} {question.answer}" in expected
            else:
                assert question.answer == ", ".join(expected)
        elif question.kind == "dimmatch-value":
            assert formula
            rows = dict(row.split(" is in ") for row in question.prompt.splitlines()[0].partition(": ")[2].split("; "))
            assert question.answer == rows[formula[2]].replace("nothing", "blank")
        elif question.kind in ("wrong-order", "time-as-target", "unknown-direction", "similar-function"):
            assert question.answer.startswith("Not valid: ")
        elif question.kind == "flowroll-formula":
            written = re.fullmatch(r"FLOWROLL\((.+), (\d+), (BACKWARD|FORWARD)\)", question.answer)
            assert written
            assert written[1] in LINE_ITEMS
            assert f" {written[1]} " in question.prompt
            assert ("before" in question.prompt) == (written[3] == "BACKWARD")
            assert f" {written[2]} " in question.prompt or f"the {int(written[2]) - 1} " in question.prompt
        else:
            continue
        checked[question.kind] += 1
    assert len(checked) == 10


@pytest.mark.parametrize(("shape", "kind"), [("messages", Chat), ("completion", PromptCompletion)])
def test_the_program_writes_rows_that_can_be_trained_on(shape: str, kind: type, tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--shape", shape, "--train", "40", "--dev", "5", "--adversarial", "6"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.dsl.generate", *arguments, "--test", "9"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "adversarial.jsonl  6 rows" in done.stdout
    rows = list(read_rows(str(tmp_path / "*.jsonl"), key="data.train"))
    assert len(rows) == 60
    assert all(isinstance(row, Row) and isinstance(example_of(row.values), kind) for row in rows)
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert first["kind"] in {"concept", *(question.kind for question in generate(COUNTS, seed=7)["train"])}


@pytest.mark.parametrize("name", ["llama3-8b", "qwen2.5-3b", "local"])
def test_its_configs_are_valid(name: str) -> None:
    path = ROOT / f"examples/dsl/{name}.yaml"
    assert run(["validate", str(path)]) == 0
    config = load_config(str(path)).config
    assert isinstance(config.model, HuggingFaceConfig)
    assert config.model.lora is not None
    assert config.data.name == "chat"
    assert (config.model.quantization == "nf4") == (name == "llama3-8b")
