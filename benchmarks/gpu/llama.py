"""Llamas with random weights in the format of transformers, written where a run or a peer is to tune them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gpu.setting import Setting

LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
}
TINY = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def llama_config(shape: dict[str, Any]) -> Any:
    """Return the config of transformers; 0 ends a document."""
    return LlamaConfig(**{"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, **shape})


def new_llama(shape: dict[str, Any], *, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a model with random weights, which are drawn on `device`."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(llama_config(shape))
    finally:
        torch.set_default_dtype(before)


def write_llama(folder: Path, shape: dict[str, Any], setting: Setting, *, dtype: torch.dtype) -> Path:
    """Write a model and a tokenizer of words into `folder`, unless it is there already."""
    if not (folder / "tokenizer.json").exists():
        new_llama(shape, device=setting.device, dtype=dtype).save_pretrained(folder)
        words = {"</s>": 0, **{f"w{number}": number for number in range(1, shape["vocab_size"])}}
        tokenizer = Tokenizer(WordLevel(words, unk_token="</s>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="</s>", pad_token="</s>")
        fast.save_pretrained(folder)
        setting.forget()
    return folder
