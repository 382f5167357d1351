"""The steps that look at one document: each rule at its threshold, by its source."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.quality import C4Step, GopherStep, LanguageStep, LengthStep, OwnStep
from llmtrain.data.prepare.quality import gopher
from llmtrain.data.prepare.quality.c4 import C4
from llmtrain.data.prepare.quality.gopher import Gopher
from llmtrain.data.prepare.quality.language import Language
from llmtrain.data.prepare.quality.length import Length
from llmtrain.data.prepare.quality.own import Own
from llmtrain.data.prepare.quality.step import Dropped, StepError
from llmtrain.errors import ConfigError

KEY = "prepare.steps[1]"


def _prose(num_words: int, seed: int = 0) -> list[str]:
    """Different words of 4 to 8 letters with stop words between them, so that nothing repeats."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(4, 8))) for _ in range(num_words)]
    words[::10] = [draw.choice(["the", "of", "and", "that"]) for _ in words[::10]]
    words[:2] = ["the", "of"]
    return words


def _gopher(text: str, *skip: str) -> str:
    """The rule that drops the text, or none."""
    made = Gopher(GopherStep.model_validate({"skip": list(skip)}), key=KEY).apply(text)
    return made.rule if isinstance(made, Dropped) else ""


def _lines(num_lines: int, start: str = "", end: str = "") -> str:
    words = _prose(num_lines * 10)
    return "\n".join(f"{start}{' '.join(words[at * 10 : at * 10 + 10])}{end}" for at in range(num_lines))


def test_length_is_a_closed_range_of_characters() -> None:
    step = Length(LengthStep(min_chars=2, max_chars=3), key=KEY)
    assert [step.apply(text) for text in ("é", "éé", "ééé", "éééé")] == [
        Dropped("too_short"), "éé", "ééé", Dropped("too_long"),
    ]  # fmt: skip


def test_prose_keeps_all_rules_of_gopher() -> None:
    assert _gopher(_lines(40)) == ""
    assert _gopher("\n\n".join(_lines(20).split("\n"))) == ""


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("too_few_words", _prose(50), _prose(49)),
        ("mean_word_length", ["the", "of", *["abc"] * 0, *_prose(98)[2:]], ["the", "of", *["ab"] * 98]),
        ("mean_word_length", ["the", "of", *["a" * 10] * 98], ["the", "of", *["a" * 11] * 98]),
        ("symbols", [*_prose(90), *["#"] * 10], [*_prose(89), *["#"] * 11]),
        ("symbols", [*_prose(90), *["x..."] * 10], [*_prose(89), *["x..."] * 11]),
        ("words_without_letters", [*_prose(80), *["123"] * 20], [*_prose(79), *["1234"] * 21]),
        ("stop_words", ["the", "have", *["word"] * 98], ["The", "the", *["word"] * 98]),
    ],
)
def test_gopher_rules_of_words(rule: str, kept: list[str], dropped: list[str]) -> None:
    others = [other for other in Gopher.rules if other != rule]
    assert _gopher(" ".join(kept), *others) == ""
    assert _gopher(" ".join(dropped), *others) == rule


def test_gopher_too_many_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gopher, "WORDS", (50, 100))
    assert _gopher(" ".join(_prose(100))) == ""
    assert _gopher(" ".join(_prose(101))) == "too_many_words"


def test_gopher_rules_of_lines() -> None:
    for start in ("- ", "• ", "* "):
        bullets, plain = _lines(20, start=start).split("\n"), _lines(20).split("\n")
        assert _gopher("\n".join(bullets[:18] + plain[18:])) == ""
        assert _gopher("\n".join(bullets[:19] + plain[19:])) == "bullet_lines"
    for end in ("...", "…"):
        open_ended, plain = _lines(20, end=end).split("\n"), _lines(20).split("\n")
        assert _gopher("\n".join(open_ended[:6] + plain[6:])) == ""
        assert _gopher("\n".join(open_ended[:7] + plain[7:])) == "ellipsis_lines"


def test_gopher_repeated_lines_and_paragraphs() -> None:
    lines = _lines(100).split("\n")
    short = ["again"] * 32  # 31 of 132 lines came before: 0.23; 32 of 101: 0.31
    assert _gopher("\n".join([*lines, *short]), "duplicate_ngrams", "top_ngrams") == ""
    assert _gopher("\n".join([*lines[:69], *short]), "duplicate_ngrams", "top_ngrams") == "duplicate_lines"
    half = [*lines[:60], *lines[:20]]  # a quarter of the lines, and of their characters
    assert _gopher("\n".join(half)) == "duplicate_line_characters"
    skipped = ("duplicate_lines", "duplicate_line_characters", "top_ngrams", "duplicate_ngrams")
    assert _gopher("\n\n".join(half), *skipped) == "duplicate_paragraph_characters"
    assert _gopher("\n\n".join([*lines[:60], *lines[:30]]), *skipped) == "duplicate_paragraphs"


def test_gopher_repeated_ngrams() -> None:
    words = _prose(400)
    # "abcde fghij" 50 times among 400 words of about as many letters: above a fifth of the characters
    often = [word for at in range(0, 400, 8) for word in (*words[at : at + 8], "abcdefghij", "klmnopqrst")]
    assert _gopher(" ".join(often)) == "top_ngrams"
    assert _gopher(" ".join(often), "top_ngrams") == ""
    sentence = [f"word{number}x" for number in range(12)]
    repeated = [word for at in range(0, 400, 40) for word in (*words[at : at + 40], *sentence)]
    assert _gopher(" ".join(repeated)) == "duplicate_ngrams"
    assert _gopher(" ".join([*words, *sentence, *sentence])) == ""


def test_the_rules_of_the_schema_are_the_rules_of_the_steps() -> None:
    skippable = GopherStep.model_json_schema()["properties"]["skip"]["items"]["enum"]
    assert tuple(skippable) == Gopher.rules
    every = list(skippable)
    assert _gopher("", *every) == ""


# -- C4 ----------------------------------------------------------------------------------------------------------------

SENTENCES = "This is a first sentence here.\nIs this a second one then?\nWhat a fine third line this!"


def _c4(text: str, *skip: str) -> str | Dropped:
    return C4(C4Step.model_validate({"skip": list(skip)}), key=KEY).apply(text)


@pytest.mark.parametrize(
    "line",
    [
        "a line without an end mark at all",
        "Only four words here.",
        "Please enable JavaScript to see this page.",
        "By going on you accept our Cookie Policy now.",
    ],
)
def test_c4_removes_the_line_and_no_other(line: str) -> None:
    first, rest = SENTENCES.split("\n", 1)
    assert _c4(f"{first}\n{line}\n{rest}") == SENTENCES
    assert _c4(f"{line}\n\n{SENTENCES}\n") == SENTENCES


def test_c4_rules_of_documents_and_their_switches() -> None:
    assert _c4(SENTENCES) is not None
    assert _c4(f"{SENTENCES}\nLorem Ipsum dolor sit amet is here.") == Dropped("lorem_ipsum")
    assert _c4(f"{SENTENCES}\nint main() {{ return 0; }}") == Dropped("curly_brackets")
    assert _c4("\n".join(SENTENCES.split("\n")[:2])) == Dropped("few_sentences")
    assert _c4("One sentence is here. And another is here! Do you see a third?") != Dropped("few_sentences")
    assert _c4("Cited [1] words are in here [citation needed].", "few_sentences") == "Cited  words are in here ."
    code = "if (x) {\n  y = 1;\n}"
    every = C4Step.model_json_schema()["properties"]["skip"]["items"]["enum"]
    assert _c4(code, *every) == code


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*SENTENCES.split("\n"), "x [1]", "[[1]2] a b c d e.", "", "{", "javascript."])))
def test_c4_a_second_pass_changes_nothing(lines: list[str]) -> None:
    once = _c4("\n".join(lines), "few_sentences")
    if isinstance(once, str):
        assert _c4(once, "few_sentences") == once


# -- language ----------------------------------------------------------------------------------------------------------

TEXTS = {
    "en": "The weather was fine, so we walked along the river and talked about the books that we had read.",
    "de": "Das Wetter war schön, also gingen wir am Fluss entlang und sprachen über die Bücher, die wir lasen.",
    "fr": "Il faisait beau, nous avons donc marché le long de la rivière en parlant des livres que nous lisions.",
    "ja": "天気がよかったので、川に沿って歩きながら、読んだ本について話しました。",
}


def test_languages_are_told_by_the_model_of_the_package() -> None:
    for code, text in TEXTS.items():
        assert Language(LanguageStep(keep=[code]), key=KEY).apply(text) == text
        others = [other for other in TEXTS if other != code]
        assert Language(LanguageStep(keep=others), key=KEY).apply(text) == Dropped("other_language")
    assert Language(LanguageStep(keep=list(TEXTS)), key=KEY).apply(TEXTS["de"]) == TEXTS["de"]


def test_an_uncertain_language_is_dropped_unless_any_will_do() -> None:
    mixed = "ok 12 ok"
    [language, confidence] = Language(LanguageStep(keep=["en"]), key=KEY)._identifier.classify(mixed)
    assert confidence < 0.5
    assert Language(LanguageStep(keep=[language]), key=KEY).apply(mixed) == Dropped("low_confidence")
    assert Language(LanguageStep(keep=[language], min_confidence=0), key=KEY).apply(mixed) == mixed


def test_an_unknown_language_and_a_missing_library_are_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.steps\[1\]\.keep: the model knows no language english; it knows"):
        Language(LanguageStep(keep=["en", "english"]), key=KEY)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ConfigError, match=r"prepare\.steps\[9\]: language needs py3langid: `.*\[quality\]'?`"):
        Language(LanguageStep(keep=["en"]), key="prepare.steps[9]")


# -- a function of one's own -------------------------------------------------------------------------------------------


def _own(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str) -> Own:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return Own(OwnStep(function=f"{name}:step"), key=KEY)


def test_a_function_of_ones_own_changes_and_drops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def step(text):\n    return None if 'bad' in text else text.upper()\n"
    step = _own(tmp_path, monkeypatch, "own_good", source)
    assert step.apply("text") == "TEXT"
    assert step.apply("bad") == Dropped("own")
    other = _own(tmp_path, monkeypatch, "own_other", source + "# more\n")
    assert step.source_sha256 not in (None, other.source_sha256)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", r"prepare\.steps\[1\]: own_\d+:step failed \(ZeroDivisionError: .* at .*own_\d+\.py:2\)"),
        ("return 3", "returned int, not text or None"),
        ("return '\\ud800'", "returned half of a surrogate pair"),
    ],
)
def test_its_fault_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    step = _own(tmp_path, monkeypatch, f"own_{len(body)}", f"def step(text):\n    {body}\n")
    with pytest.raises(StepError, match=message):
        step.apply("text")


def test_a_function_that_is_not_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"prepare\.steps\[1\]\.function: own_empty has no function or class 'step'"):
        _own(tmp_path, monkeypatch, "own_empty", "")
