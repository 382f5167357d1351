"""Chooses a token from logits over the vocabulary: repetition penalty, temperature, top_k, top_p, a random draw."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.errors import ConfigError

NUCLEUS_GUESS = 1024
"""Number of likeliest tokens among which the tokens of `top_p` are looked for first, since sorting all is slow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings for the choice of a token. At temperature 0, `top_k`, `top_p` and `seed` have no effect.

    Raises ConfigError if a value is out of its range.
    """

    temperature: float = 1.0
    """0: always the likeliest token."""
    top_k: int | None = None
    """Choose among this number of likeliest tokens; None: all."""
    top_p: float | None = None
    """Choose among the smallest set of likeliest tokens that together have this probability; None: all."""
    repetition_penalty: float = 1.0
    """Over 1: tokens that were seen before become less likely; 1 changes nothing."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature is {self.temperature}; it should be 0 (the likeliest token) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it should be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}; it should be over 0 and at most 1")
        if not self.repetition_penalty > 0.0:
            raise ConfigError(f"repetition_penalty is {self.repetition_penalty}; it should be over 0 (1 is none)")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of decoding. Raises ConfigError if a value is out of its range."""

    max_new_tokens: int
    sampling: Sampling = Sampling()
    batch_size: int | None = None
    """Number of rows that are computed at a time; None: all of them."""

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it should be at least 1")


def choose_token(
    logits_v: Tensor,
    *,
    sampling: Sampling,
    seen: Sequence[int],
    generator: torch.Generator,
    among: Tensor | None = None,
) -> int:
    """Choose a token by its logits [vocab]; one of `among` (ids, not empty) if that is given.

    Applies in this order: the repetition penalty (Keskar et al. 2019, arXiv:1909.05858: positive logits of the tokens
    `seen` before are divided by it, and negative ones multiplied, so both become lower), temperature, `top_k`, `top_p`.
    A draw takes one number from the generator, whatever the settings.
    """
    logits_v = logits_v.double()
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        scores = logits_v[ids]
        penalty = sampling.repetition_penalty
        logits_v = logits_v.index_copy(0, ids, torch.where(scores > 0, scores / penalty, scores * penalty))
    if among is not None:
        logits_v = logits_v[among]
    if sampling.temperature == 0.0:
        place = int(logits_v.argmax())
    else:
        place = _draw(logits_v / sampling.temperature, sampling=sampling, generator=generator)
    return place if among is None else int(among[place])


def _draw(scores: Tensor, *, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw an index of `scores`. Only tokens that may be drawn are sorted: a large vocabulary takes 10 ms."""
    order = torch.arange(len(scores))
    if sampling.top_k is not None and sampling.top_k < len(scores):
        scores, order = scores.topk(sampling.top_k)
    total = scores.logsumexp(0)
    if sampling.top_p is not None:
        likeliest, places = scores.topk(min(NUCLEUS_GUESS, len(scores)))
        if (likeliest - total).exp().sum() < sampling.top_p:
            likeliest, places = scores.sort(descending=True, stable=True)
        scores, order = likeliest, order[places]
    reached = (scores - total).exp().cumsum(0)
    last = len(order) - 1
    if sampling.top_p is not None:
        last = min(last, int((reached < sampling.top_p).sum()))
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * reached[last]
    return int(order[min(last, int((reached <= threshold).sum()))])


def generators_for(keys: Sequence[Sequence[int] | str], *, seed: int) -> list[torch.Generator]:
    """Return a generator for each row, seeded by `seed`, the row's key (its prompt) and how often the key came before.

    So a row's random numbers do not depend on the other rows.
    """
    occurrences: Counter[tuple[int, ...] | str] = Counter()
    generators = []
    for given in keys:
        key = given if isinstance(given, str) else tuple(given)
        digest = hashlib.sha256(f"{seed}/{occurrences[key]}/{key}".encode()).digest()
        occurrences[key] += 1
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators
