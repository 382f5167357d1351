"""Generation: the cache changes nothing, a row does not depend on its batch, the host seldom waits for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.errors import ConfigError
from llmtrain.generation import decoding, sampling
from llmtrain.generation.sampling import Sampling
from llmtrain.models.decoder.decoder import Decoder
from tests.support.decoding import generate
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config, tiny_decoder

GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 17, 3, 40], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [33, 33]]


def greedy_without_cache(decoder: Decoder, prompt: list[int], num_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(decoder.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(params=[1, 4], ids=["read each", "read four"])
def read_every(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read the tokens as on a CPU, and as on a GPU."""
    monkeypatch.setattr(decoding, "_read_every", lambda _: request.param)
    return int(request.param)


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


@pytest.mark.usefixtures("read_every")
def test_each_row_stops_at_its_own_end_token() -> None:
    decoder = tiny_decoder()
    plain = generate(decoder, PROMPTS, max_new_tokens=20, sampling=GREEDY)
    eos = plain[0][4]
    stopped = generate(decoder, PROMPTS, max_new_tokens=20, sampling=GREEDY, stop_ids=[eos])
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in plain]
    assert len(stopped[0]) <= 4


@pytest.mark.usefixtures("read_every")
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


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 9}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"temperature": 0.0}], ids=str
)
@pytest.mark.parametrize("at_once", [False, True], ids=["row by row", "at once"])
def test_batches_of_any_size_give_the_same_rows_however_the_tokens_are_chosen_and_read(
    settings: dict[str, Any], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, prompts = tiny_decoder(), [*PROMPTS, [8, 9], [9], [30]]
    options: dict[str, Any] = {"max_new_tokens": 13, "sampling": Sampling(seed=3, **settings), "stop_ids": [1, 2]}
    wanted = generate(decoder, prompts, batch_size=1, **options)
    assert len({len(row) for row in wanted}) > 1, "they end at different times"
    monkeypatch.setattr(sampling, "_at_once", lambda _: at_once)
    monkeypatch.setattr(decoding, "_read_every", lambda _: 4 if at_once else 1)
    for batch_size in (1, 2, 7):
        assert generate(decoder, prompts, batch_size=batch_size, **options) == wanted


@pytest.mark.usefixtures("read_every")
def test_on_token_gets_every_token_and_can_end_a_row() -> None:
    decoder = tiny_decoder()
    calls: list[tuple[int, int]] = []

    def on_token(row: int, token: int) -> bool:
        calls.append((row, token))
        return row != 1 or len([one for one, _ in calls if one == 1]) < 3

    rows = generate(decoder, PROMPTS, max_new_tokens=6, sampling=GREEDY, on_token=on_token)
    assert [len(row) for row in rows] == [6, 3, 6, 6]
    assert [[token for one, token in calls if one == row] for row in range(4)] == rows


@pytest.mark.usefixtures("read_every")
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
    changes: dict[str, Any], read_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = tiny_decoder(**changes)
    drawn = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (23,), generator=drawn).tolist()
    vocab_size = decoder.vocab_size
    prompts = [torch.randint(1, vocab_size, (length,), generator=drawn).tolist() for length in lengths]
    stop_ids = set(range(0, vocab_size, 6))
    options: dict[str, Any] = {"max_new_tokens": 30, "sampling": Sampling(seed=3), "stop_ids": stop_ids}
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
        assert len(forwards) < steps * (1 if read_every == 1 else 1.5), "than batch after batch"


def batches_of(lengths: list[int], size: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


@pytest.mark.usefixtures("read_every")
def test_a_row_may_fill_the_context_while_others_are_replaced() -> None:
    decoder = tiny_decoder(max_seq_len=32)
    prompts = [[5, 9, 2], *([number + 1] for number in range(12))]
    stop_ids = set(range(0, decoder.vocab_size, 2))
    firsts = generate(decoder, prompts, max_new_tokens=200, batch_size=1, sampling=GREEDY, stop_ids=stop_ids)
    assert generate(decoder, prompts, max_new_tokens=200, batch_size=4, sampling=GREEDY, stop_ids=stop_ids) == firsts
    whole = generate(decoder, prompts, max_new_tokens=200, batch_size=4, sampling=GREEDY)
    assert [len(prompt) + len(row) for prompt, row in zip(prompts, whole, strict=True)] == [32] * 13


def test_the_host_reads_the_tokens_of_a_gpu_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that claim to be on a GPU: whatever else waited for it would raise, as would a tensor left behind."""
    reads: list[tuple[int, ...]] = []

    def read(tokens: torch.Tensor) -> list[list[int]]:
        assert tokens.device.type == "cuda"
        reads.append(tuple(tokens.shape))
        return [[7] * tokens.shape[1]] * tokens.shape[0]

    monkeypatch.setattr(decoding, "_read", read)
    settings = Sampling(top_k=9, top_p=0.9, repetition_penalty=1.2)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        with torch.device("cuda"):
            decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE).eval()
        for chosen in (GREEDY, Sampling(), settings):
            reads.clear()
            rows = generate(decoder, [[5, 17, 3], [9, 4, 4]], max_new_tokens=22, sampling=chosen)
            assert rows == [[7] * 22] * 2
            assert reads == [(2, 1), *[(2, decoding.READ_EVERY)] * 5, (2, 1)], "after the prompt, then four at a time"


def test_deterministic_draws_of_a_gpu_are_made_on_the_cpu() -> None:
    """Where cumsum would raise."""
    gpu, draws = torch.device("cuda"), Sampling()
    assert sampling.choosing_device(gpu, draws) == gpu
    torch.use_deterministic_algorithms(True)
    try:
        assert sampling.choosing_device(gpu, draws) == torch.device("cpu")
        assert sampling.choosing_device(gpu, GREEDY) == gpu
    finally:
        torch.use_deterministic_algorithms(False)
