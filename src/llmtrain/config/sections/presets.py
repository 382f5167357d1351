"""Shapes of known models, by name: `model.preset: gpt2-small`. Keys that are given explicitly win over them.

A preset is a model section without vocabulary, which comes from the tokenizer, and without dropout, which depends on
the data. It is merged under the explicit keys before validation, so that a config that was written with all keys
loads as the same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from llmtrain.config.sections.base import Section

PresetName = Literal[
    "gpt2-small",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
    "llama-60m",
    "llama-125m",
    "llama-350m",
    "llama-1b",
    "smollm2-135m",
    "llama-3.2-1b",
    "llama-3.2-3b",
    "llama-3-8b",
    "qwen3-0.6b",
    "qwen3-1.7b",
    "mistral-7b",
]


def _gpt2(d_model: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    """GPT-2 (Radford et al. 2019)."""
    return {
        "max_seq_len": 1024,
        "d_model": d_model,
        "num_layers": num_layers,
        "tie_embeddings": True,
        "attention": {"variant": "mha", "num_heads": num_heads, "bias": True},
        "positional": {"encoding": "learned"},
        "ffn": {"variant": "mlp", "d_ff": 4 * d_model, "activation": "gelu_tanh", "bias": True},
        "norm": {"type": "layernorm", "eps": 1e-5, "placement": "pre"},
    }


def _llama(
    d_model: int, num_layers: int, num_heads: int, d_ff: int, *, num_kv_heads: int | None = None, **keys: Any
) -> dict[str, Any]:
    """Llama (Touvron et al. 2023, arXiv:2302.13971) and its descendants, which differ in `keys`, section by section."""
    attention: dict[str, Any] = {"variant": "mha", "num_heads": num_heads, "qk_norm": False, "mask": "causal"}
    if num_kv_heads:
        attention |= {"variant": "gqa", "num_kv_heads": num_kv_heads}
    sections: dict[str, dict[str, Any]] = {
        "attention": attention,
        "positional": {"encoding": "rope", "rope_base": 10000.0},
        "ffn": {"variant": "swiglu", "d_ff": d_ff},
        "norm": {"type": "rmsnorm", "eps": 1e-5, "placement": "pre"},
    }
    changed = {name: section | keys.pop(name, {}) for name, section in sections.items()}
    plain = {"max_seq_len": 2048, "d_model": d_model, "num_layers": num_layers, "tie_embeddings": False}
    return plain | changed | keys


_LLAMA_3_2: dict[str, Any] = {
    "max_seq_len": 131072,
    "tie_embeddings": True,
    "positional": {
        "rope_base": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}
_QWEN3: dict[str, Any] = {
    "max_seq_len": 40960,
    "tie_embeddings": True,
    "attention": {"head_dim": 128, "qk_norm": True},
    "positional": {"rope_base": 1000000.0},
    "norm": {"eps": 1e-6},
}
_SMOLLM2: dict[str, Any] = {"max_seq_len": 8192, "tie_embeddings": True, "positional": {"rope_base": 100000.0}}
_LLAMA_3: dict[str, Any] = {"max_seq_len": 8192, "positional": {"rope_base": 500000.0}}
_MISTRAL: dict[str, Any] = {"max_seq_len": 32768, "attention": {"mask": "sliding_window", "window": 4096}}

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # Their sizes with a vocabulary of 32,000 are 58M, 134M, 368M and 1.3B.
    "llama-60m": _llama(512, 8, 8, 1376),
    "llama-125m": _llama(768, 12, 12, 2048),
    "llama-350m": _llama(1024, 24, 16, 2736),
    "llama-1b": _llama(2048, 24, 16, 5504),
    "smollm2-135m": _llama(576, 30, 9, 1536, num_kv_heads=3, **_SMOLLM2),
    "llama-3.2-1b": _llama(2048, 16, 32, 8192, num_kv_heads=8, **_LLAMA_3_2),
    "llama-3.2-3b": _llama(3072, 28, 24, 8192, num_kv_heads=8, **_LLAMA_3_2),
    "llama-3-8b": _llama(4096, 32, 32, 14336, num_kv_heads=8, **_LLAMA_3),
    "qwen3-0.6b": _llama(1024, 28, 16, 3072, num_kv_heads=8, **_QWEN3),
    "qwen3-1.7b": _llama(2048, 28, 16, 6144, num_kv_heads=8, **_QWEN3),
    "mistral-7b": _llama(4096, 32, 32, 14336, num_kv_heads=8, **_MISTRAL),
}

DEPENDENT = {
    "variant": ("num_kv_heads", "activation"),
    "mask": ("window",),
    "encoding": ("rope_base", "rope_scaling"),
    "expansion": ("d_ff",),
    "rope_type": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Keys of a preset that do not apply once the key that they belong to is given another value."""


def with_preset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a model section completed by its preset; unchanged without one, or with an unknown one."""
    name = values.get("preset")
    return merge_under(values, PRESETS[name]) if isinstance(name, str) and name in PRESETS else values


def merge_under(explicit: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    """Return `explicit` and the keys that only `preset` has, section by section; a key given as null is given."""
    changed = [key for key in DEPENDENT if key in explicit and explicit[key] != preset.get(key)]
    left_out = {name for key in changed for name in DEPENDENT[key]}
    merged = dict(explicit)
    for key, value in preset.items():
        given = merged.get(key)
        if isinstance(given, Section):
            given = given.model_dump(exclude_unset=True)
        if isinstance(value, Mapping) and isinstance(given, Mapping):
            merged[key] = merge_under(given, value)
        elif key not in explicit and key not in left_out:
            merged[key] = value
    return merged
