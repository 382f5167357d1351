"""`model` of the name `decoder`: the architecture that llmtrain builds and trains from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from llmtrain.config.sections.base import Alternatives, Section, key, opt
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.config.sections.presets import PresetName, with_preset
from llmtrain.local_paths import LOCAL


class AttentionConfig(Section):
    variant: Literal["mha", "gqa", "mqa", "complex"] = opt(
        "mha",
        "mha: one key/value head for each query head; gqa: fewer; mqa: one; complex: queries and keys are complex.",
    )
    num_heads: int = opt(8, "Query heads.", ge=1)
    num_kv_heads: int | None = opt(None, "Key/value heads (gqa and complex only); it divides num_heads.", ge=1)
    head_dim: int | None = opt(
        None, "Width of a head, in complex numbers where they are; d_model / num_heads when not given.", ge=1
    )
    qk_norm: bool = opt(False, "RMSNorm on each head's queries and keys, before the position encoding.")
    bias: bool = opt(False, "Biases in the four projections.")
    dropout: float = opt(0.0, "Dropout on the attention weights.", ge=0, lt=1)
    mask: Literal["causal", "sliding_window"] = opt(
        "causal", "causal: a token attends to all tokens before it; sliding_window: to the last `window` tokens."
    )
    window: int | None = opt(None, "Tokens that a token attends to, itself included (sliding_window only).", ge=1)

    @model_validator(mode="after")
    def _heads(self) -> AttentionConfig:
        if self.variant == "mha" and self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"variant mha has as many key/value heads as query heads ({self.num_heads}), "
                f"but num_kv_heads is {self.num_kv_heads}: remove it, or set variant: gqa"
            )
        if self.variant == "mqa" and self.num_kv_heads not in (None, 1):
            raise ValueError(
                f"variant mqa has one key/value head, but num_kv_heads is {self.num_kv_heads}: "
                "remove it, or set variant: gqa"
            )
        if self.variant == "gqa" and self.num_kv_heads is None:
            raise ValueError("variant gqa needs num_kv_heads")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.kv_heads}")
        return self

    @model_validator(mode="after")
    def _window(self) -> AttentionConfig:
        if self.mask == "sliding_window" and self.window is None:
            raise ValueError("mask sliding_window needs window, the number of tokens that a token attends to")
        if self.mask == "causal" and self.window is not None:
            raise ValueError(
                f"window {self.window} needs mask: sliding_window; mask causal attends to all tokens before"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads, for every variant."""
        return 1 if self.variant == "mqa" else self.num_kv_heads or self.num_heads


class RopeScalingConfig(Section):
    """Slower rotation, for sequences longer than those of the training; as in transformers."""

    rope_type: Literal["linear", "llama3"] = key(
        "linear: all frequencies divided by `factor`; llama3: only the low ones, with a smooth transition."
    )
    factor: float = key("Divisor of the frequencies.", ge=1)
    low_freq_factor: float | None = opt(
        None, "llama3: dimensions that turn fewer times than this in the original length are fully scaled.", gt=0
    )
    high_freq_factor: float | None = opt(
        None, "llama3: dimensions that turn more times than this in the original length are not scaled.", gt=0
    )
    original_max_position_embeddings: int | None = opt(None, "llama3: the original length, in tokens.", ge=1)

    @model_validator(mode="after")
    def _keys_of_the_type(self) -> RopeScalingConfig:
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        given = [name for name in names if getattr(self, name) is not None]
        if self.rope_type == "linear" and given:
            raise ValueError(f"rope_type linear has no {', '.join(given)}: remove it, or set rope_type: llama3")
        if self.rope_type == "llama3":
            if missing := [name for name in names if name not in given]:
                raise ValueError(f"rope_type llama3 needs {', '.join(missing)}")
            assert self.low_freq_factor is not None
            assert self.high_freq_factor is not None
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"low_freq_factor {self.low_freq_factor:g} should be below "
                    f"high_freq_factor {self.high_freq_factor:g}"
                )
        return self


class PositionalConfig(Section):
    encoding: Literal["rope", "alibi", "sinusoidal", "learned", "none"] = opt("rope", "Position encoding.")
    rope_base: float = opt(10000.0, "Base of the rotary frequencies.", gt=0)
    rope_scaling: RopeScalingConfig | None = opt(None, "How rotary frequencies are scaled for longer sequences.")

    @model_validator(mode="after")
    def _scales_what_is_there(self) -> PositionalConfig:
        if self.rope_scaling is not None and self.encoding != "rope":
            raise ValueError(f"rope_scaling needs encoding: rope, but encoding is {self.encoding}")
        return self


class FeedForwardConfig(Section):
    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("d_ff", "expansion")),)

    variant: Literal["swiglu", "geglu", "mlp"] = opt(
        "swiglu", "swiglu: gated by SiLU; geglu: gated by GELU; mlp: two projections and an activation."
    )
    d_ff: int | None = opt(None, "Hidden width; from `expansion` when not given.", ge=1)
    expansion: float | None = opt(
        None,
        "Hidden width over d_model: 4 for mlp and 8/3 for swiglu and geglu when not given (rounded up to 64).",
        gt=0,
    )
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] | None = opt(
        None, "gelu_tanh, which is GPT-2's, when not given; swiglu has silu, geglu gelu or gelu_tanh, mlp any."
    )
    bias: bool = opt(False, "Biases in the projections.")
    dropout: float = opt(0.0, "Dropout on the output.", ge=0, lt=1)

    @model_validator(mode="after")
    def _activation_fits(self) -> FeedForwardConfig:
        if self.variant == "swiglu" and self.activation not in (None, "silu"):
            raise ValueError(f"swiglu is gated by silu; activation {self.activation} needs variant: mlp")
        if self.variant == "geglu" and self.activation not in (None, "gelu", "gelu_tanh"):
            raise ValueError(f"geglu is gated by gelu or gelu_tanh; activation {self.activation} needs variant: mlp")
        return self

    @property
    def activation_name(self) -> str:
        """The activation, or its default for the variant."""
        return self.activation or ("silu" if self.variant == "swiglu" else "gelu_tanh")


class NormConfig(Section):
    type: Literal["rmsnorm", "layernorm"] = opt("rmsnorm", "The normalisation of each sublayer and at the end.")
    eps: float = opt(1e-5, "Added to the variance.", gt=0)
    placement: Literal["pre", "post", "sandwich"] = opt(
        "pre",
        "pre: before each sublayer, x + f(norm(x)); post: after the residual, norm(x + f(x)), and none at the end; "
        "sandwich: before and after, x + norm(f(norm(x))).",
    )


class DecoderConfig(Section):
    """A decoder-only transformer."""

    name: Literal["decoder"] = opt("decoder", "A decoder that llmtrain builds.")
    preset: PresetName | None = opt(None, "Shape of a known model; keys that are given beside it win, at any depth.")
    init_from: str | None = opt(
        None,
        "Model to start from: a run, a checkpoint or a model folder. Keys of model that are not given are taken from "
        "it; given keys must agree with it.",
        min_length=1,
        json_schema_extra=LOCAL,
    )
    lora: LoraConfig | None = opt(None, "Train adapters instead of all weights; needs init_from.")
    vocab_size: int | None = opt(
        None, "Size of the vocabulary; the tokenizer's when not given, and checked against it when given.", ge=2
    )
    max_seq_len: int = opt(2048, "The longest sequence that the model takes, in tokens.", ge=1)
    d_model: int = opt(512, "Width of the residual stream.", ge=1)
    num_layers: int = opt(6, "Number of blocks.", ge=1)
    dropout: float = opt(0.0, "Dropout on the embeddings and on each attention output.", ge=0, lt=1)
    tie_embeddings: bool = opt(True, "Use the embedding table as the output projection.")
    parallel_layers: bool = opt(
        False, "Compute attention and feed-forward side by side, from the same normalised input, as in GPT-J and PaLM."
    )
    init_std: float = opt(0.02, "Standard deviation of the initial weights.", gt=0)
    residual_scaled_init: bool = opt(True, "Divide the std of projections into the residual by sqrt(2 num_layers).")
    attention: AttentionConfig = AttentionConfig()
    positional: PositionalConfig = PositionalConfig()
    ffn: FeedForwardConfig = FeedForwardConfig()
    norm: NormConfig = NormConfig()

    @model_validator(mode="before")
    @classmethod
    def _completed_by_the_preset(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _tunes_what_is_there(self) -> DecoderConfig:
        if self.lora is not None:
            self.lora.check_inside(init_from=self.init_from)
        return self

    @model_validator(mode="after")
    def _fits(self) -> DecoderConfig:
        if self.attention.head_dim is None and self.d_model % self.attention.num_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by attention.num_heads {self.attention.num_heads}: "
                "change one of them, or give attention.head_dim"
            )
        if self.positional.encoding == "rope" and self.key_dim % 2:
            raise ValueError(f"rope rotates pairs of dimensions, but the head_dim {self.head_dim} is odd")
        return self

    @property
    def knows_max_seq_len(self) -> bool:
        """True if max_seq_len is known before init_from is opened, which may have another."""
        return self.init_from is None or "max_seq_len" in self.model_fields_set

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.attention.head_dim or self.d_model // self.attention.num_heads

    @property
    def key_dim(self) -> int:
        """Real numbers in a query or key of a head: complex attention has the real parts, then the imaginary parts."""
        return self.head_dim * (2 if self.attention.variant == "complex" else 1)

    @property
    def d_ff(self) -> int:
        """Hidden width of the feed-forward layer."""
        if self.ffn.d_ff is not None:
            return self.ffn.d_ff
        expansion = self.ffn.expansion or (4.0 if self.ffn.variant == "mlp" else 8 / 3)
        return -(-int(expansion * self.d_model) // 64) * 64
