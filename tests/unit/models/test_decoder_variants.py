"""What each variant computes: complex attention, ALiBi, sinusoids, scaled rotation, activations, norms, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.sections.model import AttentionConfig, DecoderConfig, RopeScalingConfig
from llmtrain.models.decoder import mask as mask_module
from llmtrain.models.decoder.attention import Attention, blocked_attention, explicit_attention, query_blocks
from llmtrain.models.decoder.decoder import Block, Decoder
from llmtrain.models.decoder.feed_forward import activate, build_feed_forward
from llmtrain.models.decoder.mask import AttentionInputs, alibi_slopes, build_mask
from llmtrain.models.decoder.position import Rotary, Sinusoidal, scaled_periods
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config, tiny_decoder

CPU = torch.device("cpu")


def complex_attention_by_the_formula(attention: Attention, x: Tensor, *, heads: int, base: float | None) -> Tensor:
    """Re(q · k̄) · head_dim^-½ in complex numbers; with a `base`, each number turned by e^{iθ}."""
    b, t, _ = x.shape
    d = attention.head_dim

    def numbers(projected: Tensor) -> Tensor:
        real, imaginary = projected.reshape(b, t, heads, 2, d).transpose(1, 2).unbind(-2)
        found = torch.complex(real, imaginary)
        if base is None:
            return found
        angles = torch.arange(t)[:, None] / base ** (torch.arange(d) / d)
        return found * torch.polar(torch.ones_like(angles), angles)

    q, k = numbers(attention.q_proj(x)), numbers(attention.k_proj(x))
    v = attention.v_proj(x).reshape(b, t, heads, d).transpose(1, 2)
    scores = (q @ k.conj().transpose(-1, -2)).real * d**-0.5
    weights = scores.masked_fill(torch.ones(t, t).triu(1).bool(), float("-inf")).softmax(-1)
    out: Tensor = attention.o_proj((weights @ v).transpose(1, 2).flatten(2))
    return out


@pytest.mark.parametrize("encoding", ["rope", "none"])
@pytest.mark.parametrize("explicit", [True, False])
def test_complex_attention_is_the_formula(encoding: str, explicit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_module, "EXPLICIT_MAX_KEYS", 2048 if explicit else 0)
    decoder = tiny_decoder(attention={"variant": "complex", "head_dim": 5}, positional={"encoding": encoding})
    attention = decoder.blocks[0].get_submodule("attention")
    assert isinstance(attention, Attention)
    x = torch.randn(2, 9, 32)
    mask, found = build_mask(9, document_ids=None, cache=None, device=CPU)
    assert found == explicit
    rope = None if decoder.rotary is None else decoder.rotary(9)
    ours = attention(x, AttentionInputs(mask=mask, rope=rope, explicit=explicit))
    base = 10000.0 if encoding == "rope" else None
    wanted = complex_attention_by_the_formula(attention, x, heads=4, base=base)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)


def test_complex_queries_and_keys_are_twice_as_wide_as_their_values() -> None:
    decoder = tiny_decoder(attention={"variant": "complex", "num_kv_heads": 2, "qk_norm": True})
    shapes = {name: tuple(p.shape) for name, p in decoder.blocks[0].get_submodule("attention").named_parameters()}
    assert shapes == {
        "q_proj.weight": (64, 32),
        "k_proj.weight": (32, 32),
        "v_proj.weight": (16, 32),
        "o_proj.weight": (32, 32),
        "q_norm.weight": (16,),
        "k_norm.weight": (16,),
    }
    cache = decoder.new_cache(3, 10)
    assert (cache.keys.shape, cache.values.shape) == ((2, 3, 2, 10, 16), (2, 3, 2, 10, 8))


def test_slopes_are_those_of_the_paper() -> None:
    assert alibi_slopes(8, device=CPU).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1, device=CPU).tolist() == [2.0**-8]
    for num_heads in (3, 6, 12, 25):
        power = 2 ** int(math.log2(num_heads))
        doubled = [2 ** (-8 * (i + 1) / (2 * power)) for i in range(2 * power)]
        wanted = [2 ** (-8 * (i + 1) / power) for i in range(power)] + doubled[0::2][: num_heads - power]
        assert alibi_slopes(num_heads, device=CPU).tolist() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("num_queries", [300, 700])
@pytest.mark.parametrize("window", [None, 1, 100, 250, 10_000])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("past", [0, 150])
def test_blocks_leave_out_only_what_the_mask_hides(
    num_queries: int, window: int | None, alibi: bool, past: int
) -> None:
    """Values and gradients against the plain formula on whole scores, with a bias written out."""
    torch.manual_seed(0)
    s = past + num_queries
    q = torch.randn(1, 4, num_queries, 8).requires_grad_()
    k, v = (torch.randn(1, 2, s, width).requires_grad_() for width in (8, 4))
    slopes = alibi_slopes(4, device=CPU) if alibi else None
    distance = torch.arange(s) - torch.arange(past, s)[:, None]
    seen = (distance <= 0) & (distance > -(window or s + 1))
    mask = torch.where(seen, 0.0, float("-inf"))[None, None]
    bias = torch.where(seen, 0.0 if slopes is None else slopes[:, None, None] * distance, float("-inf"))
    scores = q @ k.repeat_interleave(2, dim=1).transpose(-1, -2) * 4**-0.5 + bias
    wanted = (scores.softmax(-1) @ v.repeat_interleave(2, dim=1)).transpose(1, 2).flatten(2)
    direction = torch.randn_like(wanted)
    gradients = torch.autograd.grad(wanted, (q, k, v), direction)
    for attention in (explicit_attention, blocked_attention):
        ours = attention(q, k, v, mask, slopes=slopes, window=window)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
        found = torch.autograd.grad(ours, (q, k, v), direction)
        for gradient, target in zip(found, gradients, strict=True):
            torch.testing.assert_close(gradient, target, rtol=1e-4, atol=1e-4)


def test_a_window_shortens_the_keys_of_each_block() -> None:
    assert [(b.first_key, b.end_key) for b in query_blocks(1024, 1024)] == [(0, e) for e in (256, 512, 768, 1024)]
    windowed = query_blocks(1024, 1024, window=100)
    assert [(b.first_key, b.end_key) for b in windowed] == [(0, 256), (157, 512), (413, 768), (669, 1024)]


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_query_sees_itself_and_window_minus_one_before(window: int) -> None:
    mask, _ = build_mask(8, document_ids=None, cache=None, device=CPU, window=window)
    assert mask is not None
    assert (mask[0, 0] == 0).sum(-1).tolist() == [min(query + 1, window) for query in range(8)]
    assert all(mask[0, 0, query, query] == 0 for query in range(8))


def test_sinusoids_are_those_of_the_paper_and_added_to_scaled_embeddings() -> None:
    table = Sinusoidal(7, max_seq_len=5).table
    for position in range(5):
        for i in range(7):
            angle = position / 10000 ** (2 * (i // 2) / 7)
            assert table[position, i].item() == pytest.approx(math.cos(angle) if i % 2 else math.sin(angle), abs=1e-6)
    decoder, ids = tiny_decoder(positional={"encoding": "sinusoidal"}), random_batch()["input_ids"]
    assert decoder.sinusoidal is not None
    wanted = decoder.token_embedding(ids) * math.sqrt(32) + decoder.sinusoidal.table[:16]
    torch.testing.assert_close(decoder._embed(ids, 16), wanted)
    with torch.device("meta"):
        empty = Decoder(tiny_config(positional={"encoding": "sinusoidal"}), TINY_VOCAB_SIZE)
    filled = empty.to(torch.bfloat16).to_empty(device="cpu").sinusoidal
    assert filled is not None
    assert torch.equal(filled.table, decoder.sinusoidal.table)


def test_linear_scaling_is_a_position_between() -> None:
    scaling = RopeScalingConfig(rope_type="linear", factor=4.0)
    plain, scaled = (Rotary(8, base=100.0, max_seq_len=64, scaling=given) for given in (None, scaling))
    torch.testing.assert_close(scaled.cos[::4], plain.cos[:16], rtol=0, atol=1e-6)


def test_llama3_scaling_slows_the_slow_dimensions_alone() -> None:
    scaling = RopeScalingConfig(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=1000,
    )
    turns = torch.tensor([100.0, 4.0, 2.5, 1.0, 0.5])
    periods = 1000 / (2 * math.pi * turns)
    slowed = periods / scaled_periods(periods, scaling)
    assert slowed.tolist() == pytest.approx([1.0, 1.0, 0.5 + 0.5 / 8, 1 / 8, 1 / 8], rel=1e-6)


def test_activations_equal_their_formulas() -> None:
    x = torch.linspace(-3, 3, 13)
    assert activate(x, "relu2").tolist() == [max(value, 0.0) ** 2 for value in x.tolist()]
    assert torch.equal(activate(x, "relu"), F.relu(x))
    assert torch.equal(activate(x, "silu"), F.silu(x))
    assert torch.equal(activate(x, "gelu"), F.gelu(x))
    assert torch.equal(activate(x, "gelu_tanh"), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize(
    ("ffn", "gate"),
    [
        ({"variant": "swiglu"}, F.silu),
        ({"variant": "geglu"}, lambda x: F.gelu(x, approximate="tanh")),
        ({"variant": "geglu", "activation": "gelu", "bias": True}, F.gelu),
    ],
    ids=["swiglu", "geglu", "geglu-gelu-bias"],
)
def test_gated_feed_forward_is_the_formula(ffn: dict[str, Any], gate: Any) -> None:
    layer = build_feed_forward(tiny_config(ffn=ffn))
    x = torch.randn(2, 3, 32)
    up, down = layer.up_proj, layer.down_proj
    torch.testing.assert_close(layer(x), down(gate(layer.get_submodule("gate_proj")(x)) * up(x)))


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_a_block_is_the_formula(placement: str, parallel: bool) -> None:
    decoder = tiny_decoder(norm={"placement": placement}, parallel_layers=parallel)
    block = decoder.blocks[0]
    assert isinstance(block, Block)
    for name, parameter in block.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    x = torch.randn(2, 5, 32)
    inputs = decoder._attention_inputs(torch.zeros(2, 5, dtype=torch.long), 5, None, None, cu_seqlens=None)
    norm1, norm2, out1, out2 = (
        block.attention_norm,
        block.feed_forward_norm,
        block.attention_out_norm,
        block.feed_forward_out_norm,
    )
    ffn = block.feed_forward

    def attend(value: Tensor) -> Tensor:
        out: Tensor = block.attention(value, inputs)
        return out

    match placement, parallel:
        case "pre", True:
            assert norm2 is None
            wanted = x + attend(norm1(x)) + ffn(norm1(x))
        case "post", True:
            wanted = norm1(x + attend(x) + ffn(x))
        case "sandwich", True:
            assert out1 is not None
            assert out2 is not None
            wanted = x + out1(attend(norm1(x))) + out2(ffn(norm1(x)))
        case "pre", False:
            assert norm2 is not None
            middle = x + attend(norm1(x))
            wanted = middle + ffn(norm2(middle))
        case "post", False:
            assert norm2 is not None
            middle = norm1(x + attend(x))
            wanted = norm2(middle + ffn(middle))
        case _:
            assert norm2 is not None
            assert out1 is not None
            assert out2 is not None
            middle = x + out1(attend(norm1(x)))
            wanted = middle + out2(ffn(norm2(middle)))
    torch.testing.assert_close(block(x, inputs), wanted)
    assert (decoder.final_norm is None) == (placement == "post")


def test_every_projection_into_the_residual_starts_narrower_in_every_variant() -> None:
    decoder = Decoder(
        tiny_config(
            d_model=128,
            num_layers=8,
            init_std=0.05,
            parallel_layers=True,
            attention={"variant": "complex", "num_kv_heads": 1},
            ffn={"variant": "geglu", "d_ff": 256},
            norm={"type": "layernorm", "placement": "sandwich"},
            positional={"encoding": "learned"},
        ),
        512,
    )
    for name, parameter in decoder.named_parameters():
        if parameter.dim() == 2:
            narrower = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.05 / math.sqrt(16) if narrower else 0.05, rel=0.08), name


def test_flops_count_the_window_and_the_wider_scores_of_complex_attention() -> None:
    def attention_flops(seq_len: int, **attention: Any) -> int:
        decoder = tiny_decoder(attention=attention)
        return decoder.flops_per_token(seq_len) - 6 * decoder.num_parameters(non_embedding=True)

    assert attention_flops(16) == attention_flops(16, variant="mqa") == 12 * 2 * 32 * 16
    assert attention_flops(16, mask="sliding_window", window=5) == 12 * 2 * 32 * 5
    assert attention_flops(4, mask="sliding_window", window=5) == 12 * 2 * 32 * 4
    assert attention_flops(16, variant="complex") == 18 * 2 * 32 * 16


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.3, "attention": {"dropout": 0.2}, "ffn": {"dropout": 0.1}},
        {"attention": {"variant": "complex"}, "positional": {"encoding": "alibi"}, "norm": {"placement": "post"}},
    ],
    ids=["dropout", "complex"],
)
def test_checkpointed_blocks_give_the_same_bits(changes: dict[str, Any], compiled: bool) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        batch = random_batch(num_documents=3, seq_len=32)
        found = []
        for count in (0, 1, None):
            torch.compiler.reset()
            decoder = tiny_decoder(**changes).train()
            if compiled:
                decoder.compile_parts()
            decoder.checkpoint_blocks(count)
            torch.manual_seed(3)
            loss_sum, _ = decoder(batch)
            loss_sum.backward()
            after = torch.rand(1)
            found.append([loss_sum.detach(), after, *(p.grad for p in decoder.parameters())])
        assert all(torch.equal(plain, again) for plain, *others in zip(*found, strict=True) for again in others)
    finally:
        torch.use_deterministic_algorithms(False)


def test_checkpointed_blocks_keep_less_for_the_backward_pass() -> None:
    kept = []
    for count in (0, 2, None):
        decoder = tiny_decoder(num_layers=4).train()
        decoder.checkpoint_blocks(count)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            decoder._hidden(random_batch(seq_len=32)["input_ids"], None, None)
        kept.append(sum(sizes))
    assert kept[2] < kept[0] / 5
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, rel=0.01)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"mask": "sliding_window"}, "mask sliding_window needs window"),
        ({"window": 3}, "window 3 needs mask: sliding_window"),
        ({"variant": "mqa", "num_kv_heads": 2}, "variant mqa has one key/value head, but num_kv_heads is 2"),
        ({"variant": "complex", "num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads 3"),
    ],
    ids=str,
)
def test_impossible_attention_is_rejected(attention: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionConfig.model_validate(attention)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"positional": {"rope_scaling": {"rope_type": "linear", "factor": 2, "low_freq_factor": 1}}},
            "rope_type linear has no low_freq_factor",
        ),
        (
            {"positional": {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1}}},
            "rope_type llama3 needs high_freq_factor, original_max_position_embeddings",
        ),
        (
            {"positional": {"encoding": "alibi", "rope_scaling": {"rope_type": "linear", "factor": 2}}},
            "rope_scaling needs encoding: rope, but encoding is alibi",
        ),
        ({"ffn": {"variant": "geglu", "activation": "relu"}}, "geglu is gated by gelu or gelu_tanh; activation relu"),
        ({"d_model": 12, "attention": {"num_heads": 4}}, "but the head_dim 3 is odd"),
    ],
    ids=str,
)
def test_an_impossible_model_is_rejected(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig.model_validate(model)
    assert (
        DecoderConfig.model_validate({"d_model": 12, "attention": {"num_heads": 4, "variant": "complex"}}).key_dim == 6
    )
