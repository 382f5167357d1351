"""Generation: the cache changes nothing, a row does not depend on its batch, sampling settings do what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import ConfigError
from llmtrain.generation.sampling import Sampling, choose_token
from llmtrain.models.decoder.decoder import Decoder
from tests.support.decoding import generate
from tests.support.tiny import tiny_decoder

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 17, 3, 40], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [33, 33]]


def greedy_without_cache(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def choose(logits: list[float], *, seed: int = 0, **changes: Any) -> int:
    seen = changes.pop("seen", [])
    generator = torch.Generator().manual_seed(seed)
    return choose_token(torch.tensor(logits), sampling=Sampling(**changes), seen=seen, generator=generator)


@pytest.mark.parametrize("encoding", ["rope", "learned"])
def test_greedy_with_the_cache_equals_greedy_without(encoding: str) -> None:
    decoder = tiny_decoder(positional={"encoding": encoding})
    wanted = [greedy_without_cache(decoder, prompt, 20) for prompt in PROMPTS]
    assert generate(decoder, PROMPTS, max_new_tokens=20, sampling=GREEDY) == wanted


def test_a_row_does_not_depend_on_its_batch() -> None:
    decoder = tiny_decoder()
    together = generate(decoder, PROMPTS, max_new_tokens=30, sampling=Sampling(seed=3))
    assert together == [
        generate(decoder, [prompt], max_new_tokens=30, sampling=Sampling(seed=3))[0] for prompt in PROMPTS
    ]
    assert together[::-1] == generate(decoder, PROMPTS[::-1], max_new_tokens=30, sampling=Sampling(seed=3))


def test_the_seed_decides_the_rows_and_equal_prompts_get_different_ones() -> None:
    decoder = tiny_decoder()
    first = generate(decoder, [[5]] * 4, max_new_tokens=12, sampling=Sampling(seed=3))
    assert first == generate(decoder, [[5]] * 4, max_new_tokens=12, sampling=Sampling(seed=3))
    assert first != generate(decoder, [[5]] * 4, max_new_tokens=12, sampling=Sampling(seed=4))
    assert len({tuple(row) for row in first}) == 4


def test_each_row_stops_at_its_own_end_token() -> None:
    decoder = tiny_decoder()
    plain = generate(decoder, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    eos = plain[0][4]
    stopped = generate(decoder, PROMPTS, max_new_tokens=20, sampling=GREEDY, stop_ids=[eos])
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in plain]
    assert len(stopped[0]) <= 4


def test_generation_ends_when_the_context_is_full() -> None:
    decoder = tiny_decoder(positional={"encoding": "learned"})
    prompts = [[1] * 60, [2, 3]]
    rows = generate(decoder, prompts, max_new_tokens=100, sampling=GREEDY)
    assert [len(row) for row in rows] == [4, 62]
    assert rows == [greedy_without_cache(decoder, prompt, 64 - len(prompt)) for prompt in prompts]


def test_a_prompt_that_leaves_no_room_is_rejected_with_the_lengths() -> None:
    with pytest.raises(ConfigError, match="prompt 2 has 64 tokens, but the model's context is 64 tokens"):
        generate(tiny_decoder(), [[1], [1] * 64], max_new_tokens=1)
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        generate(tiny_decoder(), [[]], max_new_tokens=1)
    assert generate(tiny_decoder(), [], max_new_tokens=1) == []


@pytest.mark.parametrize(
    "setting",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_rejected_by_name(setting: dict[str, Any]) -> None:
    lengths = {name: setting.get(name, 1) for name in ("max_new_tokens", "batch_size")}
    with pytest.raises(ConfigError, match=next(iter(setting))):
        generate(
            tiny_decoder(),
            [[1]],
            sampling=Sampling(**{name: value for name, value in setting.items() if name not in lengths}),
            **lengths,
        )


def test_batches_of_any_size_give_the_same_rows_in_the_order_of_the_prompts() -> None:
    decoder = tiny_decoder()
    whole = generate(decoder, PROMPTS, max_new_tokens=12, sampling=Sampling(seed=3))
    for batch_size in (1, 2, 3, 9):
        rows = generate(decoder, PROMPTS, max_new_tokens=12, sampling=Sampling(seed=3), batch_size=batch_size)
        assert rows == whole


def test_on_token_gets_every_token_and_can_end_a_row() -> None:
    decoder = tiny_decoder()
    calls: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        calls.append((row, token))
        return row != 1 or len([one for one, _ in calls if one == 1]) < 3

    rows = generate(decoder, PROMPTS, max_new_tokens=6, sampling=GREEDY, on_token=on_token)
    assert [len(row) for row in rows] == [6, 3, 6, 6]
    assert [[token for one, token in calls if one == row] for row in range(4)] == rows


def test_first_tokens_limit_the_choice_of_one_rows_first_token_only() -> None:
    decoder = tiny_decoder()
    free = generate(decoder, PROMPTS, max_new_tokens=8, sampling=Sampling(seed=3))
    among = torch.tensor([7, 50, 8])
    bound = generate(
        decoder, PROMPTS, max_new_tokens=8, sampling=Sampling(seed=3), first_tokens=[None, among, None, None]
    )
    assert bound[1][0] in {7, 8, 50}
    assert [bound[row] for row in (0, 2, 3)] == [free[row] for row in (0, 2, 3)]
    scores = decoder.logits(torch.tensor([PROMPTS[1]]))[0, -1]
    greedy = generate(decoder, [PROMPTS[1]], max_new_tokens=1, sampling=GREEDY, first_tokens=[among])
    assert greedy == [[int(among[scores[among].argmax()])]]


def test_generation_leaves_a_model_in_training_mode_and_gradients_alone() -> None:
    decoder = tiny_decoder().train()
    generate(decoder, [[1]], max_new_tokens=2)
    assert decoder.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in decoder.parameters())


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log().tolist()
    counts = torch.tensor([choose(logits, seed=seed) for seed in range(3000)]).bincount(minlength=3) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    logits = [0.0, 1.0]
    likelier = {
        t: sum(choose(logits, seed=seed, temperature=t) for seed in range(1000)) / 1000 for t in (0.25, 1.0, 4.0)
    }
    for temperature, share in likelier.items():
        assert share == pytest.approx(1 / (1 + 2.718281828 ** (-1 / temperature)), abs=0.05)
    assert choose(logits, temperature=0.0) == 1


def test_top_k_and_top_p_leave_the_likeliest_only() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    cases: dict[str, dict[str, Any]] = {
        "all": {},
        "k2": {"top_k": 2},
        "k9": {"top_k": 9},
        "p0.3": {"top_p": 0.3},
        "p0.5": {"top_p": 0.5},
        "p0.8": {"top_p": 0.8},
        "k2 p0.5": {"top_k": 2, "top_p": 0.5},
    }
    drawn = {name: {choose(logits, seed=seed, **case) for seed in range(300)} for name, case in cases.items()}
    assert drawn == {
        "all": {0, 1, 2, 3},
        "k2": {1, 3},
        "k9": {0, 1, 2, 3},
        "p0.3": {1},
        "p0.5": {1, 3},
        "p0.8": {1, 2, 3},
        "k2 p0.5": {1},  # after top_k the first has 4/7 of what is left
    }


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
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    scores, order = logits.sort(descending=True)
    probabilities = torch.softmax(scores[:top_k], dim=0)
    reached = probabilities.cumsum(0)
    last = min(len(reached) - 1, int((reached < top_p).sum()))
    drawn = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * reached[last]
    wanted = int(order[: last + 1][min(last, int((reached[: last + 1] <= drawn).sum()))])
    sampling = Sampling(top_k=top_k, top_p=top_p)
    generator = torch.Generator().manual_seed(seed)
    assert choose_token(logits, sampling=sampling, seen=[], generator=generator) == wanted


def test_the_repetition_penalty_lowers_positive_and_negative_scores() -> None:
    assert choose([2.0, 1.5], temperature=0.0, seen=[0], repetition_penalty=1.5) == 1
    assert choose([-1.0, -1.2], temperature=0.0, seen=[0], repetition_penalty=1.5) == 1
    assert choose([-1.0, -1.6], temperature=0.0, seen=[0], repetition_penalty=1.5) == 0
    assert choose([2.0, 1.5], temperature=0.0, seen=[0, 0, 0], repetition_penalty=1.1) == 0  # once, not thrice


@pytest.mark.parametrize(
    "changes",
    [
        {"positional": {"encoding": "rope"}},
        {"positional": {"encoding": "learned"}},
        {"positional": {"encoding": "alibi"}},
        {
            "positional": {"encoding": "sinusoidal"},
            "attention": {"num_heads": 2, "mask": "sliding_window", "window": 5},
        },
    ],
    ids=["rope", "learned", "alibi", "sinusoidal-window"],
)
def test_rows_that_replace_ended_ones_get_the_same_tokens(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny_decoder(**changes)
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (23,), generator=drawn).tolist()
    vocab_size = decoder.vocab_size
    prompts = [torch.randint(1, vocab_size, (length,), generator=drawn).tolist() for length in lengths]
    stop_ids = set(range(0, vocab_size, 6))
    sampling = Sampling(temperature=1.0, seed=3)
    options: dict[str, Any] = {"max_new_tokens": 30, "sampling": sampling, "stop_ids": stop_ids}
    alone = generate(decoder, prompts, batch_size=1, **options)
    assert len({len(row) for row in alone}) > 5, "they end at different times"
    forwards: list[int] = []
    logits = decoder.logits

    def counted(ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        forwards.append(len(ids))
        return logits(ids, *rest, **more)

    monkeypatch.setattr(decoder, "logits", counted)
    for size in (2, 5, 8):
        forwards.clear()
        ended: list[int] = []
        assert generate(decoder, prompts, batch_size=size, on_end=ended.append, **options) == alone
        assert sorted(ended) == list(range(23)), "each is told of once"
        steps = sum(max(len(alone[row]) for row in batch) for batch in batches_of(lengths, size))
        assert len(forwards) < steps, "than batch after batch"


def batches_of(lengths: list[int], size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def test_a_row_may_fill_the_context_while_others_are_replaced() -> None:
    decoder = tiny_decoder(max_seq_len=32)
    prompts = [[5, 9, 2], *([number + 1] for number in range(12))]
    stop_ids = set(range(0, decoder.vocab_size, 2))
    firsts = generate(decoder, prompts, max_new_tokens=200, batch_size=1, sampling=GREEDY, stop_ids=stop_ids)
    assert generate(decoder, prompts, max_new_tokens=200, batch_size=4, sampling=GREEDY, stop_ids=stop_ids) == firsts
    whole = generate(decoder, prompts, max_new_tokens=200, batch_size=4, sampling=GREEDY)
    assert [len(prompt) + len(row) for prompt, row in zip(prompts, whole, strict=True)] == [32] * 13
