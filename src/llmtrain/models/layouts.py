"""The same weights under transformers' names: Llama, Qwen3, Mistral and GPT-2. Files are folder.py's.

A layout knows which of our configs it can hold, the `config.json` that goes with one, and a table that says for each
tensor of theirs of which tensors of ours it is made. Everything else follows from the table, in both directions and
without arithmetic on weights, so a round trip gives back every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.model import DecoderConfig

StateDict = dict[str, Tensor]

TIED_OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: ours, each transposed if asked, concatenated along the last dimension of the result."""

    theirs: str
    ours: tuple[str, ...]
    transpose: bool = False
    sizes: tuple[int, ...] = ()
    """Widths of the parts where there are several."""


@dataclass(frozen=True)
class Layout:
    """One architecture of transformers."""

    model_type: str
    """As in `config.json`."""
    architecture: str
    unfit: Callable[[DecoderConfig], str | None]
    """Why a config cannot be held, naming the feature; None when it can."""
    entries: Callable[[DecoderConfig], list[Entry]]
    write_config: Callable[[DecoderConfig, int], dict[str, Any]]
    """`config.json` for a config and a vocabulary size."""
    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    """The inverse, for folders that others wrote; ConfigError names what we do not have."""

    def to_theirs(self, state_dict: Mapping[str, Tensor], config: DecoderConfig) -> StateDict:
        """Our tensors under their names; of some tensors, those of theirs that are made of them."""
        theirs = {}
        for entry in self.entries(config):
            if not any(name in state_dict for name in entry.ours):
                continue
            parts = [state_dict[name].t() if entry.transpose else state_dict[name] for name in entry.ours]
            theirs[entry.theirs] = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).contiguous()
        return theirs

    def to_ours(self, state_dict: Mapping[str, Tensor], config: DecoderConfig) -> StateDict:
        """Their tensors under our names; what we have no name for keeps its own, for the reader to complain about.

        Raises:
            ValueError: a tensor is missing.
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
    """The layout that holds this model exactly, if there is one."""
    return next((layout for layout in LAYOUTS if layout.unfit(config) is None), None)


def why_no_layout(config: DecoderConfig) -> str:
    """For each layout, the feature of `config` that keeps it from being written that way."""
    return "; ".join(f"{layout.model_type}: {layout.unfit(config)}" for layout in LAYOUTS if layout.unfit(config))


def layout_named(model_type: str) -> Layout | None:
    """The layout of a `model_type`."""
    return next((layout for layout in LAYOUTS if layout.model_type == model_type), None)


def _drop_tied_output(state_dict: StateDict, *, embedding: str) -> None:
    """Takes out the alias that some writers keep of a tied embedding, which must be equal to it."""
    output = state_dict.pop(TIED_OUTPUT, None)
    table = state_dict.get(embedding)
    if output is not None and table is not None and not torch.equal(output, table):
        raise ValueError(f"the embeddings are tied, but {TIED_OUTPUT} differs from {embedding}")


def _first(*reasons: str | bool | None) -> str | None:
    """The first reason that applies."""
    return next((reason for reason in reasons if isinstance(reason, str)), None)


# ---------------------------------------------------------------------------------------------------------------------
# What none of them has


def _unfit_everywhere(config: DecoderConfig) -> str | None:
    """Features that are ours alone."""
    return _first(
        config.attention.variant == "complex" and "attention.variant complex (it has real queries and keys)",
        config.norm.placement != "pre" and f"norm.placement {config.norm.placement} (it has pre)",
        config.parallel_layers and "parallel_layers (it has none)",
    )


def _sliding(config: DecoderConfig) -> str | bool:
    return config.attention.mask == "sliding_window" and "attention.mask sliding_window (it has causal)"


# ---------------------------------------------------------------------------------------------------------------------
# Llama, Qwen3 and Mistral


def _unfit_for_llama_family(config: DecoderConfig) -> str | None:
    """What neither Llama, Qwen3 nor Mistral has."""
    return _first(
        _unfit_everywhere(config),
        config.norm.type != "rmsnorm" and f"norm.type {config.norm.type} (it has rmsnorm)",
        config.positional.encoding != "rope" and f"positional.encoding {config.positional.encoding} (it has rope)",
        config.ffn.variant != "swiglu" and f"ffn.variant {config.ffn.variant} (it has swiglu)",
    )


def _unfit_for_llama(config: DecoderConfig) -> str | None:
    return _first(
        _unfit_for_llama_family(config),
        config.attention.qk_norm and "attention.qk_norm (it has none)",
        _sliding(config),
    )


def _unfit_for_qwen3(config: DecoderConfig) -> str | None:
    return _first(
        _unfit_for_llama_family(config),
        not config.attention.qk_norm and "no attention.qk_norm (it has it)",
        config.ffn.bias and "ffn.bias (it has none)",
    )


def _unfit_for_mistral(config: DecoderConfig) -> str | None:
    return _first(
        _unfit_for_llama_family(config),
        config.attention.qk_norm and "attention.qk_norm (it has none)",
        config.attention.bias and "attention.bias (it has none)",
        config.ffn.bias and "ffn.bias (it has none)",
    )


def _llama_entries(config: DecoderConfig) -> list[Entry]:
    entries = [Entry("model.embed_tokens.weight", ("token_embedding.weight",))]
    kinds = {"attention": ("self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"], config.attention.bias)}
    kinds["feed_forward"] = ("mlp", ["gate_proj", "up_proj", "down_proj"], config.ffn.bias)
    for layer in range(config.num_layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        entries.append(Entry(f"{theirs}.input_layernorm.weight", (f"{ours}.attention_norm.weight",)))
        entries.append(Entry(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.feed_forward_norm.weight",)))
        for our_part, (their_part, projections, bias) in kinds.items():
            for projection in projections:
                for suffix in ("weight", "bias") if bias else ("weight",):
                    name = f"{projection}.{suffix}"
                    entries.append(Entry(f"{theirs}.{their_part}.{name}", (f"{ours}.{our_part}.{name}",)))
        if config.attention.qk_norm:
            for name in ("q_norm.weight", "k_norm.weight"):
                entries.append(Entry(f"{theirs}.self_attn.{name}", (f"{ours}.attention.{name}",)))
    entries.append(Entry("model.norm.weight", ("final_norm.weight",)))
    if not config.tie_embeddings:
        entries.append(Entry(TIED_OUTPUT, ("output.weight",)))
    return entries


def _write_llama_config(config: DecoderConfig, vocab_size: int) -> dict[str, Any]:
    """Rotary settings stand twice: where transformers 5 looks for them, and where older readers do."""
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
    """The `positional` section of a config of theirs."""
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


def _unfit_for_gpt2(config: DecoderConfig) -> str | None:
    attention, ffn, encoding = config.attention, config.ffn, config.positional.encoding
    return _first(
        _unfit_everywhere(config),
        _sliding(config),
        config.norm.type != "layernorm" and f"norm.type {config.norm.type} (it has layernorm)",
        encoding != "learned" and f"positional.encoding {encoding} (it has learned)",
        ffn.variant != "mlp" and f"ffn.variant {ffn.variant} (it has mlp)",
        ffn.activation not in (None, "gelu_tanh") and f"ffn.activation {ffn.activation} (it has gelu_tanh)",
        not attention.bias and "no attention.bias (it has it)",
        not ffn.bias and "no ffn.bias (it has it)",
        attention.qk_norm and "attention.qk_norm (it has none)",
        attention.kv_heads != attention.num_heads and f"attention.num_kv_heads {attention.kv_heads} (it has mha)",
        config.head_dim * attention.num_heads != config.d_model
        and f"attention.head_dim {config.head_dim} (its heads have d_model / num_heads)",
    )


def _gpt2_entries(config: DecoderConfig) -> list[Entry]:
    """GPT-2 keeps matrices as [in, out], and q, k and v as one."""
    width = config.d_model
    entries = [Entry("transformer.wte.weight", ("token_embedding.weight",))]
    entries.append(Entry("transformer.wpe.weight", ("position_embedding.weight",)))
    for layer in range(config.num_layers):
        theirs, ours = f"transformer.h.{layer}", f"blocks.{layer}"
        qkv = [f"{ours}.attention.{name}_proj" for name in "qkv"]
        for suffix in ("weight", "bias"):
            matrix = suffix == "weight"
            entries += [
                Entry(f"{theirs}.ln_1.{suffix}", (f"{ours}.attention_norm.{suffix}",)),
                Entry(
                    f"{theirs}.attn.c_attn.{suffix}",
                    tuple(f"{name}.{suffix}" for name in qkv),
                    transpose=matrix,
                    sizes=(width,) * 3,
                ),
                Entry(f"{theirs}.attn.c_proj.{suffix}", (f"{ours}.attention.o_proj.{suffix}",), transpose=matrix),
                Entry(f"{theirs}.ln_2.{suffix}", (f"{ours}.feed_forward_norm.{suffix}",)),
                Entry(f"{theirs}.mlp.c_fc.{suffix}", (f"{ours}.feed_forward.up_proj.{suffix}",), transpose=matrix),
                Entry(f"{theirs}.mlp.c_proj.{suffix}", (f"{ours}.feed_forward.down_proj.{suffix}",), transpose=matrix),
            ]
    entries += [Entry(f"transformer.ln_f.{suffix}", (f"final_norm.{suffix}",)) for suffix in ("weight", "bias")]
    if not config.tie_embeddings:
        entries.append(Entry(TIED_OUTPUT, ("output.weight",)))
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
        unfit=_unfit_for_llama,
        entries=_llama_entries,
        write_config=_write_llama_only_config,
        read_config=_read_llama_config,
    ),
    Layout(
        model_type="qwen3",
        architecture="Qwen3ForCausalLM",
        unfit=_unfit_for_qwen3,
        entries=_llama_entries,
        write_config=_write_qwen3_config,
        read_config=_read_qwen3_config,
    ),
    Layout(
        model_type="mistral",
        architecture="MistralForCausalLM",
        unfit=_unfit_for_mistral,
        entries=_llama_entries,
        write_config=_write_mistral_config,
        read_config=_read_mistral_config,
    ),
    Layout(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        unfit=_unfit_for_gpt2,
        entries=_gpt2_entries,
        write_config=_write_gpt2_config,
        read_config=_read_gpt2_config,
    ),
)
