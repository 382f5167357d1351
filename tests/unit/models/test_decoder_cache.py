"""Decoding with the key/value cache gives what decoding without it gives, for every variant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import decoder_variants, random_batch, tiny_decoder

VARIANTS = [pytest.param(changes, id=name) for name, changes in decoder_variants().items()]


@torch.inference_mode()
def cached_logits(decoder: Decoder, ids: torch.Tensor, steps: list[int], **document_ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids`, fed in pieces of the given lengths."""
    cache = decoder.new_cache(ids.shape[0], ids.shape[1])
    documents = document_ids.get("document_ids", torch.zeros_like(ids))
    pieces = zip(ids.split(steps, dim=1), documents.split(steps, dim=1), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([decoder.logits(piece, numbers, cache) for piece, numbers in pieces], dim=1)


@pytest.mark.parametrize("changes", VARIANTS)
def test_cached_logits_equal_full_logits(changes: dict[str, Any]) -> None:
    decoder, ids = tiny_decoder(**changes), random_batch(seq_len=24)["input_ids"]
    cached = cached_logits(decoder, ids, [7, 1, 1, 5, 1, 9])
    torch.testing.assert_close(cached, decoder.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [[24], [1] * 24], ids=["at-once", "one-by-one"])
def test_the_split_of_tokens_into_calls_makes_no_difference(steps: list[int]) -> None:
    decoder, ids = tiny_decoder(), random_batch(seq_len=24)["input_ids"]
    torch.testing.assert_close(cached_logits(decoder, ids, steps), decoder.logits(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_cached_logits_of_packed_documents_equal_full_logits(changes: dict[str, Any]) -> None:
    decoder, batch = tiny_decoder(**changes), random_batch(seq_len=24, num_documents=4)
    ids, documents = batch["input_ids"], batch["document_ids"]
    cached = cached_logits(decoder, ids, [5, 1, 1, 1, 8, 8], document_ids=documents)
    torch.testing.assert_close(cached, decoder.logits(ids, documents), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_padded_row_decodes_as_it_does_alone(changes: dict[str, Any]) -> None:
    decoder, ids = tiny_decoder(**changes), random_batch(batch_size=3, seq_len=24)["input_ids"]
    padding = torch.tensor([0, 9, 17])
    cache = decoder.new_cache(3, 24, first_slots=padding)
    with torch.inference_mode():
        together = torch.cat(
            [decoder.logits(ids[:, :20], None, cache)]
            + [decoder.logits(ids[:, t : t + 1], None, cache) for t in range(20, 24)],
            dim=1,
        )
        for row, pad in enumerate(padding.tolist()):
            alone = decoder.logits(ids[row : row + 1, pad:])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-5)


def test_padding_makes_no_nan() -> None:
    decoder = tiny_decoder()
    cache = decoder.new_cache(2, 8, first_slots=torch.tensor([0, 7]))
    logits = decoder.logits(torch.zeros(2, 8, dtype=torch.int64), None, cache)
    assert torch.isfinite(logits).all()


def test_kept_rows_continue_as_before() -> None:
    decoder, ids = tiny_decoder(), random_batch(batch_size=3, seq_len=10)["input_ids"]
    cache = decoder.new_cache(3, 10, first_slots=torch.tensor([0, 2, 4]))
    with torch.inference_mode():
        decoder.logits(ids[:, :9], None, cache)
        cache.keep_rows([2, 1])
        after = decoder.logits(ids[[2, 1], 9:], None, cache)
        torch.testing.assert_close(after[0], decoder.logits(ids[2:, 4:])[0, -1:], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[1], decoder.logits(ids[1:2, 2:])[0, -1:], rtol=0, atol=1e-5)


def test_last_only_gives_the_last_position() -> None:
    decoder, ids = tiny_decoder(), random_batch()["input_ids"]
    torch.testing.assert_close(decoder.logits(ids, last_only=True), decoder.logits(ids)[:, -1:])


def test_a_full_cache_and_a_full_context_are_rejected() -> None:
    decoder = tiny_decoder()
    cache = decoder.new_cache(1, 4)
    with pytest.raises(ValueError, match="5 tokens are over the 4 that the cache was made for"):
        decoder.logits(torch.zeros(1, 5, dtype=torch.int64), None, cache)
    long = decoder.new_cache(2, 80, first_slots=torch.tensor([10, 20]))
    with pytest.raises(ValueError, match="65 tokens are over the model's max_seq_len 64"):
        decoder.logits(torch.zeros(2, 75, dtype=torch.int64), None, long)


def test_the_cache_holds_the_dtype_of_the_stream() -> None:
    decoder = tiny_decoder()
    assert decoder.new_cache(1, 4).keys.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.new_cache(1, 4).keys.dtype == torch.bfloat16
        ids = random_batch()["input_ids"]
        cached = cached_logits(decoder, ids, [8, 8])
        with torch.inference_mode():  # torch 2.10 keeps the weights that autocast made in it
            full = decoder.logits(ids)
        torch.testing.assert_close(cached, full, rtol=0.05, atol=0.1)
    assert tiny_decoder().to(torch.bfloat16).new_cache(1, 4).keys.dtype == torch.bfloat16
