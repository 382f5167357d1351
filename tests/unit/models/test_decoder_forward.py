"""What the decoder computes: causality, documents, dropout, initialisation, counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.models.decoder.attention import (
    attend,
    blocked_attention,
    explicit_attention,
    fused_attention,
)
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.decoder.mask import AttentionInputs, build_mask
from tests.support.tiny import TINY_VOCAB_SIZE, decoder_variants, random_batch, tiny_config, tiny_decoder

VARIANTS = [pytest.param(changes, id=name) for name, changes in decoder_variants().items()]


def build(changes: dict[str, Any] | None = None, **more: Any) -> Decoder:
    return tiny_decoder(**(changes or {}), **more)


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_later_token_leaves_earlier_logits_bit_identical(changes: dict[str, Any]) -> None:
    decoder, ids = build(changes), random_batch(seq_len=24)["input_ids"]
    changed = ids.clone()
    changed[:, 15] = (changed[:, 15] + 1) % TINY_VOCAB_SIZE
    before, after = decoder.logits(ids), decoder.logits(changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_document_never_attends_to_another(changes: dict[str, Any]) -> None:
    decoder, ids = build(changes), random_batch(seq_len=24)["input_ids"]
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2, dtype=torch.int32)
    for changed_document in (0, 1):
        theirs = documents == changed_document
        changed = torch.where(theirs, (ids + 1) % TINY_VOCAB_SIZE, ids)
        before, after = decoder.logits(ids, documents), decoder.logits(changed, documents)
        assert torch.equal(before[~theirs], after[~theirs])
        assert not torch.equal(before[theirs], after[theirs])


def test_packed_documents_score_as_each_does_alone_with_relative_positions() -> None:
    decoder, ids = build(), random_batch(seq_len=24)["input_ids"]
    documents = torch.tensor([[0] * 10 + [1] * 14] * 2, dtype=torch.int32)
    packed = decoder.logits(ids, documents)
    alone = torch.cat([decoder.logits(ids[:, :10]), decoder.logits(ids[:, 10:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def test_one_document_scores_as_no_documents() -> None:
    decoder, ids = build(), random_batch()["input_ids"]
    assert torch.equal(decoder.logits(ids), decoder.logits(ids, torch.full_like(ids, 3, dtype=torch.int32)))


@pytest.mark.parametrize("num_queries", [1, 100, 256, 300, 700])
@pytest.mark.parametrize("documents", [False, True])
def test_explicit_attention_equals_the_fused_kernel(num_queries: int, documents: bool) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, num_queries, 8)
    k, v = torch.randn(2, 2, 2, num_queries, 8)
    ids = torch.randint(3, (2, num_queries)).sort(dim=-1).values if documents else None
    mask, explicit = build_mask(num_queries, document_ids=ids, cache=None, device=q.device)
    assert explicit
    assert mask is not None
    fused = fused_attention(q, k, v, mask == 0 if documents else None).transpose(1, 2).flatten(2)
    torch.testing.assert_close(explicit_attention(q, k, v, mask), fused, rtol=0, atol=2e-6)
    torch.testing.assert_close(blocked_attention(q, k, v, mask), fused, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_queries", [5, 256, 500])
def test_gradients_of_blocked_attention_are_those_of_explicit_attention(num_queries: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, num_queries, 8).requires_grad_()
    k, v = (torch.randn(2, 2, num_queries, 8).requires_grad_() for _ in range(2))
    ids = torch.randint(3, (2, num_queries)).sort(dim=-1).values
    mask, _ = build_mask(num_queries, document_ids=ids, cache=None, device=q.device)
    assert mask is not None
    direction = torch.randn(2, num_queries, 32)
    wanted = torch.autograd.grad(explicit_attention(q, k, v, mask), (q, k, v), direction)
    for gradient, target in zip(
        torch.autograd.grad(blocked_attention(q, k, v, mask), (q, k, v), direction), wanted, strict=True
    ):
        torch.testing.assert_close(gradient, target, rtol=1e-5, atol=1e-5)


def test_gradients_of_blocked_attention_in_bfloat16_err_at_most_half_as_much_again() -> None:
    torch.manual_seed(0)
    q, k, v = exact = [torch.randn(2, 4, 256, 16).bfloat16().float().requires_grad_() for _ in range(3)]
    q_half, k_half, v_half = half = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    mask, _ = build_mask(256, document_ids=None, cache=None, device=torch.device("cpu"))
    assert mask is not None
    direction = torch.randn(2, 256, 64).bfloat16()
    truth = torch.autograd.grad(explicit_attention(q, k, v, mask), exact, direction.float())
    blocked = torch.autograd.grad(blocked_attention(q_half, k_half, v_half, mask), half, direction)
    explicit = torch.autograd.grad(explicit_attention(q_half, k_half, v_half, mask), half, direction)
    for wanted, ours, plain in zip(truth, blocked, explicit, strict=True):
        error, plain_error = ((gradient.float() - wanted).norm() / wanted.norm() for gradient in (ours, plain))
        assert float(error) < 0.01
        assert float(error) < 1.5 * float(plain_error)


def test_long_rows_take_the_fused_kernel_on_a_cpu() -> None:
    mask, explicit = build_mask(2049, document_ids=None, cache=None, device=torch.device("cpu"))
    assert (mask, explicit) == (None, False)
    q = torch.randn(1, 2, 2049, 4)
    out = attend(q, q, q, AttentionInputs(mask=mask, rope=None, explicit=explicit), dropout=0.0)
    assert torch.equal(out[:, 0], q[:, :, 0].flatten(1))  # the first position sees itself alone


def test_loss_is_the_sum_over_supervised_tokens_and_their_number() -> None:
    decoder, batch = build(), random_batch(ignored_fraction=0.3)
    loss_sum, num_tokens = decoder(batch)
    supervised = batch["labels"] != IGNORE_INDEX
    log_probabilities = decoder.logits(batch["input_ids"]).log_softmax(-1)
    picked = log_probabilities.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss_sum, -picked[supervised].sum(), rtol=1e-6, atol=0)
    assert (int(num_tokens), num_tokens.dtype) == (int(supervised.sum()), torch.int64)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.shape == num_tokens.shape == ()


def test_a_sequence_over_the_context_is_rejected() -> None:
    with pytest.raises(ValueError, match="65 tokens are over the model's max_seq_len 64"):
        build().logits(torch.zeros(1, 65, dtype=torch.int64))


@pytest.mark.parametrize(
    "dropout", [{"dropout": 0.5}, {"attention": {"dropout": 0.5}}, {"ffn": {"dropout": 0.5}}], ids=str
)
def test_dropout_acts_in_training_only(dropout: dict[str, Any]) -> None:
    decoder, ids = build(dropout), random_batch()["input_ids"]
    assert torch.equal(decoder.logits(ids), build().logits(ids))
    decoder.train()
    torch.manual_seed(1)
    first = decoder.logits(ids)
    assert not torch.equal(first, decoder.logits(ids))
    torch.manual_seed(1)
    assert torch.equal(first, decoder.logits(ids))


def test_initial_weights_have_the_configured_standard_deviation() -> None:
    decoder = Decoder(tiny_config(d_model=128, num_layers=8, init_std=0.05, attention={"bias": True}), 512)
    spread = {name: parameter.std().item() for name, parameter in decoder.named_parameters() if parameter.dim() == 2}
    for name, std in spread.items():
        narrower = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert std == pytest.approx(0.05 / math.sqrt(16) if narrower else 0.05, rel=0.05), name
    assert all(torch.all(p == 1) for name, p in decoder.named_parameters() if name.endswith("norm.weight"))
    assert all(torch.all(p == 0) for name, p in decoder.named_parameters() if name.endswith("bias"))
    plain = Decoder(tiny_config(d_model=128, num_layers=8, residual_scaled_init=False), 512)
    assert plain.blocks[0].get_parameter("attention.o_proj.weight").std().item() == pytest.approx(0.2, rel=0.05)


def test_the_seed_decides_the_weights() -> None:
    first, second = build().state_dict(), build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(1)
    other = Decoder(tiny_config(), TINY_VOCAB_SIZE).state_dict()
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_parameters_are_counted_once_and_lookup_tables_apart() -> None:
    small: dict[str, Any] = {"d_model": 8, "num_layers": 1, "attention": {"num_heads": 2}, "ffn": {"d_ff": 16}}
    block, final_norm, table = 4 * 8 * 8 + 3 * 8 * 16 + 2 * 8, 8, 10 * 8
    tied = Decoder(tiny_config(**small), 10)
    assert tied.num_parameters() == tied.num_parameters(non_embedding=True) == block + final_norm + table
    untied = Decoder(tiny_config(**small, tie_embeddings=False), 10)
    assert untied.num_parameters() == block + final_norm + 2 * table
    assert untied.num_parameters(non_embedding=True) == block + final_norm + table
    learned = Decoder(tiny_config(**small, positional={"encoding": "learned"}), 10)
    assert learned.num_parameters() == block + final_norm + table + 64 * 8
    assert learned.num_parameters(non_embedding=True) == block + final_norm + table
    assert tied.flops_per_token(16) == 6 * (block + final_norm + table) + 12 * 1 * 8 * 16


def test_parameter_names_carry_no_alias_and_no_table() -> None:
    names = set(build(attention={"qk_norm": True}).state_dict())
    assert names == {"token_embedding.weight", "final_norm.weight"} | {
        f"blocks.{layer}.{name}.weight"
        for layer in range(2)
        for name in [
            "attention_norm",
            "feed_forward_norm",
            *(f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"feed_forward.{part}_proj" for part in ("gate", "up", "down")),
        ]
    }


def test_bfloat16_autocast_keeps_weights_and_gradients_in_float32() -> None:
    decoder, batch = build(), random_batch()
    exact, _ = decoder(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, _ = decoder(batch)
        assert decoder.logits(batch["input_ids"]).dtype == torch.bfloat16
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(exact.item(), rel=0.01)
    loss_sum.backward()
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in decoder.parameters() if parameter.grad is not None} == {torch.float32}


def test_rotary_tables_stay_exact_when_the_model_is_cast_or_leaves_the_meta_device() -> None:
    decoder = build()
    assert decoder.rotary is not None
    wanted = decoder.rotary.cos.clone()
    assert torch.equal(decoder.to(torch.bfloat16).rotary.cos, wanted)  # type: ignore[union-attr]
    with torch.device("meta"):
        empty = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    filled = empty.to_empty(device="cpu").rotary
    assert filled is not None
    assert torch.equal(filled.cos, wanted)
    assert filled.cos.dtype == torch.float32


def test_training_overfits_one_batch() -> None:
    torch.manual_seed(0)
    decoder, batch = Decoder(tiny_config(init_std=0.05), TINY_VOCAB_SIZE), random_batch(batch_size=4)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss_sum, num_tokens = decoder(batch)
        losses.append(float(loss_sum / num_tokens))
        optimizer.zero_grad()
        (loss_sum / num_tokens).backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(TINY_VOCAB_SIZE), abs=0.1)
    assert losses[-1] < 0.1


def test_config_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"d_model 30 is not divisible by attention\.num_heads 4"):
        DecoderConfig.model_validate({"d_model": 30, "attention": {"num_heads": 4}})
