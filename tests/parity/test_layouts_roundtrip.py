"""Names there and back give every bit; what no layout holds is said by the feature's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.layouts import LAYOUTS, layout_for, layout_named, why_no_layout
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config

GPT2_LIKE: dict[str, Any] = {
    "attention": {"bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "bias": True},
    "norm": {"type": "layernorm"},
}

SCALING = {"rope_type": "linear", "factor": 2.0}


@st.composite
def configs(draw: st.DrawFn) -> DecoderConfig:
    """Any decoder that can be configured."""
    heads = draw(st.sampled_from([1, 2, 4]))
    attention = draw(st.sampled_from(["mha", "gqa", "mqa", "complex"]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0]))
    variant = draw(st.sampled_from(["swiglu", "geglu", "mlp"]))
    mlp_activations = ["gelu", "gelu_tanh", "relu", "relu2", "silu"]
    encoding = draw(st.sampled_from(["rope", "rope", "learned", "alibi", "sinusoidal", "none"]))
    mask = draw(st.sampled_from(["causal", "sliding_window"]))
    return tiny_config(
        d_model=16,
        num_layers=draw(st.integers(1, 3)),
        tie_embeddings=draw(st.booleans()),
        parallel_layers=draw(st.sampled_from([False, False, True])),
        attention={
            "variant": attention,
            "num_heads": heads,
            "num_kv_heads": kv_heads if attention in ("gqa", "complex") else None,
            "head_dim": draw(st.sampled_from([None, 6])),
            "qk_norm": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "mask": mask,
            "window": 3 if mask == "sliding_window" else None,
        },
        positional={
            "encoding": encoding,
            "rope_scaling": SCALING if encoding == "rope" and draw(st.booleans()) else None,
        },
        ffn={
            "variant": variant,
            "d_ff": 20,
            "bias": draw(st.booleans()),
            "activation": draw(st.sampled_from([None, *mlp_activations])) if variant == "mlp" else None,
        },
        norm={
            "type": draw(st.sampled_from(["rmsnorm", "layernorm"])),
            "placement": draw(st.sampled_from(["pre", "pre", "post", "sandwich"])),
        },
    )


@given(config=configs())
@settings(max_examples=60, deadline=None)
def test_a_round_trip_gives_every_bit_or_the_reason_why_there_is_none(config: DecoderConfig) -> None:
    layout = layout_for(config)
    if layout is None:
        reasons = why_no_layout(config)
        assert all(f"{each.model_type}: " in reasons for each in LAYOUTS)
        return
    state_dict = Decoder(config, TINY_VOCAB_SIZE).state_dict()
    theirs = layout.to_theirs(state_dict, config)
    assert all(tensor.is_contiguous() for tensor in theirs.values())
    back = layout.to_ours(theirs, config)
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[name], state_dict[name]) for name in back)


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({}, "llama"),
        ({"attention": {"variant": "gqa", "num_kv_heads": 2, "bias": True}, "ffn": {"bias": True}}, "llama"),
        ({"attention": {"qk_norm": True}}, "qwen3"),
        ({"attention": {"qk_norm": True, "mask": "sliding_window", "window": 4}}, "qwen3"),
        ({"attention": {"mask": "sliding_window", "window": 4}}, "mistral"),
        ({"attention": {"variant": "mqa"}, "positional": {"rope_scaling": SCALING}}, "llama"),
        (GPT2_LIKE, "gpt2"),
        (GPT2_LIKE | {"tie_embeddings": False}, "gpt2"),
    ],
    ids=str,
)
def test_each_architecture_finds_its_layout(changes: dict[str, Any], model_type: str) -> None:
    config = tiny_config(**changes)
    layout = layout_for(config)
    assert layout is not None
    assert layout.model_type == model_type
    assert layout_named(model_type) is layout
    read_back = layout.read_config(layout.write_config(config, 99) | {"model_type": model_type})
    wanted = config.model_copy(update={"vocab_size": 99})
    assert Decoder(read_back, 99).state_dict().keys() == Decoder(wanted, 99).state_dict().keys()
    assert read_back.norm == wanted.norm
    assert read_back.positional == wanted.positional
    assert read_back.attention.window == wanted.attention.window
    assert read_back.max_seq_len == wanted.max_seq_len


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm": {"type": "layernorm"}}, "llama: norm.type layernorm (it has rmsnorm)"),
        ({"positional": {"encoding": "learned"}}, "llama: positional.encoding learned (it has rope)"),
        ({"ffn": {"variant": "mlp"}}, "qwen3: ffn.variant mlp (it has swiglu)"),
        ({"ffn": {"variant": "geglu"}}, "llama: ffn.variant geglu (it has swiglu)"),
        ({"attention": {"variant": "complex"}}, "llama: attention.variant complex (it has real queries and keys)"),
        ({"norm": {"placement": "sandwich"}}, "mistral: norm.placement sandwich (it has pre)"),
        ({"parallel_layers": True}, "llama: parallel_layers (it has none)"),
        (
            {"attention": {"mask": "sliding_window", "window": 4, "bias": True}},
            "llama: attention.mask sliding_window (it has causal)",
        ),
        ({"attention": {"qk_norm": True}, "ffn": {"bias": True}}, "qwen3: ffn.bias (it has none)"),
        (GPT2_LIKE | {"attention": {"bias": False}}, "gpt2: no attention.bias (it has it)"),
        (
            GPT2_LIKE | {"ffn": {"variant": "mlp", "bias": True, "activation": "gelu"}},
            "gpt2: ffn.activation gelu (it has gelu_tanh)",
        ),
        (
            GPT2_LIKE | {"attention": {"bias": True, "head_dim": 16}},
            "gpt2: attention.head_dim 16 (its heads have d_model / num_heads)",
        ),
    ],
    ids=str,
)
def test_the_feature_that_no_layout_holds_is_named(changes: dict[str, Any], reason: str) -> None:
    config = tiny_config(**changes)
    assert layout_for(config) is None
    assert reason in why_no_layout(config)


def test_an_alias_of_tied_embeddings_is_dropped_when_equal_and_refused_when_not() -> None:
    config = tiny_config()
    layout = layout_for(config)
    assert layout is not None
    theirs = layout.to_theirs(Decoder(config, TINY_VOCAB_SIZE).state_dict(), config)
    assert "lm_head.weight" not in theirs
    table = theirs["model.embed_tokens.weight"]
    assert "lm_head.weight" not in layout.to_ours(theirs | {"lm_head.weight": table.clone()}, config)
    with pytest.raises(ValueError, match=r"tied, but lm_head\.weight differs from model\.embed_tokens\.weight"):
        layout.to_ours(theirs | {"lm_head.weight": table + 1}, config)
