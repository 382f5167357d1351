"""Tiny decoders and batches for tests: milliseconds to build and run, with every feature on if asked."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.models.decoder.decoder import Decoder

TINY_VOCAB_SIZE = 61
"""Odd on purpose: no alignment hides a mistake."""


def tiny_config(**changes: Any) -> DecoderConfig:
    """A decoder of 2 layers, 32 wide, 4 heads, for up to 64 tokens; `changes` are keys of the config.

    Sections are merged, so `tiny_config(attention={"qk_norm": True})` still has 4 heads. The initial weights are ten
    times larger than usual, so that attention is far from uniform and mistakes in it show.
    """
    settings: dict[str, Any] = {
        "max_seq_len": 64,
        "d_model": 32,
        "num_layers": 2,
        "init_std": 0.2,
        "attention": {"num_heads": 4},
        "ffn": {"d_ff": 48},
    }
    for key, value in changes.items():
        both_sections = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = settings[key] | value if both_sections else value
    return DecoderConfig.model_validate(settings)


def tiny_decoder(**changes: Any) -> Decoder:
    """A decoder of `tiny_config(**changes)` with the weights of seed 0, in evaluation mode."""
    torch.manual_seed(0)
    return Decoder(tiny_config(**changes), TINY_VOCAB_SIZE).eval()


def decoder_variants() -> dict[str, dict[str, Any]]:
    """By name, changes for `tiny_config` that go through all combinations of the decoder's parts."""
    attention: dict[str, dict[str, Any]] = {"mha": {"variant": "mha"}, "gqa": {"variant": "gqa", "num_kv_heads": 2}}
    variants = {}
    for heads, encoding, norm, ffn, qk_norm in itertools.product(
        attention, ["rope", "learned"], ["rmsnorm", "layernorm"], ["swiglu", "mlp"], [False, True]
    ):
        name = f"{heads}-{encoding}-{norm}-{ffn}" + ("-qk_norm" if qk_norm else "")
        variants[name] = {
            "attention": {**attention[heads], "qk_norm": qk_norm, "bias": ffn == "mlp"},
            "positional": {"encoding": encoding},
            "norm": {"type": norm},
            "ffn": {"variant": ffn, "bias": ffn == "mlp"},
        }
    return variants


def random_batch(
    vocab_size: int = TINY_VOCAB_SIZE,
    *,
    batch_size: int = 2,
    seq_len: int = 16,
    num_documents: int | None = None,
    ignored_fraction: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Random tokens and their successors; cut into documents, and with labels left out, if asked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < ignored_fraction] = IGNORE_INDEX
    batch = Batch(input_ids=tokens[:, :-1].clone(), labels=labels)
    if num_documents is not None:
        ids = torch.randint(num_documents, (batch_size, seq_len), generator=generator, dtype=torch.int32)
        batch["document_ids"] = ids.sort(dim=-1).values
    return batch
