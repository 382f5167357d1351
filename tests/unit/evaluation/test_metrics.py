"""Metrics of answers: those of rouge-score and sacreBLEU to the digit, rows summed to corpora, nothing left out."""

from __future__ import annotations

import math
import random
import re
import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics import BLEU, CHRF

from llmtrain.errors import ConfigError
from llmtrain.evaluation.metrics import (
    BUILT_IN,
    exact_match,
    jaccard,
    longest_common_subsequence,
    metrics_named,
)
from llmtrain.evaluation.scores import measures_of, row_statistics, scores

WORDS = ["the", "The", "cat", "sat.", "on", "a", "mat,", "don't", "snake_case", "42", "x=1;", "\n", "!", ""]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6)
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def measured(pairs: list[tuple[str, str]], *names: str, ignore_case: bool = False) -> dict[str, float]:
    metrics = metrics_named(names, ignore_case=ignore_case)
    return scores(measures_of(metrics, with_loss=False), row_statistics(pairs, names, ignore_case=ignore_case))


@given(PAIRS)
def test_rouge_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    theirs = [RougeScorer(ROUGES).score(expected, prediction) for prediction, expected in pairs]
    found = measured(pairs, *ROUGES)
    for name in ROUGES:
        mean = sum(float(row[name].fmeasure) for row in theirs) / len(pairs)
        assert found[name] == pytest.approx(mean, abs=1e-12), name


@given(PAIRS)
def test_bleu_and_chrf_are_those_of_sacrebleu_over_the_corpus(pairs: list[tuple[str, str]]) -> None:
    predictions, expected = zip(*pairs, strict=True)
    found = measured(pairs, "bleu", "chrf")
    assert found["bleu"] == pytest.approx(BLEU().corpus_score(predictions, [expected]).score, abs=1e-9)
    assert found["chrf"] == pytest.approx(CHRF().corpus_score(predictions, [expected]).score, abs=1e-9)


SCRIPTS = {
    "Chinese": ("我用 Python 写程序。", "我用 Python 写程式。"),
    "Japanese": ("東京でラーメンを食べた。", "京都でラーメンを食べました。"),
    "Thai": ("วันนี้อากาศดีมาก", "วันนี้อากาศไม่ดี"),
    "Arabic": ("ذهب الولد إلى المدرسة اليوم.", "ذهبت البنت إلى المدرسة اليوم."),
    "Hindi": ("मैं आज स्कूल जा रहा हूँ।", "मैं कल स्कूल जा रहा था।"),
    "Korean": ("나는 오늘 학교에 갔다.", "나는 어제 학교에 갔다."),
    "Cyrillic": ("Сегодня мы идём в школу.", "Вчера мы шли в школу."),
    "emoji": ("👍🏽 😀 👩‍👩‍👧 ❤️", "👍🏽 😢 👩‍👩‍👧 ❤️"),
    "accents": ("Où est le café à Besançon ?", "Où est le cafe de Besançon ?"),
}
REFERENCE_WORDS = {
    "Chinese": r"[\u4e00-\u9fff]|[a-z]+",
    "Japanese": r"[\u3041-\u30ff\u4e00-\u9fff]",
    "Thai": r"[\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46][\u0e31\u0e34-\u0e3a\u0e47-\u0e4e]*",
    "Hindi": r"[\u0900-\u0963\u0966-\u097f]+",
    "emoji": r"\S+",
}
"""Of scripts that `\\w+` does not split into words as readers do."""
BLEU_TOKENIZER = {"Chinese": "zh", "Japanese": "char", "Thai": "char"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_metrics_equal_those_of_the_packages_in_every_script(script: str) -> None:
    class Words(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return re.findall(REFERENCE_WORDS.get(script, r"\w+"), text.lower().replace("\ufe0f", ""))

    expected, other = SCRIPTS[script]
    perfect = measured([(expected, expected)], *BUILT_IN)
    assert perfect == {name: pytest.approx(100 if name in ("bleu", "chrf") else 1) for name in BUILT_IN}
    found = measured([(other, expected)], *BUILT_IN)
    theirs = RougeScorer(ROUGES, tokenizer=Words()).score(expected, other)
    assert {name: found[name] for name in ROUGES} == {
        name: pytest.approx(theirs[name].fmeasure, abs=1e-12) for name in ROUGES
    }
    assert 0 < found["rouge1"] < 1
    assert 0 < found["jaccard"] < 1
    bleu = BLEU(tokenize=BLEU_TOKENIZER.get(script, "13a"))
    assert found["bleu"] == pytest.approx(bleu.corpus_score([other], [[expected]]).score, abs=1e-9)
    (metric,) = metrics_named(["bleu"], expected=[expected])
    assert metric.signature == str(bleu.get_signature())
    assert found["chrf"] == pytest.approx(CHRF().corpus_score([other], [[expected]]).score, abs=1e-9)


def test_a_negation_without_an_ascii_letter_is_another_answer() -> None:
    assert measured([("是 1", "不是 1")], "rouge1", "jaccard", "exact_match") == {
        "rouge1": pytest.approx(0.8),
        "jaccard": pytest.approx(2 / 3),
        "exact_match": 0,
    }


def test_texts_that_unicode_defines_as_equal_are_equal() -> None:
    composed, decomposed = "caf\u00e9 \ud55c\uad6d", "cafe\u0301 \u1112\u1161\u11ab\u1100\u116e\u11a8"
    found = measured([(decomposed, composed)], "exact_match", "jaccard", "rougeL", ignore_case=True)
    assert found == {"exact_match": 1, "jaccard": 1, "rougeL": 1}


def test_rouge_is_not_defined_where_nothing_is_a_word_and_such_rows_are_left_out() -> None:
    signs, words = ("→ ∑", "→ ∑"), ("a b", "a c")
    assert all(math.isnan(value) for value in measured([signs], *ROUGES).values())
    assert measured([signs, words], "rouge1", "exact_match", "jaccard") == {
        "rouge1": 0.5,
        "exact_match": 0.5,
        "jaccard": pytest.approx((1 + 1 / 3) / 2),
    }
    assert measured([("?", "!"), words], "rouge1") == {"rouge1": 0.25}, "as rouge-score counts ASCII"


def test_the_signature_names_the_tokenizers_of_all_rows() -> None:
    (metric,) = metrics_named(["bleu"], expected=["是", "yes", "はい"])
    assert metric.signature is not None
    assert "|tok:13a+char+zh|" in metric.signature


def test_one_tokenizer_for_all_rows_is_sacrebleus_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("今日は雨です。", "今日は晴れです。"), ("OK, 42", "OK, 43"), ("วันนี้", "วันนี้ดี")]
    predictions, expected = map(list, zip(*pairs, strict=True))
    for tokenizer in ("char", "intl", "zh"):
        (metric,) = metrics_named(["bleu"], expected=expected, bleu_tokenizer=tokenizer)
        theirs = BLEU(tokenize=tokenizer)
        score = theirs.corpus_score(predictions, [expected]).score
        sums = row_statistics(pairs, ["bleu"], bleu_tokenizer=tokenizer)["bleu"].sum(axis=0).tolist()
        assert metric.score(sums) == pytest.approx(score)
        assert metric.signature == str(theirs.get_signature())
    monkeypatch.setattr("sacrebleu.tokenizers.tokenizer_ja_mecab.MeCab", None)
    with pytest.raises(ConfigError, match=r"bleu_tokenizer: ja-mecab is not installed: .*sacrebleu\[ja\]"):
        metrics_named(["bleu"], bleu_tokenizer="ja-mecab")


def test_a_row_has_sentence_bleu_and_corpus_bleu_is_not_its_mean() -> None:
    pairs = [("the cat sat on the mat", "the cat sat on a mat"), ("no", "yes it is")]
    (bleu,) = metrics_named(["bleu"])
    rows = [bleu.row_score(bleu.statistics(*pair)) for pair in pairs]
    theirs = [BLEU(effective_order=True).sentence_score(prediction, [expected]).score for prediction, expected in pairs]
    assert rows == pytest.approx(theirs)
    assert measured(pairs, "bleu")["bleu"] != pytest.approx(sum(rows) / 2, abs=1)
    assert bleu.signature is not None
    assert "tok:13a" in bleu.signature
    assert "version:2" in bleu.signature


def test_exact_match_ignores_outer_blanks_and_optionally_case() -> None:
    assert exact_match(" Yes\n", "Yes") == 1
    assert exact_match("yes", "Yes") == 0
    assert exact_match("yes", "Yes", ignore_case=True) == 1
    assert exact_match("a  b", "a b") == 0, "blanks within are text"
    assert exact_match(" ", "") == 0, "an empty answer counts as none"
    assert measured([("yes", "Yes"), ("no", "No")], "exact_match", ignore_case=True) == {"exact_match": 1.0}


def test_jaccard_is_of_lower_cased_word_sets() -> None:
    assert jaccard("The cat the", "the dog") == 1 / 3
    assert jaccard("a b", "A B b") == 1
    assert jaccard("", "a") == 0
    assert jaccard("", "") == 0


def test_empty_predictions_count_as_zero_and_are_not_skipped() -> None:
    answered = [("the cat sat on the mat", "the cat sat on the mat")]
    with_silence = [*answered, ("", "the dog lay on the rug")]
    for name in BUILT_IN:
        alone, together = measured(answered, name)[name], measured(with_silence, name)[name]
        assert together < alone * 0.9, name
    for name in ("exact_match", "jaccard", *ROUGES):
        assert measured(with_silence, name)[name] == pytest.approx(0.5), name
    assert set(measured([("", "a b c d")], *BUILT_IN).values()) == {0.0}


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(0, 3), max_size=40))
def test_the_longest_common_subsequence_equals_that_of_dynamic_programming(first: list[int], second: list[int]) -> None:
    row = [0] * (len(second) + 1)
    for one in first:
        before = row
        row = [0]
        for column, other in enumerate(second):
            row.append(before[column] + 1 if one == other else max(before[column + 1], row[column]))
    assert longest_common_subsequence([str(one) for one in first], [str(other) for other in second]) == row[-1]


def test_a_metric_of_the_user_s_own_is_the_mean_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def length_ratio(prediction: str, expected: str) -> float:
        """How long answers are."""
        return len(prediction) / len(expected)

    module = ModuleType("my_metrics")
    vars(module).update(length_ratio=length_ratio, broken=lambda prediction, expected: math.nan, value=3)
    vars(module).update(fails=lambda prediction, expected: 1 / (len(prediction) - 2))
    monkeypatch.setitem(sys.modules, "my_metrics", module)
    assert measured([("ab", "abcd"), ("abcd", "abcd")], "my_metrics:length_ratio") == {"my_metrics:length_ratio": 0.75}
    assert metrics_named(["my_metrics:length_ratio"])[0].definition == "How long answers are. (mean of rows)"
    with pytest.raises(ConfigError, match="my_metrics:broken returned nan for the prediction 'ab'"):
        measured([("ab", "abcd")], "my_metrics:broken")
    with pytest.raises(ConfigError, match=r"my_metrics:fails failed for the prediction 'ab'.*ZeroDivisionError"):
        measured([("ab", "abcd")], "my_metrics:fails")
    for path, message in (
        ("rogueL", "no metric 'rogueL'; did you mean 'rougeL'"),
        ("my_metrics:gone", "has no function or class 'gone'"),
        ("no_such_module_here:f", "cannot be imported"),
        ("my_metrics:value", "has no function or class 'value'"),
    ):
        with pytest.raises(ConfigError, match=message):
            metrics_named([path])
    with pytest.raises(ConfigError, match="names bleu twice"):
        metrics_named(["bleu", "chrf", "bleu"])


def test_several_processes_compute_the_same_statistics_as_one() -> None:
    draw = random.Random(3)
    pairs = [(" ".join(draw.choices(WORDS, k=8)), " ".join(draw.choices(WORDS, k=8))) for _ in range(4_100)]
    alone = row_statistics(pairs, ["rougeL", "bleu"], num_processes=1)
    shared = row_statistics(pairs, ["rougeL", "bleu"], num_processes=2)
    assert all(np.array_equal(alone[name], shared[name]) for name in alone)


def test_no_rows_have_no_score() -> None:
    assert math.isnan(measured([], "exact_match")["exact_match"])
