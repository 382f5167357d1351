"""Completions as text: whole characters, stop texts that span tokens, healed prompts, the same in every batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.data.tokenizers import Tokenizer, train_bpe, train_characters
from llmtrain.errors import ConfigError
from llmtrain.generation.completion import Completion, heal_prompt
from llmtrain.generation.sampling import Sampling
from llmtrain.models.decoder.decoder import Decoder
from tests.support.decoding import complete
from tests.support.tiny import tiny_config

TEXT = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x - 1\n" * 20
GREEDY = Sampling(temperature=0.0)


class Script:
    """A model that writes given tokens, whatever it reads, and then the token 0."""

    max_seq_len = 512
    device = torch.device("cpu")

    def __init__(self, tokens: Sequence[int], *, vocab_size: int) -> None:
        self.tokens = [*tokens, 0]
        self.vocab_size = vocab_size
        self.read: list[int] = []

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> Script:
        self.calls = 0
        return self

    def keep_rows(self, rows: Sequence[int]) -> None:
        pass

    def logits(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: Any = None, *, last_only: bool = False
    ) -> Tensor:
        if self.calls == 0:
            self.read = input_ids[0].tolist()
        scores = torch.zeros(len(input_ids), 1, self.vocab_size)
        scores[:, :, self.tokens[min(self.calls, len(self.tokens) - 1)]] = 1.0
        self.calls += 1
        return scores


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], vocab_size=300)


@pytest.fixture(scope="module")
def decoder(tokenizer: Tokenizer) -> Decoder:
    torch.manual_seed(0)
    return Decoder(tiny_config(), tokenizer.vocab_size).eval()


def write(tokenizer: Tokenizer, text: str, **options: Any) -> tuple[Completion, list[str]]:
    """What comes of a model that writes `text` byte by byte, and the pieces that were told."""
    single = {piece: index for index, piece in enumerate(tokenizer.token_texts()) if len(piece) == 1}
    script = [index for character in text for index in _bytes_of(tokenizer, character, single)]
    pieces: list[str] = []
    model = Script(script, vocab_size=tokenizer.vocab_size)
    given: dict[str, Any] = {"max_new_tokens": 100, "sampling": GREEDY, "stop_ids": [0], "heal": False} | options
    done = complete(model, tokenizer, ["x"], on_text=lambda _, piece: pieces.append(piece), **given)
    return done[0], pieces


def _bytes_of(tokenizer: Tokenizer, character: str, single: dict[str, int]) -> list[int]:
    return [single[character]] if character in single else tokenizer.encode(character)


def test_characters_of_several_tokens_are_reported_complete(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("漢")) == 3
    done, pieces = write(tokenizer, "a漢é🙂b")
    assert pieces == ["a", "漢", "é", "🙂", "b"]
    assert done == Completion(prompt="x", completion="a漢é🙂b", tokens=11, ended_by="end")


def test_half_a_character_is_reported_only_after_the_last_token(tokenizer: Tokenizer) -> None:
    done, pieces = write(tokenizer, "ab漢", max_new_tokens=4)
    assert (done.completion, done.ended_by) == ("ab\ufffd", "length")
    assert pieces == ["a", "b", "\ufffd"]


def test_text_ends_before_a_stop_text_that_spans_tokens(tokenizer: Tokenizer) -> None:
    done, pieces = write(tokenizer, "one\n\ndef two", stop=["\n\ndef", "never"])
    assert (done.completion, done.ended_by) == ("one", "stop")
    assert "".join(pieces) == "one"
    assert done.tokens == len("one\n\ndef")


def test_the_first_stop_text_in_the_completion_ends_it(tokenizer: Tokenizer) -> None:
    assert write(tokenizer, "ab cd ef", stop=["ef", "cd", "x"])[0].completion == "ab "
    assert write(tokenizer, "abc", stop=["b", "abc"])[0].completion == "a"  # at once, before the longer could be whole


def test_a_possible_beginning_of_a_stop_text_is_held_back_until_it_is_none(tokenizer: Tokenizer) -> None:
    done, pieces = write(tokenizer, "a--b--", stop=["--!"])
    assert (done.completion, done.ended_by) == ("a--b--", "end")
    assert pieces == ["a", "--b", "--"]


def test_an_empty_stop_text_is_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="a stop text is empty"):
        write(tokenizer, "a", stop=[""])


def test_a_stop_token_ends_the_text_without_being_in_it(tokenizer: Tokenizer) -> None:
    (newline,) = tokenizer.encode("\n")
    done, _ = write(tokenizer, "ab\ncd", stop_ids=[newline])
    assert (done.completion, done.tokens, done.ended_by) == ("ab", 2, "end")


def test_a_prompt_that_could_have_ended_otherwise_is_healed(tokenizer: Tokenizer) -> None:
    # In the data a colon at a line's end is one token with what follows.
    ids, healed = tokenizer.encode("def f(x):"), tokenizer.encode("def f(x):\n    ")
    assert ids[:-1] == healed[:-1]
    assert ids[-1] != healed[-1]
    start = heal_prompt(ids, tokenizer.token_texts(), begin_id=0)
    assert start.kept == ids[:-1]
    assert start.first_tokens is not None
    assert {ids[-1], healed[-1]} <= set(start.first_tokens.tolist())
    assert all(tokenizer.decode([index]).startswith("):") for index in start.first_tokens.tolist())

    model = Script([healed[-1], *tokenizer.encode("return")], vocab_size=tokenizer.vocab_size)
    pieces: list[str] = []
    done = complete(
        model,
        tokenizer,
        ["def f(x):"],
        max_new_tokens=50,
        sampling=GREEDY,
        stop_ids=[0],
        on_text=lambda _, piece: pieces.append(piece),
    )
    assert model.read == start.kept
    assert done[0].completion == "".join(pieces) == "\n    return"


def test_a_prompt_of_one_token_is_healed_from_the_beginning_of_a_document(tokenizer: Tokenizer) -> None:
    (token,) = tokenizer.encode("de")[:1]
    start = heal_prompt([token], tokenizer.token_texts(), begin_id=0)
    assert (start.kept, start.removed) == ([0], [token])


@pytest.mark.parametrize("text", ["漢", "<|endoftext|>"])
def test_half_characters_and_special_tokens_are_not_healed(tokenizer: Tokenizer, text: str) -> None:
    ids = [0] if text.startswith("<") else tokenizer.encode(text)
    assert heal_prompt(ids, tokenizer.token_texts(), begin_id=0) == (ids, [], None)


def test_a_token_that_begins_no_other_is_not_healed() -> None:
    characters = train_characters([TEXT])
    ids = characters.encode("def f(x):")
    assert heal_prompt(ids, characters.token_texts(), begin_id=characters.eos_id) == (ids, [], None)


@pytest.mark.parametrize("heal", [True, False])
def test_completions_are_the_same_in_every_batch_and_streamed(
    tokenizer: Tokenizer, decoder: Decoder, heal: bool
) -> None:
    prompts = ["def f(x):", "", "x", "return x + 1\n\n", "def g(x", "x", "def g(y"]
    told = [""] * len(prompts)

    def tell(row: int, piece: str) -> None:
        told[row] += piece

    settings: dict[str, Any] = {"max_new_tokens": 24, "sampling": Sampling(seed=5), "heal": heal, "stop_ids": [0]}
    whole = complete(decoder, tokenizer, prompts, on_text=tell, **settings)
    assert [done.completion for done in whole] == told
    assert [done.prompt for done in whole] == prompts
    assert whole[2].completion != whole[5].completion  # asked twice, answered twice
    for batch_size in (1, 2, 5):
        assert complete(decoder, tokenizer, prompts, batch_size=batch_size, **settings) == whole
    alone = complete(decoder, tokenizer, [prompts[-1]], **settings)
    assert alone == [whole[-1]]


def test_a_prompt_that_is_too_long_is_rejected_with_its_full_length(tokenizer: Tokenizer, decoder: Decoder) -> None:
    prompt = "é" * 32
    assert len(tokenizer.encode(prompt)) == 64
    with pytest.raises(ConfigError, match="prompt 1 has 64 tokens, but the model's context is 64"):
        complete(decoder, tokenizer, [prompt], max_new_tokens=1, sampling=GREEDY)
