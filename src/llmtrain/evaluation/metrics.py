"""Metrics that compare generated text with expected text.

    (prediction, expected) ─ statistics ─▶ numbers of a row ─ summed over rows ─▶ score

Means over rows are such sums too, so totals and resamples of all metrics are computed in one way. BLEU and chrF are
sacreBLEU's; ROUGE equals that of the rouge-score package, which tests check. `words` splits text of any script. An
empty prediction counts like any other: it has nothing in common with the expected text. No torch.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from numbers import Real
from typing import Any

from llmtrain.config.loading.messages import nearest
from llmtrain.errors import ConfigError
from llmtrain.evaluation.words import composed, split_at_blanks, split_words, tokenizer_by_script
from llmtrain.import_path import import_callable
from llmtrain.installing import install

BUILT_IN = ("exact_match", "jaccard", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf")
AUTO = "auto"
BLEU_TOKENIZERS = "zh where a row's expected text is Chinese, char for other scripts without spaces, else 13a"
ROUGE_WORDS = (
    "words are runs of letters and digits, or characters of scripts without spaces, lower-cased, not stemmed; a row "
    "whose expected text has none is left out"
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric: one number, of which more is better."""

    name: str
    definition: str
    """Definition in words: what is counted, and what is done to the texts first."""
    statistics: Callable[[str, str], Sequence[float]]
    """Function from a row's (prediction, expected) to its statistics; as many for each row."""
    score: Callable[[Sequence[float]], float]
    """Function from the sums of the rows' statistics to the score."""
    row_score: Callable[[Sequence[float]], float]
    """Function from a row's own statistics to its score."""
    signature: str | None = None
    """Name that the package which computes the metric gives to its settings."""


def metrics_named(
    names: Sequence[str], *, ignore_case: bool = False, bleu_tokenizer: str = AUTO, expected: Sequence[str] = ()
) -> list[Metric]:
    """Return the metrics of these names or import paths (`my_pkg.metrics:length_ratio`).

    `expected`: the expected texts, whose scripts decide which tokenizers BLEU's signature names if `bleu_tokenizer` is
    auto. Raises ConfigError for an unknown name, and for a function or a tokenizer that cannot be imported.
    """
    metrics = [
        _bleu_metric(bleu_tokenizer, expected) if name == "bleu" else _metric(name, ignore_case=ignore_case)
        for name in names
    ]
    if twice := [name for name, count in Counter(metric.name for metric in metrics).items() if count > 1]:
        raise ConfigError(f"evaluation.metrics names {', '.join(twice)} twice: name each once")
    return metrics


def mean_metric(name: str, definition: str, row: Callable[[str, str], float]) -> Metric:
    """Return a metric: the mean of `row(prediction, expected)` over the rows for which that is not nan."""

    def statistics(prediction: str, expected: str) -> tuple[float, float]:
        value = row(prediction, expected)
        return (0.0, 0.0) if math.isnan(value) else (value, 1.0)

    def mean(sums: Sequence[float]) -> float:
        return sums[0] / sums[1] if sums[1] else math.nan

    return Metric(
        name=name,
        definition=definition,
        statistics=statistics,
        score=mean,
        row_score=mean,
    )


def _metric(name: str, *, ignore_case: bool) -> Metric:
    if name == "exact_match":
        case = "case ignored" if ignore_case else "case matters"
        return mean_metric(
            name,
            f"share of rows whose prediction, not empty, is what was expected, blanks around both taken off; {case}",
            lambda prediction, expected: exact_match(prediction, expected, ignore_case=ignore_case),
        )
    if name == "jaccard":
        what = (
            "words that both have over words that either has, as sets, lower-cased, split at blanks, or into "
            "characters in scripts without spaces; mean of rows"
        )
        return mean_metric(name, what, jaccard)
    if name in ("rouge1", "rouge2"):
        order = int(name[-1])
        units = "words" if order == 1 else "pairs of words"
        what = f"F1 of {units} in common, as rouge-score counts them; {ROUGE_WORDS}; mean of rows"
        return mean_metric(name, what, lambda prediction, expected: rouge_n(prediction, expected, order=order))
    if name == "rougeL":
        what = f"F1 of the longest common subsequence of words, as rouge-score counts it; {ROUGE_WORDS}; mean of rows"
        return mean_metric(name, what, rouge_l)
    if name == "rougeLsum":
        what = f"rougeL line by line, united, as rouge-score counts it; {ROUGE_WORDS}; mean of rows"
        return mean_metric(name, what, rouge_lsum)
    if name == "chrf":
        return _chrf_metric()
    return _custom(name)


def exact_match(prediction: str, expected: str, *, ignore_case: bool = False) -> float:
    """Return 1 if both are equal except for blanks around them and not empty, else 0."""
    prediction, expected = composed(prediction).strip(), composed(expected).strip()
    if ignore_case:
        prediction, expected = composed(prediction.casefold()), composed(expected.casefold())
    return float(bool(prediction) and prediction == expected)


def jaccard(prediction: str, expected: str) -> float:
    """Return the number of words in both over that of words in either; 0 if there are no words."""
    ours, theirs = set(split_at_blanks(prediction)), set(split_at_blanks(expected))
    return len(ours & theirs) / len(ours | theirs) if ours or theirs else 0.0


def rouge_n(prediction: str, expected: str, *, order: int) -> float:
    """Return the F1 of n-grams (Lin 2004); nan if `expected` has no words."""
    if _has_no_words(expected):
        return math.nan
    ours, theirs = _ngrams(prediction, order), _ngrams(expected, order)
    common = sum(min(count, theirs[ngram]) for ngram, count in ours.items() if ngram in theirs)
    return _f1(common, sum(ours.values()), sum(theirs.values()))


def rouge_l(prediction: str, expected: str) -> float:
    """Return the F1 of the longest common subsequence (Lin 2004); nan if `expected` has no words."""
    if _has_no_words(expected):
        return math.nan
    ours, theirs = _words(prediction), _words(expected)
    return _f1(longest_common_subsequence(ours, theirs), len(ours), len(theirs))


def rouge_lsum(prediction: str, expected: str) -> float:
    """Return the F1 of the union of common subsequences over lines; for texts of one line it is rougeL."""
    if ("\n" not in prediction and "\n" not in expected) or _has_no_words(expected):
        return rouge_l(prediction, expected)
    return float(_rouge_scorer().score(expected, prediction)["rougeLsum"].fmeasure)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by bit columns (Hyyrö 2004).

    That is about a hundred times faster than a table in Python.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << index
    all_bits = (1 << len(first)) - 1
    column = all_bits
    for word in second:
        matched = column & places.get(word, 0)
        column = ((column + matched) | (column - matched)) & all_bits
    return len(first) - column.bit_count()


def _f1(common: int, ours: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)


@lru_cache(maxsize=4)  # for the two texts of a row, which several metrics split
def _words(text: str) -> tuple[str, ...]:
    return tuple(split_words(text))


def _has_no_words(expected: str) -> bool:
    """Return whether a text that is not ASCII has no words, as a formula. For ASCII, rouge-score's result counts."""
    return not expected.isascii() and not _words(expected)


def _ngrams(text: str, order: int) -> Counter[tuple[str, ...]]:
    words = _words(text)
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return split_words(text)

    return RougeScorer(["rougeLsum"], tokenizer=Words())


def _bleu_metric(tokenizer: str, expected_texts: Sequence[str]) -> Metric:
    from sacrebleu.metrics import BLEU

    def tokenizer_of(expected: str) -> str:
        return tokenizer_by_script(expected) if tokenizer == AUTO else tokenizer

    def open_bleu(name: str, **settings: Any) -> Any:
        try:
            return BLEU(tokenize=name, **settings)
        except RuntimeError as error:
            extra = install(f"sacrebleu[{name.partition('-')[0]}]")
            raise ConfigError(f"evaluation.bleu_tokenizer: {name} is not installed: {extra}") from error

    @cache
    def sentence(name: str) -> Any:
        return open_bleu(name, effective_order=True)

    tokenizers = sorted(set(map(tokenizer_of, expected_texts))) or [tokenizer_of("")]
    corpora = [open_bleu(name) for name in tokenizers]
    for corpus in corpora:
        corpus.corpus_score(["a"], [["a"]])  # it has a signature only after its first use

    def statistics(prediction: str, expected: str) -> list[float]:
        found: Any = sentence(tokenizer_of(expected)).sentence_score(prediction, [expected])
        return [found.sys_len, found.ref_len, *found.counts, *found.totals]

    def score(sums: Sequence[float], *, effective_order: bool = False) -> float:
        sys_len, ref_len, *ngrams = (int(value) for value in sums)
        return float(
            BLEU.compute_bleu(
                ngrams[:4], ngrams[4:], sys_len, ref_len, smooth_method="exp", effective_order=effective_order
            ).score
        )

    return Metric(
        name="bleu",
        definition="corpus BLEU, 0 to 100, by sacreBLEU: n-grams are summed over rows; of one row, by effective order; "
        + ("its tokenizer " + (BLEU_TOKENIZERS if tokenizer == AUTO else tokenizer)),
        statistics=statistics,
        score=score,
        row_score=lambda sums: score(sums, effective_order=True),
        signature=_joined([str(corpus.get_signature()) for corpus in corpora]),
    )


def _joined(signatures: Sequence[str]) -> str:
    """Return one signature, with all tokenizers."""
    before, _, after = signatures[0].partition("|tok:")
    tokenizers = "+".join(signature.partition("|tok:")[2].partition("|")[0] for signature in signatures)
    return f"{before}|tok:{tokenizers}|{after.partition('|')[2]}"


def _chrf_metric() -> Metric:
    from sacrebleu.metrics import CHRF

    chrf: Any = CHRF()
    chrf.corpus_score(["a"], [["a"]])

    def statistics(prediction: str, expected: str) -> list[float]:
        found: list[list[float]] = chrf._extract_corpus_statistics([prediction], [[expected]])
        return found[0]

    def score(sums: Sequence[float]) -> float:
        return float(chrf._compute_f_score(list(sums)))

    return Metric(
        name="chrf",
        definition="corpus chrF2, 0 to 100, by sacreBLEU: n-grams of characters, without blanks, are summed over rows",
        statistics=statistics,
        score=score,
        row_score=score,
        signature=str(chrf.get_signature()),
    )


def _custom(path: str) -> Metric:
    """Return the metric of a function of the user's own, by import path."""
    if not path.partition(":")[2]:
        guess = nearest(path, BUILT_IN)
        hint = f"; did you mean {guess!r}?" if guess else ""
        known = f"there are {', '.join(BUILT_IN)}, and functions of your own (my_pkg.metrics:length_ratio)"
        raise ConfigError(f"evaluation.metrics: there is no metric {path!r}{hint}: {known}")
    function = import_callable(path, key="evaluation.metrics")

    def row(prediction: str, expected: str) -> float:
        try:
            value = function(prediction, expected)
        except Exception as error:
            raise ConfigError(
                f"evaluation.metrics: {path} failed for the prediction {prediction[:80]!r} where {expected[:80]!r} is "
                f"expected ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ConfigError(
                f"evaluation.metrics: {path} returned {value!r} for the prediction {prediction[:80]!r}: it should "
                "return a finite number"
            )
        return float(value)

    description = (inspect.getdoc(function) or "no description").partition("\n")[0]
    return mean_metric(path, f"{description} (mean of rows)", row)
