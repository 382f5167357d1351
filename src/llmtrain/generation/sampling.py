"""Chooses tokens from logits over the vocabulary: repetition penalty, temperature, top_k, top_p, a random draw.

A draw takes one number, made on the CPU from the seed, the row and the place of the token: the same on every device.
"""

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

    @property
    def is_greedy(self) -> bool:
        """True if the token with the largest logit is taken."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0


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


def choosing_device(device: torch.device, sampling: Sampling) -> torch.device:
    """Return the device on which the tokens of a model on `device` are chosen."""
    # Apple's GPUs have no float64, and on CUDA `cumsum` has no deterministic algorithm.
    lacks_draws = device.type == "mps" or (device.type == "cuda" and torch.are_deterministic_algorithms_enabled())
    return torch.device("cpu") if lacks_draws and not sampling.is_greedy else device


def choose_tokens(logits_bv: Tensor, *, sampling: Sampling, numbers_b: Tensor, seen_bv: Tensor | None = None) -> Tensor:
    """Return a token [b] for each row of logits [b, vocab], on their device. On a GPU the host waits for nothing.

    Applies in this order: the repetition penalty (Keskar et al. 2019, arXiv:1909.05858: positive logits of the tokens
    `seen_bv` are divided by it, and negative ones multiplied, so both become lower), temperature, `top_k`, `top_p`, and
    the inverse of the distribution function at `numbers_b`, float64 in [0, 1). At temperature 0 these have no effect.
    """
    if sampling.is_greedy:
        return logits_bv.argmax(-1)
    scores_bv = logits_bv.double()
    if seen_bv is not None:
        penalty = sampling.repetition_penalty
        lowered_bv = torch.where(scores_bv > 0, scores_bv / penalty, scores_bv * penalty)
        scores_bv = torch.where(seen_bv, lowered_bv, scores_bv)
    if sampling.temperature == 0.0:
        return scores_bv.argmax(-1)
    scores_bv = scores_bv / sampling.temperature
    if _at_once(scores_bv):
        return _draw(scores_bv, numbers_b, sampling)
    # Row by row, so that only those rows are sorted in full that have to be.
    rows = zip(scores_bv[:, None], numbers_b[:, None], strict=True)
    return torch.cat([_draw(scores, number, sampling) for scores, number in rows])


def _at_once(scores_bv: Tensor) -> bool:
    """Return whether to draw for all rows at once, by the same operators whatever the values are."""
    return scores_bv.is_cuda


def _draw(scores_bv: Tensor, numbers_b: Tensor, sampling: Sampling) -> Tensor:
    """Return the ids [b] at which the distribution functions pass the numbers."""
    size = scores_bv.shape[-1]
    order = torch.arange(size, device=scores_bv.device).expand_as(scores_bv)
    if sampling.top_k is not None and sampling.top_k < size:
        scores_bv, order = _likeliest(scores_bv, sampling.top_k)
        size = sampling.top_k
    total = scores_bv.logsumexp(-1, keepdim=True)
    if sampling.top_p is not None:
        guess = size if _at_once(scores_bv) else min(NUCLEUS_GUESS, size)
        likeliest, places = _likeliest(scores_bv, guess)
        if not _at_once(scores_bv) and (likeliest - total).exp().sum() < sampling.top_p:
            likeliest, places = scores_bv.sort(dim=-1, descending=True, stable=True)
        scores_bv, order = likeliest, order.gather(-1, places)
    reached = (scores_bv - total).exp().cumsum(-1)
    last = torch.full_like(order[:, :1], reached.shape[-1] - 1)
    if sampling.top_p is not None:
        last = last.minimum((reached < sampling.top_p).sum(-1, keepdim=True))
    thresholds = numbers_b[:, None] * reached.gather(-1, last)
    place = (reached <= thresholds).sum(-1, keepdim=True).minimum(last)
    return order.gather(-1, place)[:, 0]


def _likeliest(scores_bv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores [b, count], falling, and their places.

    On a GPU the order in which `topk` returns equal scores may depend on the number of rows, so all are sorted there.
    """
    if not _at_once(scores_bv):
        values, places = scores_bv.topk(count)
        return values, places
    values, places = scores_bv.sort(dim=-1, descending=True, stable=True)
    return values[:, :count], places[:, :count]


def generators_for(keys: Sequence[Sequence[int] | str], *, seed: int) -> list[torch.Generator]:
    """Return a generator for each row, seeded by `seed`, the row's key (its prompt) and how often the key came before.

    Its n-th number (float64) is that of the row's n-th new token, so it does not depend on the other rows.
    """
    occurrences: Counter[tuple[int, ...] | str] = Counter()
    generators = []
    for given in keys:
        key = given if isinstance(given, str) else tuple(given)
        digest = hashlib.sha256(f"{seed}/{occurrences[key]}/{key}".encode()).digest()
        occurrences[key] += 1
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators
