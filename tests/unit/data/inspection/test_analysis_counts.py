"""The numbers of an analysis against the plainest way to count them."""

from __future__ import annotations

import math
import re
import statistics
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.inspection.bigrams import BigramCounts, describe_bigrams, pagerank, path_centralities
from llmtrain.data.inspection.block_sample import BlockSample, DrawnItems
from llmtrain.data.inspection.exact_duplicates import DuplicateCounts, hash_of
from llmtrain.data.inspection.excerpts import Excerpt, bytes_per_token, describe_compression, describe_languages
from llmtrain.data.inspection.frequencies import TokenCounts, describe_frequencies, zipf
from llmtrain.data.inspection.lengths import describe_lengths
from llmtrain.data.inspection.units import OTHER_WORDS, WordVocabulary
from llmtrain.errors import ConfigError

Documents = list[list[int]]
DOCUMENTS = st.lists(st.lists(st.integers(0, 12), max_size=12), max_size=12)


def names_of(ids: Sequence[int]) -> list[str]:
    return [f"t{token}" for token in ids]


def joined(documents: Documents) -> tuple[Any, Any]:
    ids = np.array([token for document in documents for token in document], np.int64)
    return ids, np.cumsum([len(document) for document in documents], dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(DOCUMENTS, min_size=1, max_size=3))
def test_frequencies_are_those_of_a_counter(batches: list[Documents]) -> None:
    counts, expected = TokenCounts(), Counter[int]()
    for documents in batches:
        counts.add(joined(documents)[0])
        expected.update(token for document in documents for token in document)
    found = describe_frequencies(counts.counts, names_of, num_listed=5)
    if not expected:
        assert found is None
        return
    assert found is not None
    ranked = sorted(expected.values(), reverse=True)
    total = expected.total()
    assert (found["total"], found["distinct"], found["once"]) == (total, len(expected), ranked.count(1))
    assert [row["count"] for row in found["top"]] == ranked[:5]
    assert all(row["token"] == f"t{row['id']}" and row["count"] == expected[row["id"]] for row in found["top"])
    assert found["entropy_bits"] == pytest.approx(-sum(n / total * math.log2(n / total) for n in ranked))
    assert all(ranked[point["rank"] - 1] == point["count"] for point in found["curve"])
    assert (found["curve"][0]["rank"], found["curve"][-1]["rank"]) == (1, len(ranked))
    for row in found["by_count"]:
        inside = [count for count in ranked if row["from"] <= count <= row["to"]]
        assert (row["tokens"], row["total"]) == (len(inside), sum(inside))
    assert sum(row["tokens"] for row in found["by_count"]) == len(ranked)
    for band in found["by_id"]:
        inside = [expected[token] for token in range(band["from"], band["to"] + 1) if expected[token]]
        assert (band["distinct"], band["total"]) == (len(inside), sum(inside))
    for share, number in found["covering"].items():
        wanted = float(share.rstrip("%")) / 100 * total
        assert sum(ranked[:number]) >= wanted - 1e-6
        assert sum(ranked[: number - 1]) < wanted + 1e-6


def test_the_exponent_of_counts_that_follow_zipfs_law_is_theirs() -> None:
    ranks = np.arange(1, 2000)
    fit = zipf(np.floor(1e7 * ranks**-1.2).astype(np.int64))
    assert fit is not None
    assert fit["exponent"] == pytest.approx(1.2, abs=1e-3)
    assert fit["scale"] == pytest.approx(1e7, rel=1e-2)
    assert fit["explained"] == pytest.approx(1, abs=1e-4)
    assert zipf(np.array([9, 8, 4])) is None  # two ranks that count
    level = zipf(np.array([9, 9, 9, 9]))
    assert level is not None
    assert level["exponent"] == pytest.approx(0, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(DOCUMENTS, min_size=1, max_size=4), ignored=st.sampled_from([None, 0]))
def test_bigrams_are_pairs_of_neighbours_in_a_document(batches: list[Documents], ignored: int | None) -> None:
    counts, expected = BigramCounts(ignored=ignored), Counter[tuple[int, int]]()
    for documents in batches:
        counts.add(*joined(documents))
        expected.update(pair for document in documents for pair in pairwise(document) if ignored not in pair)
    first, second, number = counts.edges()
    assert dict(zip(zip(first.tolist(), second.tolist(), strict=True), number.tolist(), strict=True)) == expected
    assert (counts.transitions, counts.most_forgotten) == (expected.total(), 0)
    found = describe_bigrams(counts, names_of, num_listed=3)
    if not expected:
        assert found is None
        return
    assert found is not None
    assert found["edges"] == len(expected)
    assert found["covered"] == 1
    assert found["tokens"] == len({token for pair in expected for token in pair})
    assert [row["count"] for row in found["top"]] == sorted(expected.values(), reverse=True)[:3]
    assert all(expected[row["from_id"], row["to_id"]] == row["count"] for row in found["drawn"]["edges"])


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(DOCUMENTS, min_size=1, max_size=12), max_pairs=st.integers(1, 20))
def test_a_count_of_bigrams_is_too_low_by_no_more_than_is_said(batches: list[Documents], max_pairs: int) -> None:
    counts, expected = BigramCounts(max_pairs=max_pairs), Counter[tuple[int, int]]()
    for documents in batches:
        counts.add(*joined(documents))
        expected.update(pair for document in documents for pair in pairwise(document))
    first, second, number = counts.edges()
    kept = dict(zip(zip(first.tolist(), second.tolist(), strict=True), number.tolist(), strict=True))
    assert len(kept) <= max_pairs
    for pair, count in expected.items():
        assert 0 <= count - kept.get(pair, 0) <= counts.most_forgotten
    assert counts.transitions == expected.total()


def graph_of(documents: Documents) -> tuple[Any, Any, Any, Any]:
    counts = Counter(pair for document in documents for pair in pairwise(document))
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(1 + max(token for pair in counts for token in pair)))
    leaving = Counter[int]()
    for (a, _), count in counts.items():
        leaving[a] += count
    for (a, b), count in counts.items():
        graph.add_edge(a, b, weight=count, length=1 - math.log(count / leaving[a]))
    begin, end = np.array(list(counts)).T
    return begin, end, np.array(list(counts.values())), graph


CONNECTED = DOCUMENTS.filter(lambda documents: any(len(document) > 1 for document in documents))


@settings(max_examples=40, deadline=None)
@given(documents=CONNECTED)
def test_centralities_are_those_of_networkx(documents: Documents) -> None:
    begin, end, counts, graph = graph_of(documents)
    size = len(graph)
    dense = networkx.to_numpy_array(graph, weight="weight")
    leaving = dense.sum(1, keepdims=True)
    step = np.where(leaving > 0, dense / np.maximum(leaving, 1), 1 / size)
    expected = np.linalg.solve(np.eye(size) - 0.85 * step.T, np.full(size, 0.15 / size))
    assert pagerank(begin, end, counts, size) == pytest.approx(expected, abs=1e-6)
    found = path_centralities(begin, end, counts, scope=np.arange(size))
    graph.remove_edges_from(list(networkx.selfloop_edges(graph)))
    for name, score in (
        ("betweenness_centrality", networkx.betweenness_centrality(graph, weight="length")),
        ("closeness_centrality", networkx.closeness_centrality(graph, distance="length")),
    ):
        assert found[name] == pytest.approx([score[node] for node in range(size)], abs=1e-6)


def test_degrees_are_shares_of_the_other_tokens() -> None:
    counts = BigramCounts()
    counts.add(*joined([[3, 5, 9, 3, 5], [9, 3, 7]]))
    found = describe_bigrams(counts, names_of, num_listed=10)
    assert found is not None
    assert (found["tokens"], found["edges"], found["transitions"]) == (4, 4, 6)
    assert found["top"][0] == {"from_id": 3, "to_id": 5, "from": "t3", "to": "t5", "count": 2}
    scores = {row["id"]: row["score"] for row in found["centrality"]["out_degree_centrality"]}
    assert scores == pytest.approx({3: 2 / 3, 5: 1 / 3, 9: 1 / 3})  # 7 has none


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_lengths_are_those_of_the_sorted_list(lengths: list[int]) -> None:
    found = describe_lengths(Counter(lengths))
    assert found is not None
    ordered = sorted(lengths)
    for name, share in (("shortest", 0.0), ("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("longest", 1.0)):
        assert found[name] == ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]
    assert found["mean"] == pytest.approx(statistics.fmean(lengths))
    assert found["std"] == pytest.approx(statistics.pstdev(lengths), abs=1e-9)
    assert found["total"] == sum(lengths)
    for row in found["histogram"]:
        inside = [length for length in lengths if row["from"] <= length <= row["to"]]
        assert (row["rows"], row["total"]) == (len(inside), sum(inside))
    assert sum(row["rows"] for row in found["histogram"]) == len(lengths)


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(st.lists(st.sampled_from("abcdef"), max_size=8), max_size=4))
def test_duplicates_are_documents_beyond_the_first_of_each_text(batches: list[list[str]]) -> None:
    counts, expected = DuplicateCounts(), Counter[str]()
    for texts in batches:
        counts.add(map(hash_of, texts))
        expected.update(texts)
    found = counts.describe()
    assert (found["documents"], found["share_of_texts_counted"]) == (expected.total(), 1)
    assert found["duplicates"] == expected.total() - len(expected)
    assert found["repeated_texts"] == sum(count > 1 for count in expected.values())
    assert found["most_copies"] == max(expected.values(), default=0)
    assert counts.copies_of(map(hash_of, "abcdefg")) == [expected[text] for text in "abcdefg"]


def test_of_very_many_texts_a_share_is_counted_with_all_their_copies() -> None:
    counts = DuplicateCounts(max_hashes=3000)
    for begin in range(0, 20_000, 1000):
        texts = [f"text {number}" for number in range(begin, begin + 1000)]
        counts.add(hash_of(text) for text in [*texts, *texts[::2]])  # every second one comes twice
    found = counts.describe()
    assert found["documents"] <= 3000
    assert found["share_of_texts_counted"] == 1 / 16
    assert found["share"] == pytest.approx(1 / 3, abs=0.03)
    assert found["most_copies"] == 2


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(max_size=40).map(lambda text: text * 20), max_size=6))
def test_compression_is_that_of_zlib(texts: list[str]) -> None:
    found = describe_compression([Excerpt(f"d{index}", text, None) for index, text in enumerate(texts)])
    encoded = [text.encode() for text in texts if text]
    if not encoded:
        assert found is None
        return
    assert found is not None
    whole = b"".join(encoded)
    assert (found["excerpts"], found["bytes"]) == (len(encoded), len(whole))
    assert found["ratio"] == pytest.approx(len(whole) / len(zlib.compress(whole)), rel=0.05)
    ratios = sorted(len(data) / len(zlib.compress(data)) for data in encoded if len(data) >= 256)
    assert sum(row["excerpts"] for row in found["histogram"]) == len(ratios)
    assert [row["ratio"] for row in found["most_repetitive"]] == pytest.approx(ratios[::-1][:5])
    if ratios:
        assert found["by_excerpt"]["median"] == pytest.approx(ratios[math.ceil(len(ratios) / 2) - 1])
    for row in found["histogram"]:
        assert row["excerpts"] == sum(row["from"] <= ratio < (row["to"] or math.inf) for ratio in ratios)


def test_bytes_per_token_are_over_the_excerpts_whose_tokens_are_known() -> None:
    assert bytes_per_token([Excerpt("a", "αβ", 2), Excerpt("b", "x" * 10, None), Excerpt("c", "xyz", 1)]) == 7 / 3
    assert bytes_per_token([Excerpt("b", "x", None)]) is None


def test_languages_are_told_and_short_texts_are_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Der schnelle braune Fuchs springt über den faulen Hund und freut sich."] * 2
    texts += ["Le renard brun rapide saute par-dessus le chien paresseux.", "x", ""]
    excerpts = [Excerpt(str(index), text, None) for index, text in enumerate(texts)]
    found = describe_languages(excerpts)
    assert (found["excerpts"], found["too_short"]) == (3, 2)
    assert found["by_language"] == [
        {"language": "de", "excerpts": 2, "share": 2 / 3},
        {"language": "fr", "excerpts": 1, "share": 1 / 3},
    ]
    monkeypatch.setattr("llmtrain.data.inspection.excerpts.find_spec", lambda name: None)
    assert "[quality]" in describe_languages(excerpts)["not_measured"]


WORDS = re.compile(r"[^\W_]+")


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.text("abÄß 12_.\n\t\x00\u202e\ufeff", max_size=20), min_size=1, max_size=4), min_size=1
    )
)
def test_words_are_runs_of_letters_and_digits_in_lower_case(batches: list[list[str]]) -> None:
    vocabulary = WordVocabulary()
    for texts in batches:
        ids, ends = vocabulary.encode(texts)
        words = [WORDS.findall(text.lower()) for text in texts]
        assert vocabulary.names_of(ids.tolist()) == [word for found in words for word in found]
        assert ends.tolist() == np.cumsum([len(found) for found in words]).tolist()


def test_words_of_scripts_without_blanks_long_words_and_too_many_words() -> None:
    vocabulary = WordVocabulary(max_words=3)
    ids, ends = vocabulary.encode(["你好 x", "e" * 1_000_000, "new x"])
    assert vocabulary.names_of(ids.tolist()) == ["你", "好", "x", "(other words)", "(other words)", "x"]
    assert ids.tolist()[3] == OTHER_WORDS
    assert ends.tolist() == [3, 4, 6]
    ids, _ = WordVocabulary().encode(["e" * 1_000_000 + " " + "e" * 64])
    assert ids.tolist() == [1, 1]


def test_a_sample_depends_on_its_seed_alone_and_has_about_its_share() -> None:
    sample = BlockSample(0.3, seed=1)
    taken = [number for number in range(2000) if sample.takes(number)]
    assert taken == [number for number in range(2000) if BlockSample(0.3, seed=1).takes(number)]
    assert taken != [number for number in range(2000) if BlockSample(0.3, seed=2).takes(number)]
    assert len(taken) / 2000 == pytest.approx(0.3, abs=0.04)
    assert all(BlockSample(1.0).takes(number) for number in range(50))
    with pytest.raises(ConfigError, match=r"--sample 0\.3 takes none of the 2 blocks"):
        sample.reject_none(0, of=2)


@settings(max_examples=40, deadline=None)
@given(num_items=st.integers(0, 60), size=st.integers(1, 20), seed=st.integers(0, 5))
def test_drawn_items_are_kept_in_order_and_made_only_if_needed(num_items: int, size: int, seed: int) -> None:
    drawn: DrawnItems[int] = DrawnItems(size, seed=seed)
    for number in range(num_items):
        drawn.offer(number, partial(int, number))
    kept = drawn.in_order()
    assert kept == sorted(set(kept))
    assert len(kept) == min(size, num_items)
    again: DrawnItems[int] = DrawnItems(size, seed=seed)
    for number in reversed(range(num_items)):
        again.offer(number, partial(int, number))
    assert again.in_order() == kept  # whatever order they come in
