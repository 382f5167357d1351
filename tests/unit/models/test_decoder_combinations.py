"""Every attention × position × mask × norm placement: decoding, causality, documents, batches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from llmtrain.models.decoder import mask as mask_module
from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_decoder

SEQ_LEN = 12
WINDOW = 5
ATTENTION: dict[str, dict[str, Any]] = {
    "mha": {"variant": "mha"},
    "gqa": {"variant": "gqa", "num_kv_heads": 2},
    "mqa": {"variant": "mqa"},
    "complex": {"variant": "complex"},
}
POSITIONS = ("rope", "alibi", "sinusoidal", "learned", "none")
MASKS: dict[str, dict[str, Any]] = {"causal": {}, "window": {"mask": "sliding_window", "window": WINDOW}}
PLACEMENTS = ("pre", "post", "sandwich")
PRODUCT = list(itertools.product(ATTENTION, POSITIONS, MASKS, PLACEMENTS))
PAIRWISE = [
    (attention, POSITIONS[p], list(MASKS)[(a + p) % 2], PLACEMENTS[(a + 2 * p) % 3])
    for a, attention in enumerate(ATTENTION)
    for p in range(len(POSITIONS))
]
"""Each attention with each position, masks and placements in turn, so that all pairs of choices occur."""


@pytest.fixture(
    params=[*((*names, "explicit") for names in PRODUCT), *((*names, "fused") for names in PAIRWISE)], ids="-".join
)
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Two layers, 16 wide, 4 heads."""
    attention, encoding, mask, placement, kernel = request.param
    if kernel == "fused":
        monkeypatch.setattr(mask_module, "EXPLICIT_MAX_KEYS", 0)
    return tiny_decoder(
        d_model=16,
        max_seq_len=SEQ_LEN,
        attention={**ATTENTION[attention], **MASKS[mask]},
        positional={"encoding": encoding},
        ffn={"d_ff": 24},
        norm={"placement": placement},
        parallel_layers=placement == "post" and encoding in ("alibi", "learned"),
    )


@pytest.fixture
def ids() -> torch.Tensor:
    """[3, SEQ_LEN] random tokens."""
    return torch.randint(TINY_VOCAB_SIZE, (3, SEQ_LEN), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def in_pieces(
    decoder: Decoder,
    ids: torch.Tensor,
    pieces: list[int],
    *,
    padding: list[int] | None = None,
    **documents: torch.Tensor,
) -> torch.Tensor:
    """Logits of `ids` through a cache, fed in pieces of the given lengths."""
    first_slots = None if padding is None else torch.tensor(padding)
    cache = decoder.new_cache(ids.shape[0], ids.shape[1], first_slots=first_slots)
    numbers = documents.get("document_ids", torch.zeros_like(ids))
    bounds = list(itertools.accumulate(pieces, initial=0))
    spans = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    return torch.cat([decoder.logits(ids[:, span], numbers[:, span], cache) for span in spans], dim=1)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5)


@torch.inference_mode()
def test_cached_decoding_equals_full_decoding(decoder: Decoder, ids: torch.Tensor) -> None:
    full = decoder.logits(ids)
    close(in_pieces(decoder, ids, [1] * SEQ_LEN), full)
    close(in_pieces(decoder, ids, [7, 1, 4]), full)
    documents = torch.tensor([[0] * 4 + [1] * 8, [2] * 12, [0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3]])
    close(in_pieces(decoder, ids, [6, 1, 1, 4], document_ids=documents), decoder.logits(ids, documents))


@torch.inference_mode()
def test_a_batch_of_prompts_of_different_length_equals_each_alone(decoder: Decoder, ids: torch.Tensor) -> None:
    padding = [0, 3, 6]
    together = in_pieces(decoder, ids, [8, 1, 1, 2], padding=padding)
    for row, pad in enumerate(padding):
        alone = decoder.logits(ids[row : row + 1, pad:])
        close(together[row : row + 1, pad:], alone)
        close(in_pieces(decoder, ids[row : row + 1, pad:], [SEQ_LEN - 5 - pad, 1, 4]), alone)
    close(torch.cat([decoder.logits(ids[row : row + 1]) for row in range(3)]), decoder.logits(ids))


@torch.inference_mode()
def test_no_token_attends_to_later_tokens(decoder: Decoder, ids: torch.Tensor) -> None:
    before = decoder.logits(ids)
    for changed_slot in (1, 7, SEQ_LEN - 1):
        changed = ids.clone()
        changed[:, changed_slot] = (changed[:, changed_slot] + 1) % TINY_VOCAB_SIZE
        after = decoder.logits(changed)
        assert torch.equal(before[:, :changed_slot], after[:, :changed_slot])
        assert not torch.equal(before[:, changed_slot], after[:, changed_slot])


@torch.inference_mode()
def test_no_document_attends_to_another(decoder: Decoder, ids: torch.Tensor) -> None:
    documents = torch.tensor([[0] * 5 + [1] * 7] * 3, dtype=torch.int32)
    before = decoder.logits(ids, documents)
    for changed_document in (0, 1):
        theirs = documents == changed_document
        after = decoder.logits(torch.where(theirs, (ids + 1) % TINY_VOCAB_SIZE, ids), documents)
        assert torch.equal(before[~theirs], after[~theirs])
        assert not torch.equal(before[theirs], after[theirs])
    alone = torch.cat([decoder.logits(ids[:, :5]), decoder.logits(ids[:, 5:])], dim=1)
    close(before, alone)


@torch.inference_mode()
def test_a_window_reaches_as_far_as_it_says_and_no_further(decoder: Decoder, ids: torch.Tensor) -> None:
    """Through two layers a token reaches back twice window - 1."""
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % TINY_VOCAB_SIZE
    before, after = decoder.logits(ids), decoder.logits(changed)
    windowed = decoder.config.attention.window is not None
    unreached = 2 * (WINDOW - 1) + 1
    assert torch.equal(before[:, unreached:], after[:, unreached:]) == windowed
    assert not torch.equal(before[:, unreached - 1], after[:, unreached - 1])


@torch.inference_mode()
def test_bfloat16_stays_near_float32(decoder: Decoder, ids: torch.Tensor) -> None:
    """As weights and under autocast, where the fused kernel wants its bias in the dtype of the queries."""
    exact = decoder.logits(ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, decoded = decoder.logits(ids), in_pieces(decoder, ids, [7, 1, 4])
    narrow = decoder.to(torch.bfloat16).logits(ids)
    for found in (mixed, decoded, narrow):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - exact).norm() / exact.norm()) < 0.06
