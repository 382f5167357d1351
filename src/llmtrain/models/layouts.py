"""Layouts: a decoder's weights under transformers' names for Llama, Qwen3, Mistral and GPT-2. Files are in folder.py.

A layout knows which decoder configs fit into it, their `config.json`, and a table that maps each tensor of transformers
("theirs") to the decoder's tensors ("ours") from which it is built. Both directions follow from the table without
arithmetic on weights, so a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.errors import ConfigError

StateDict = dict[str, Tensor]

TIED_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of theirs, made of ours: transposed if `transpose`, then concatenated along the last dimension."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    sizes: tuple[int, ...] = ()
    """Sizes of our tensors in the last dimension of theirs, if there are several."""


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers."""

    model_type: str
    """Its `model_type` in `config.json`."""
    architecture: str
    required: Mapping[str, str | bool]
    """Values that keys of a config must have to fit, besides those of `REQUIRED_BY_ALL`."""
    sliding_window: bool
    """True if attention may have a window."""
    entries: Callable[[DecoderConfig], list[TensorEntry]]
    write_config: Callable[[DecoderConfig, int], dict[str, Any]]
    """Returns `config.json` for a config and a vocabulary size."""
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    """Reads the config from a `config.json` of transformers. Raises ConfigError for a feature that is not supported."""
    other_misfit: Callable[[DecoderConfig], str | None] = lambda _: None
    """Returns a feature of a config that does not fit and that `required` cannot express; None if there is none."""

    def misfit(self, config: DecoderConfig) -> str | None:
        """Return a feature of a config that does not fit into the layout; None if the config fits."""
        if config.attention.variant == "complex":
            return "attention.variant complex (it has real queries and keys)"
        if config.attention.mask == "sliding_window" and not self.sliding_window:
            return "attention.mask sliding_window (it has causal)"
        for key, value in {**REQUIRED_BY_ALL, **self.required}.items():
            found = attrgetter(key)(config)
            if found != value and isinstance(value, bool):
                return f"no {key} (it has it)" if value else f"{key} (it has none)"
            if found != value:
                return f"{key} {found} (it has {value})"
        return self.other_misfit(config)

    def to_theirs(self, state_dict: Mapping[str, Tensor], config: DecoderConfig) -> StateDict:
        """Return our tensors as theirs. Given only some of ours, return those of theirs that consist of these."""
        theirs = {}
        for entry in self.entries(config):
            if not any(name in state_dict for name in entry.ours):
                continue
            parts = [state_dict[name].t() if entry.transpose else state_dict[name] for name in entry.ours]
            theirs[entry.theirs] = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).contiguous()
        return theirs

    def to_ours(self, state_dict: Mapping[str, Tensor], config: DecoderConfig) -> StateDict:
        """Return their tensors as ours. An unknown tensor keeps its name, so that the caller can reject it.

        Raises:
            ValueError: a tensor is missing, or has the wrong size.
        """
        rest = dict(state_dict)
        if config.tie_embeddings:
            _drop_tied_output(rest, embedding=self.entries(config)[0].theirs)
        missing = [entry.theirs for entry in self.entries(config) if entry.theirs not in rest]
        if missing:
            raise ValueError(f"missing tensors: {', '.join(missing)}")
        ours = {}
        for entry in self.entries(config):
            tensor = rest.pop(entry.theirs)
            if len(entry.ours) > 1 and tensor.shape[-1] != sum(entry.sizes):
                raise ValueError(
                    f"{entry.theirs} has shape {list(tensor.shape)}; its last dimension should be {sum(entry.sizes)}"
                )
            parts = torch.split(tensor, list(entry.sizes), dim=-1) if len(entry.ours) > 1 else (tensor,)
            for name, part in zip(entry.ours, parts, strict=True):
                ours[name] = (part.t() if entry.transpose else part).contiguous()
        return ours | rest


def layout_for(config: DecoderConfig) -> Layout | None:
    """Return the layout into which this model fits exactly; None if there is none."""
    return next((layout for layout in LAYOUTS if layout.misfit(config) is None), None)


def why_no_layout(config: DecoderConfig) -> str:
    """Return for each layout a feature of `config` that does not fit into it, as one line."""
    return "; ".join(f"{layout.model_type}: {layout.misfit(config)}" for layout in LAYOUTS if layout.misfit(config))


def layout_named(model_type: str) -> Layout | None:
    """Return the layout of a `model_type`; None if there is none."""
    return next((layout for layout in LAYOUTS if layout.model_type == model_type), None)


def _drop_tied_output(state_dict: StateDict, *, embedding: str) -> None:
    """Remove the copy of a tied embedding that some writers store. Raises ValueError if it differs."""
    output = state_dict.pop(TIED_OUTPUT, None)
    table = state_dict.get(embedding)
    if output is not None and table is not None and not torch.equal(output, table):
        raise ValueError(f"the embeddings are tied, but {TIED_OUTPUT} differs from {embedding}")


# ---------------------------------------------------------------------------------------------------------------------
# What a config must have to fit

REQUIRED_BY_ALL: dict[str, str | bool] = {"norm.placement": "pre", "parallel_layers": False}
_LLAMA_FAMILY: dict[str, str | bool] = {
    "norm.type": "rmsnorm",
    "positional.encoding": "rope",
    "ffn.variant": "swiglu",
}
_LLAMA = _LLAMA_FAMILY | {"attention.qk_norm": False}
_QWEN3 = _LLAMA_FAMILY | {"attention.qk_norm": True, "ffn.bias": False}
_MISTRAL = _LLAMA_FAMILY | {"attention.qk_norm": False, "attention.bias": False, "ffn.bias": False}
_GPT2: dict[str, str | bool] = {
    "norm.type": "layernorm",
    "positional.encoding": "learned",
    "ffn.variant": "mlp",
    "attention.bias": True,
    "ffn.bias": True,
    "attention.qk_norm": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# Llama, Qwen3 and Mistral


def _llama_entries(config: DecoderConfig) -> list[TensorEntry]:
    entries = [TensorEntry("model.embed_tokens.weight", ("token_embedding.weight",))]
    kinds = {"attention": ("self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"], config.attention.bias)}
    kinds["feed_forward"] = ("mlp", ["gate_proj", "up_proj", "down_proj"], config.ffn.bias)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        entries.append(TensorEntry(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",)))
        entries.append(TensorEntry(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.feed_forward_norm.weight",)))
        for our_part, (their_part, projections, bias) in kinds.items():
            for projection in projections:
                for suffix in ("weight", "bias") if bias else ("weight",):
                    name = f"{projection}.{suffix}"
                    entries.append(TensorEntry(f"{theirs}.{their_part}.{name}", (f"{ours}.{our_part}.{name}",)))
        if config.attention.qk_norm:
            for name in ("q_norm.weight", "k_norm.weight"):
                entries.append(TensorEntry(f"{theirs}.self_attn.{name}", (f"{ours}.attention.{name}",)))
    entries.append(TensorEntry("model.norm.weight", ("final_norm.weight",)))
    if not config.tie_embeddings:
        entries.append(TensorEntry(TIED_OUTPUT, ("output.weight",)))
    return entries


def _write_llama_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    """Return `config.json` of Llama. Rotary settings are included twice: for transformers 5 and for older readers."""
    theta, scaling = config.positional.rope_base, config.positional.rope_scaling
    scaled = None if scaling is None else scaling.model_dump(mode="json", exclude_none=True)
    return {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "rope_theta": theta,
        "rope_scaling": scaled,
        "rope_parameters": (scaled or {"rope_type": "default"}) | {"rope_theta": theta},
        "attention_bias": config.attention.bias,
        "attention_dropout": config.attention.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def _write_llama_only_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    return _write_llama_config(config, vocab_size) | {"mlp_bias": config.ffn.bias}


def _write_qwen3_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    window = config.attention.window
    sliding = {"use_sliding_window": window is not None, "sliding_window": window, "max_window_layers": 0}
    return _write_llama_config(config, vocab_size) | sliding


def _write_mistral_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    return _write_llama_config(config, vocab_size) | {"sliding_window": config.attention.window}


def _read_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return our `positional` section for their `config.json`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(f"the model scales its rotary positions ({kind}), which is not supported")
    keys = [] if kind == "default" else ["factor"]
    if kind == "llama3":
        keys += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    return {
        "rope_base": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        "rope_scaling": {"rope_type": kind} | {key: rope[key] for key in keys} if keys else None,
    }


def _read_llama_config(raw: Mapping[str, Any], *, qk_norm: bool = False, window: int | None = None) -> DecoderConfig:
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"the model's activation is {raw['hidden_act']}; a {raw['model_type']} has silu here")
    heads = raw["num_attention_heads"]
    kv_heads = raw.get("num_key_value_heads") or heads
    return DecoderConfig.model_validate(
        {
            "vocab_size": raw["vocab_size"],
            "max_seq_len": raw["max_position_embeddings"],
            "d_model": raw["hidden_size"],
            "num_layers": raw["num_hidden_layers"],
            "tie_embeddings": raw.get("tie_word_embeddings", False),
            "init_std": raw.get("initializer_range", 0.02),
            "attention": {
                "variant": "mha" if kv_heads == heads else "gqa",
                "num_heads": heads,
                "num_kv_heads": None if kv_heads == heads else kv_heads,
                "head_dim": raw.get("head_dim"),
                "qk_norm": qk_norm,
                "bias": raw.get("attention_bias", False),
                "dropout": raw.get("attention_dropout", 0.0),
                "mask": "causal" if window is None else "sliding_window",
                "window": window,
            },
            "positional": _read_rope(raw),
            "ffn": {"variant": "swiglu", "d_ff": raw["intermediate_size"], "bias": raw.get("mlp_bias", False)},
            "norm": {"type": "rmsnorm", "eps": raw["rms_norm_eps"]},
        }
    )


def _read_qwen3_config(raw: Mapping[str, Any]) -> DecoderConfig:
    kinds = set(raw.get("layer_types") or ())
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    if window is not None and kinds != {"sliding_attention"} and (kinds or raw.get("max_window_layers", 28) > 0):
        raise ConfigError("some of the model's layers attend in a sliding window and some do not: not supported")
    return _read_llama_config({"head_dim": 128} | dict(raw), qk_norm=True, window=window)


def _read_mistral_config(raw: Mapping[str, Any]) -> DecoderConfig:
    return _read_llama_config(raw, window=raw.get("sliding_window"))


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


def _gpt2_misfit(config: DecoderConfig) -> str | None:
    attention = config.attention
    if config.ffn.activation_name != "gelu_tanh":
        return f"ffn.activation {config.ffn.activation} (it has gelu_tanh)"
    if attention.kv_heads != attention.num_heads:
        return f"attention.num_kv_heads {attention.kv_heads} (it has mha)"
    if config.head_dim * attention.num_heads != config.d_model:
        return f"attention.head_dim {config.head_dim} (its heads have d_model / num_heads)"
    return None


def _gpt2_entries(config: DecoderConfig) -> list[TensorEntry]:
    """Return the entries of GPT-2, which stores matrices as [in, out], and q, k and v as one matrix."""
    width = config.d_model
    entries = [TensorEntry("transformer.wte.weight", ("token_embedding.weight",))]
    entries.append(TensorEntry("transformer.wpe.weight", ("position_embedding.weight",)))
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        qkv = [f"{ours}.attention.{name}_proj" for name in "qkv"]
        for suffix in ("weight", "bias"):
            matrix = suffix == "weight"
            entries += [
                TensorEntry(f"{theirs}.ln_1.{suffix}", (f"{ours}.attention_norm.{suffix}",)),
                TensorEntry(
                    f"{theirs}.attn.c_attn.{suffix}",
                    tuple(f"{name}.{suffix}" for name in qkv),
                    transpose=matrix,
                    sizes=(width,) * 3,
                ),
                TensorEntry(f"{theirs}.attn.c_proj.{suffix}", (f"{ours}.attention.o_proj.{suffix}",), transpose=matrix),
                TensorEntry(f"{theirs}.ln_2.{suffix}", (f"{ours}.feed_forward_norm.{suffix}",)),
                TensorEntry(
                    f"{theirs}.mlp.c_fc.{suffix}", (f"{ours}.feed_forward.up_proj.{suffix}",), transpose=matrix
                ),
                TensorEntry(
                    f"{theirs}.mlp.c_proj.{suffix}", (f"{ours}.feed_forward.down_proj.{suffix}",), transpose=matrix
                ),
            ]
    entries += [TensorEntry(f"transformer.ln_f.{suffix}", (f"final_norm.{suffix}",)) for suffix in ("weight", "bias")]
    if not config.tie_embeddings:
        entries.append(TensorEntry(TIED_OUTPUT, ("output.weight",)))
    return entries


def _write_gpt2_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm.eps,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention.dropout,
        "resid_pdrop": config.ffn.dropout,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
    }


def _read_gpt2_config(raw: Mapping[str, Any]) -> DecoderConfig:
    if raw.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ConfigError(f"the model's activation is {raw['activation_function']}; a gpt2 has gelu_new here")
    for name, value in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if raw.get(name, value) != value:
            raise ConfigError(f"the model sets {name}: {raw[name]}, which is not supported")
    dropout = raw.get("resid_pdrop", 0.1)
    return DecoderConfig.model_validate(
        {
            "vocab_size": raw["vocab_size"],
            "max_seq_len": raw["n_positions"],
            "d_model": raw["n_embd"],
            "num_layers": raw["n_layer"],
            "dropout": dropout,
            "tie_embeddings": raw.get("tie_word_embeddings", True),
            "init_std": raw.get("initializer_range", 0.02),
            "attention": {"num_heads": raw["n_head"], "bias": True, "dropout": raw.get("attn_pdrop", 0.1)},
            "positional": {"encoding": "learned"},
            "ffn": {
                "variant": "mlp",
                "d_ff": raw.get("n_inner") or 4 * raw["n_embd"],
                "activation": "gelu_tanh",
                "bias": True,
                "dropout": dropout,
            },
            "norm": {"type": "layernorm", "eps": raw.get("layer_norm_epsilon", 1e-5)},
        }
    )


LAYOUTS = (
    Layout(
        model_type="llama",
        architecture="LlamaForCausalLM",
        required=_LLAMA,
        sliding_window=False,
        entries=_llama_entries,
        write_config=_write_llama_only_config,
        read_config=_read_llama_config,
    ),
    Layout(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        required=_QWEN3,
        sliding_window=True,
        entries=_llama_entries,
        write_config=_write_qwen3_config,
        read_config=_read_qwen3_config,
    ),
    Layout(
        model_type="mistral",
        architecture="MistralForCausalLM",
        required=_MISTRAL,
        sliding_window=True,
        entries=_llama_entries,
        write_config=_write_mistral_config,
        read_config=_read_mistral_config,
    ),
    Layout(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        required=_GPT2,
        sliding_window=False,
        entries=_gpt2_entries,
        write_config=_write_gpt2_config,
        read_config=_read_gpt2_config,
        other_misfit=_gpt2_misfit,
    ),
)
