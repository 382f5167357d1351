"""Counts a model's parameters by the part of the model that they belong to."""

from __future__ import annotations

from torch import nn

_PARTS_BY_WORD = (
    ("adapters", ("lora_",)),
    ("norms", ("norm", "ln_", "layernorm")),
    ("embedding", ("embed", "wte", "wpe")),
    ("attention", ("attn", "attention")),
    ("feed_forward", ("feed_forward", "mlp", "ffn", "experts", "moe", "fc1", "fc2")),
)
"""Words in the names of layers, in our decoder and in the models of transformers. The first match counts."""
_HEADS = ("output", "lm_head", "embed_out")


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters of each part; tied weights count once, as embedding."""
    counts = {"embedding": 0, "attention": 0, "feed_forward": 0, "norms": 0, "head": 0, "adapters": 0, "other": 0}
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    return {part: count for part, count in counts.items() if count or part not in ("adapters", "other")}


def _part_of(name: str) -> str:
    words = name.split(".")
    if "lora_" not in name and any(word in _HEADS for word in words):
        return "head"
    for part, marks in _PARTS_BY_WORD:
        if any(mark in word for mark in marks for word in words):
            return part
    return "other"
