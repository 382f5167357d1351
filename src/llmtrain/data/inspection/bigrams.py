"""The graph of bigrams: an edge a → b for tokens that follow each other in a document, and how often they do.

    ids, ends ─ BigramCounts.add ─▶ sorted pairs and counts ─ describe_bigrams ─▶ edges, PageRank, degrees, a drawing

Pairs are counted by sorting arrays, so memory is what bounds them: with more than MAX_PAIRS different ones the rarest
are forgotten, and the report says by how much a count may be too low.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.inspection.frequencies import NamesOf
from llmtrain.data.order import Ints

MAX_PAIRS = 1 << 22
"""Different pairs that are kept: 64 MiB, and about five times that while they are sorted."""
DAMPING = 0.85
DRAWN_TOKENS = 26
DRAWN_EDGES_OF_A_TOKEN = 2
PATH_TOKENS = 60
"""Tokens among which shortest paths are looked for, whose time grows with the product of tokens and edges."""

Keys = NDArray[np.uint64]


class BigramCounts:
    """Counts of ordered pairs of neighbouring tokens."""

    def __init__(self, *, max_pairs: int = MAX_PAIRS, ignored: int | None = None) -> None:
        """`ignored`: an id whose pairs are not counted."""
        self.transitions = 0
        """Pairs that were counted, each as often as it occurs."""
        self.most_forgotten = 0
        """At most this much is missing from the count of a pair."""
        self._max_pairs = max_pairs
        self._ignored = ignored
        self._waiting: list[tuple[Keys, Ints]] = []

    def add(self, ids: NDArray[Any], ends: Ints) -> None:
        """Count the pairs of documents. `ids`: [tokens] one after the other; `ends`: [documents] where each ends."""
        wanted = np.ones(max(0, len(ids) - 1), bool)
        wanted[ends[(ends > 0) & (ends < len(ids))] - 1] = False
        if self._ignored is not None:
            wanted &= (ids[:-1] != self._ignored) & (ids[1:] != self._ignored)
        wide = ids.astype(np.uint64)
        keys, counts = np.unique((wide[:-1][wanted] << np.uint64(32)) | wide[1:][wanted], return_counts=True)
        self.transitions += int(counts.sum())
        self._waiting.append((keys, counts.astype(np.int64)))
        if sum(len(keys) for keys, _ in self._waiting) > 2 * self._max_pairs:
            self._merge()

    def edges(self) -> tuple[Ints, Ints, Ints]:
        """Return the pairs that were kept, in their order: first token, second token, count."""
        self._merge()
        keys, counts = self._waiting[0]
        return (keys >> np.uint64(32)).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), counts

    def _merge(self) -> None:
        keys = np.concatenate([np.zeros(0, np.uint64), *(keys for keys, _ in self._waiting)])
        counts = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in self._waiting)])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
        keys, counts = keys[begins], np.add.reduceat(counts, begins) if len(begins) else counts
        if len(keys) > self._max_pairs:
            lowest = int(np.partition(counts, len(counts) - self._max_pairs)[len(counts) - self._max_pairs])
            kept = counts > lowest
            kept[np.flatnonzero(counts == lowest)[: self._max_pairs - int(kept.sum())]] = True
            self.most_forgotten += int(counts[~kept].max())
            keys, counts = keys[kept], counts[kept]
        self._waiting = [(keys, counts)]


def describe_bigrams(found: BigramCounts, names_of: NamesOf, *, num_listed: int) -> dict[str, Any] | None:
    """Return the size of the graph, its `num_listed` strongest edges and most central tokens, and what is drawn.

    None where no token follows another.
    """
    first, second, counts = found.edges()
    if not len(counts):
        return None
    tokens, ends = np.unique(np.concatenate([first, second]), return_inverse=True)
    begin, end = ends[: len(first)], ends[len(first) :]
    num_others = max(1, len(tokens) - 1)
    scores = {
        "pagerank": pagerank(begin, end, counts, len(tokens)),
        "in_degree_centrality": np.bincount(end, minlength=len(tokens)) / num_others,
        "out_degree_centrality": np.bincount(begin, minlength=len(tokens)) / num_others,
        **path_centralities(begin, end, counts, scope=_strongest(begin, end, counts, len(tokens), PATH_TOKENS)),
    }
    strongest = np.argsort(-counts, kind="stable")[:num_listed]
    return {
        "tokens": len(tokens),
        "edges": len(counts),
        "transitions": found.transitions,
        "covered": int(counts.sum()) / found.transitions,
        "count_too_low_by_at_most": found.most_forgotten,
        "top": _edges(first[strongest], second[strongest], counts[strongest], names_of),
        "centrality": {name: _highest(tokens, score, names_of, num_listed) for name, score in scores.items()},
        "path_tokens": min(PATH_TOKENS, len(tokens)),
        "drawn": _drawn(tokens, begin, end, counts, names_of),
    }


def pagerank(begin: Ints, end: Ints, counts: Ints, num_tokens: int) -> NDArray[np.float64]:
    """Return the PageRank of each token, [num_tokens], with the counts as weights.

    By power iteration over arrays: networkx needs about a kilobyte for each of millions of edges, and SciPy.
    """
    leaving = np.bincount(begin, weights=counts, minlength=num_tokens)
    weights = counts / leaving[begin]
    rank = np.full(num_tokens, 1 / num_tokens)
    for _ in range(100):
        arriving = np.bincount(end, weights=rank[begin] * weights, minlength=num_tokens)
        new = DAMPING * (arriving + rank[leaving == 0].sum() / num_tokens) + (1 - DAMPING) / num_tokens
        change, rank = float(np.abs(new - rank).sum()), new
        if change < 1e-9:
            break
    return rank


def path_centralities(begin: Ints, end: Ints, counts: Ints, *, scope: Ints) -> dict[str, NDArray[np.float64]]:
    """Return betweenness and closeness of the tokens in `scope` in the graph of these alone; 0 for all others.

    The length of an edge a → b is 1 - log P(b | a), so a shortest path has few and probable steps.
    """
    import networkx

    num_tokens = int(max(begin.max(), end.max())) + 1
    leaving = np.bincount(begin, weights=counts, minlength=num_tokens)
    inside = np.isin(begin, scope) & np.isin(end, scope) & (begin != end)
    lengths = 1 + np.log(leaving[begin[inside]] / counts[inside])
    graph = networkx.DiGraph()
    graph.add_nodes_from(scope.tolist())
    graph.add_weighted_edges_from(
        zip(begin[inside].tolist(), end[inside].tolist(), lengths.tolist(), strict=True), weight="length"
    )
    found = {
        "betweenness_centrality": networkx.betweenness_centrality(graph, weight="length"),
        "closeness_centrality": networkx.closeness_centrality(graph, distance="length"),
    }
    scores = {name: np.zeros(num_tokens) for name in found}
    for name, score in found.items():
        scores[name][list(score)] = list(score.values())
    return scores


def _strongest(begin: Ints, end: Ints, counts: Ints, num_tokens: int, size: int) -> Ints:
    """Return the tokens with the most transitions, from them and to them."""
    strength = np.bincount(begin, counts, num_tokens) + np.bincount(end, counts, num_tokens)
    return np.argsort(-strength, kind="stable")[:size].astype(np.int64)


def _edges(first: Ints, second: Ints, counts: Ints, names_of: NamesOf) -> list[dict[str, Any]]:
    ids = first.tolist(), second.tolist()
    return [
        {"from_id": a, "to_id": b, "from": from_name, "to": to_name, "count": count}
        for a, b, from_name, to_name, count in zip(*ids, *map(names_of, ids), counts.tolist(), strict=True)
    ]


def _highest(tokens: Ints, score: NDArray[np.float64], names_of: NamesOf, size: int) -> list[dict[str, Any]]:
    order = np.argsort(-score, kind="stable")[:size]
    order = order[score[order] > 0]
    ids: Sequence[int] = tokens[order].tolist()
    return [
        {"id": token, "token": name, "score": value}
        for token, name, value in zip(ids, names_of(ids), score[order].tolist(), strict=True)
    ]


def _drawn(tokens: Ints, begin: Ints, end: Ints, counts: Ints, names_of: NamesOf) -> dict[str, Any]:
    """Return the strongest tokens, their strongest edges among each other, and where a drawing puts them."""
    import networkx

    scope = _strongest(begin, end, counts, len(tokens), DRAWN_TOKENS)
    inside = np.flatnonzero(np.isin(begin, scope) & np.isin(end, scope))
    inside = inside[np.argsort(-counts[inside], kind="stable")]
    leaving: dict[int, int] = {}
    chosen = []
    for edge in inside.tolist():
        token = int(begin[edge])
        leaving[token] = leaving.get(token, 0) + 1
        if leaving[token] <= DRAWN_EDGES_OF_A_TOKEN:
            chosen.append(edge)
    graph = networkx.Graph()
    graph.add_nodes_from(scope.tolist())
    graph.add_edges_from((int(begin[edge]), int(end[edge])) for edge in chosen)
    places = networkx.spring_layout(graph, seed=0, k=4 / max(1, len(scope)) ** 0.5, iterations=300)
    occurrences = np.bincount(begin, counts, len(tokens)) + np.bincount(end, counts, len(tokens))
    ids = tokens[scope].tolist()
    return {
        "tokens": [
            {"id": token, "token": name, "transitions": int(occurrences[node]), "x": float(x), "y": float(y)}
            for node, token, name, (x, y) in zip(
                scope.tolist(), ids, names_of(ids), (places[node] for node in scope.tolist()), strict=True
            )
        ],
        "edges": _edges(tokens[begin[chosen]], tokens[end[chosen]], counts[chosen], names_of),
    }
