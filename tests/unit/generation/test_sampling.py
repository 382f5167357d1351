"""Draws invert the distribution function of softmax with temperature, top_k and top_p: row by row, and all at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.generation import sampling
from llmtrain.generation.sampling import Sampling, choose_tokens, generators_for

EVEN = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
"""Numbers that are spread evenly: the share of each token among their draws is its probability, to a thousandth."""


@pytest.fixture(params=[False, True], ids=["row by row", "at once"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Draw as on a CPU, and as on a GPU."""
    monkeypatch.setattr(sampling, "_at_once", lambda _: request.param)
    return bool(request.param)


def choose(logits: Tensor, numbers: Tensor = EVEN, **changes: Any) -> list[int]:
    """Return the token of the same logits [vocab] at each number."""
    rows = logits.expand(len(numbers), -1)
    return choose_tokens(rows, sampling=Sampling(**changes), numbers_b=numbers).tolist()


def shares(logits: Tensor, **changes: Any) -> list[float]:
    return [count / 1000 for count in np.bincount(choose(logits, **changes), minlength=len(logits)).tolist()]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_draws_follow_the_probabilities_at_a_temperature(temperature: float) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    wanted = torch.softmax(logits / temperature, 0).tolist()
    assert shares(logits, temperature=temperature) == pytest.approx(wanted, abs=0.001)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # after top_k the first has 4/7 of what is left
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_top_k_and_top_p_leave_the_likeliest_with_their_shares(changes: dict[str, Any], wanted: list[float]) -> None:
    assert shares(torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), **changes) == pytest.approx(wanted, abs=0.0011)


def inverted(logits: Tensor, number: float, top_k: int | None, top_p: float) -> int:
    """Return the token at which the distribution function passes a number, after sorting the full vocabulary."""
    scores, order = logits.double().sort(descending=True)
    reached = torch.softmax(scores[:top_k], dim=0).cumsum(0)
    last = min(len(reached) - 1, int((reached < top_p).sum()))
    return int(order[min(last, int((reached[: last + 1] <= number * reached[last]).sum()))])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 99),
    size=st.sampled_from([3, 700, 3000]),
    spread=st.sampled_from([0.01, 1.0, 8.0]),
    top_k=st.sampled_from([None, 1, 2, 1500, 5000]),
    top_p=st.sampled_from([0.01, 0.4, 0.9, 0.999, 1.0]),
)
def test_a_draw_equals_one_after_sorting_the_full_vocabulary(
    seed: int, size: int, spread: float, top_k: int | None, top_p: float
) -> None:
    drawn = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, size, generator=drawn, dtype=torch.float64) * torch.tensor([[spread], [1.0], [3.0]])
    numbers = torch.rand(3, generator=drawn, dtype=torch.float64)
    wanted = [inverted(row, number, top_k, top_p) for row, number in zip(logits, numbers.tolist(), strict=True)]
    how = Sampling(top_k=top_k, top_p=top_p)
    assert choose_tokens(logits, sampling=how, numbers_b=numbers).tolist() == wanted
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sampling, "_at_once", lambda _: True)
        assert choose_tokens(logits, sampling=how, numbers_b=numbers).tolist() == wanted


@pytest.mark.usefixtures("at_once")
def test_tokens_that_cannot_be_are_never_drawn() -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf])
    ends = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for changes in ({}, {"top_k": 4}, {"top_p": 1.0}):
        assert set(choose(logits, ends, **changes)) == {1, 3}, changes


def penalised(logits: list[float], seen: list[bool], penalty: float) -> int:
    how = Sampling(temperature=0.0, repetition_penalty=penalty)
    found = choose_tokens(torch.tensor([logits]), sampling=how, numbers_b=torch.zeros(1), seen_bv=torch.tensor([seen]))
    return int(found)


def test_the_repetition_penalty_lowers_positive_and_negative_scores() -> None:
    assert penalised([2.0, 1.5], [True, False], 1.5) == 1
    assert penalised([-1.0, -1.2], [True, False], 1.5) == 1
    assert penalised([-1.0, -1.6], [True, False], 1.5) == 0


def test_the_numbers_of_a_row_are_the_same_however_many_are_drawn_at_a_time() -> None:
    """A GPU takes some at a time; a row's numbers come from the seed, its key, and how often the key came before."""
    one, other, third = generators_for([[5], [5], "a key"], seed=3)
    together = torch.rand(20, generator=one, dtype=torch.float64)
    again = generators_for([[5]], seed=3)[0]
    parts = [torch.rand(count, generator=again, dtype=torch.float64) for count in (1, 4, 4, 4, 3, 4)]
    assert torch.equal(together, torch.cat(parts))
    assert len({float(torch.rand((), generator=g)) for g in (other, third, *generators_for([[5]], seed=4))}) == 3
