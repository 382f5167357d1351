"""`model`: the architecture that is built here and trained from scratch."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmtrain.config.base import Section, opt


class AttentionConfig(Section):
    variant: Literal["mha", "gqa"] = opt("mha", "mha: one key/value head for each query head; gqa: fewer.")
    num_heads: int = opt(8, "Query heads.", ge=1)
    num_kv_heads: int | None = opt(None, "Key/value heads (gqa only); it divides num_heads.", ge=1)
    head_dim: int | None = opt(None, "Width of a head; d_model / num_heads when not given.", ge=1)
    qk_norm: bool = opt(False, "RMSNorm on each head's queries and keys, before the position encoding.")
    bias: bool = opt(False, "Biases in the four projections.")
    dropout: float = opt(0.0, "Dropout on the attention weights.", ge=0, lt=1)

    @model_validator(mode="after")
    def _heads(self) -> AttentionConfig:
        if self.variant == "mha" and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"variant mha has as many key/value heads as query heads ({self.num_heads}), "
                f"but num_kv_heads is {self.num_kv_heads}: remove it, or set variant: gqa"
            )
        if self.variant == "gqa" and self.num_kv_heads is None:
            raise ValueError("variant gqa needs num_kv_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, whatever the variant."""
        return self.num_kv_heads or self.num_heads


class PositionalConfig(Section):
    encoding: Literal["rope", "learned"] = opt("rope", "How positions enter the model.")
    rope_base: float = opt(10000.0, "Base of the rotary frequencies.", gt=0)


class FeedForwardConfig(Section):
    variant: Literal["swiglu", "mlp"] = opt("swiglu", "swiglu: gated by SiLU; mlp: two projections and an activation.")
    d_ff: int | None = opt(None, "Hidden width; from `expansion` when not given.", ge=1)
    expansion: float | None = opt(
        None, "Hidden width over d_model: 4 for mlp and 8/3 for swiglu when not given (rounded up to 64).", gt=0
    )
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] | None = opt(
        None, "Activation of the mlp: gelu_tanh, which is GPT-2's, when not given; swiglu has silu."
    )
    bias: bool = opt(False, "Biases in the projections.")
    dropout: float = opt(0.0, "Dropout on the output.", ge=0, lt=1)

    @model_validator(mode="after")
    def _one_width(self) -> FeedForwardConfig:
        if self.d_ff is not None and self.expansion is not None:
            raise ValueError("give d_ff or expansion, not both")
        if self.variant == "swiglu" and self.activation not in (None, "silu"):
            raise ValueError(f"swiglu is gated by silu; activation {self.activation} needs variant: mlp")
        return self


class NormConfig(Section):
    type: Literal["rmsnorm", "layernorm"] = opt("rmsnorm", "The normalisation before each sublayer and at the end.")
    eps: float = opt(1e-5, "Added to the variance.", gt=0)


class DecoderConfig(Section):
    """A decoder-only transformer."""

    name: Literal["decoder"] = opt("decoder", "The decoder that is built here.")
    vocab_size: int | None = opt(None, "From the tokenizer when not given; checked against it when given.", ge=2)
    max_seq_len: int = opt(2048, "The longest sequence that the model is made for, in tokens.", ge=1)
    d_model: int = opt(512, "Width of the residual stream.", ge=1)
    num_layers: int = opt(6, "Blocks.", ge=1)
    dropout: float = opt(0.0, "Dropout on the embeddings and on each attention output.", ge=0, lt=1)
    tie_embeddings: bool = opt(True, "The output projection is the embedding table.")
    init_std: float = opt(0.02, "Standard deviation of the initial weights.", gt=0)
    residual_scaled_init: bool = opt(True, "Divide the std of projections into the residual by sqrt(2 num_layers).")
    attention: AttentionConfig = AttentionConfig()
    positional: PositionalConfig = PositionalConfig()
    ffn: FeedForwardConfig = FeedForwardConfig()
    norm: NormConfig = NormConfig()

    @model_validator(mode="after")
    def _fits(self) -> DecoderConfig:
        if self.attention.head_dim is None and self.d_model % self.attention.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by attention.num_heads {self.attention.num_heads}: "
                "change one of them, or give attention.head_dim"
            )
        if self.positional.encoding == "rope" and self.head_dim % 2:
            raise ValueError(f"rope turns pairs of dimensions, but the head_dim {self.head_dim} is odd")
        return self

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.attention.head_dim or self.d_model // self.attention.num_heads

    @property
    def d_ff(self) -> int:
        """Hidden width of the feed-forward layer."""
        if self.ffn.d_ff is not None:
            return self.ffn.d_ff
        expansion = self.ffn.expansion or (8 / 3 if self.ffn.variant == "swiglu" else 4.0)
        return -(-int(expansion * self.d_model) // 64) * 64
