"""MinHash near-duplicates: recall and precision on planted ones, and what the search promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.quality import NearDuplicatesStep
from llmtrain.data.prepare.quality import near_duplicates, words
from llmtrain.data.prepare.quality.near_duplicates import NUM_HASHES, NearDuplicates, SignatureFiles, bands_for
from llmtrain.data.prepare.quality.words import ngram_hashes, word_hashes
from llmtrain.errors import ConfigError
from tests.support.planted_duplicates import plant


def _duplicates(texts: list[str], **options: float) -> dict[int, int]:
    """Each duplicate with the document that it repeats."""
    step = NearDuplicates(NearDuplicatesStep.model_validate(options), key="prepare.steps[0]")
    files = SignatureFiles(step, None)
    files.add(step.signatures(texts))
    found, originals = files.duplicates(np.arange(len(texts)))
    files.close()
    assert (np.diff(found) > 0).all()
    assert (originals < found).all()
    return dict(zip(found.tolist(), originals.tolist(), strict=True))


def test_recall_and_precision_on_planted_duplicates() -> None:
    planted = plant(1000, seed=0)
    similarity = np.array(planted.similarity)
    found = _duplicates(planted.texts)
    is_found = np.isin(np.arange(len(similarity)), list(found))
    is_duplicate = similarity >= 0.8
    assert is_duplicate.sum() > 100
    assert all(planted.original[one] == of for one, of in found.items())
    recall = (is_found & is_duplicate).sum() / is_duplicate.sum()
    precision = (is_found & is_duplicate).sum() / is_found.sum()
    assert recall > 0.9  # what is missed or found too much lies at the threshold:
    assert precision > 0.9
    assert is_found[similarity >= 0.9].all()
    assert is_found[similarity >= 0.85].mean() > 0.98
    assert not is_found[similarity < 0.65].any()


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_the_threshold_moves_what_is_found(threshold: float) -> None:
    planted = plant(200, seed=1)
    similarity = np.array(planted.similarity)
    is_found = np.isin(np.arange(len(similarity)), list(_duplicates(planted.texts, threshold=threshold)))
    assert is_found[similarity >= threshold + 0.1].all()
    assert not is_found[similarity < threshold - 0.15].any()


def test_pairs_at_the_threshold_share_a_band() -> None:
    assert bands_for(0.8) == (21, 6)
    assert bands_for(1.0) == (1, NUM_HASHES)
    for threshold in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        bands, rows = bands_for(threshold)
        assert bands * rows <= NUM_HASHES
        assert 1 - (1 - threshold**rows) ** bands >= 0.99


def test_the_first_stays_and_what_it_says_is_order_alone() -> None:
    text = " ".join(f"word{number}" for number in range(200))
    other = " ".join(f"other{number}" for number in range(200))
    close = text + " end"
    assert _duplicates([text, other, close, other + " end", text]) == {2: 0, 3: 1, 4: 0}
    assert _duplicates([close, text, other]) == {1: 0}
    assert _duplicates([]) == {}


def test_case_punctuation_and_spacing_do_not_matter() -> None:
    text = "The quick, brown fox jumps over the lazy dog; and then it sleeps until the evening."
    assert _duplicates([text, text.upper().replace(",", "").replace(" ", "\n")], threshold=1.0) == {1: 0}
    assert _duplicates(["...", "!!!", "..."], threshold=1.0) == {2: 0}


def test_scripts_without_spaces_have_words() -> None:
    text = "自然语言处理是计算机科学领域与人工智能领域中的一个重要方向，它研究人与计算机之间用自然语言通信的理论。"
    other = "昨天晚上我们在河边散步，看到了很多星星和月亮，孩子们都很高兴，大家一起唱歌跳舞直到深夜才回家休息睡觉。"
    assert _duplicates([text, text.replace("，", " ")[:-2], other]) == {1: 0}
    assert _duplicates([text, text[:20] + other[20:], other]) == {}
    assert len(word_hashes("你好世界")) == 4


def test_short_texts_are_compared_as_a_whole() -> None:
    assert _duplicates(["one two", "One two!", "one three", "one"]) == {1: 0}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab é\n.", max_size=12), max_size=12), st.integers(1, 7))
def test_words_do_not_depend_on_what_is_around_them(texts: list[str], n: int) -> None:
    alone = [word_hashes(text) for text in texts if any(letter.isalnum() for letter in text)]
    together = word_hashes(" ".join(texts))
    if alone:
        assert np.array_equal(np.concatenate(alone), together)
    grams = ngram_hashes(together, n)
    assert len(grams) == max(0, len(together) - n + 1)
    as_tuples = [tuple(together[at : at + n].tolist()) for at in range(len(grams))]
    assert len(set(grams.tolist())) == len(set(as_tuples))


def test_long_texts_are_hashed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abc def ghi " * 50
    whole = word_hashes(text)
    monkeypatch.setattr(words, "_BLOCK_CHARS", 120)  # ends between words
    assert np.array_equal(word_hashes(text), whole)


def test_a_group_of_different_texts_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that share a band but are not similar are compared with a bounded number of firsts."""
    monkeypatch.setattr(near_duplicates, "_MOST_ROUNDS", 3)
    step = NearDuplicates(NearDuplicatesStep(), key="prepare.steps[0]")
    signatures = np.arange(10 * NUM_HASHES, dtype=np.uint32).reshape(10, NUM_HASHES)
    signatures[:, : step.band.rows] = 7  # one band in common
    signatures[5] = signatures[4]
    signatures[1] = signatures[0]
    files = SignatureFiles(step, None)
    files.add(signatures[:6])
    files.add(signatures[6:])
    found, originals = files.duplicates(np.arange(10))
    assert (found.tolist(), originals.tolist()) == ([1, 5], [0, 4])  # 5 by another band, alone with 4 there
    found, _ = files.duplicates(np.array([1, 2, 3, 5]))
    assert found.tolist() == []


def test_a_missing_library_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"prepare\.steps\[3\]: near_duplicates needs rensa: `.*\[quality\]'?`"):
        NearDuplicates(NearDuplicatesStep(), key="prepare.steps[3]")
