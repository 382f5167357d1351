"""Tiny models of transformers with random weights, of many families, and adapters for them, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmtrain.config.sections.lora import LoraConfig
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import add_lora, trainable_state_dict, write_adapter
from tests.support.chat import CHATML, tiny_chat_tokenizer

VOCAB_SIZE = 64
_SIZE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FFN = {**_SIZE, "intermediate_size": 48}
_GQA = {**_FFN, "num_key_value_heads": 2}
_HEADS = {**_GQA, "head_dim": 8}
_OLD = {"vocab_size": VOCAB_SIZE, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "n_positions": 64}
_GPT = {**_OLD, "n_embd": 32, "n_layer": 2, "n_head": 4}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GQA),
    "qwen2": ("Qwen2Config", _GQA),
    "qwen2-window": ("Qwen2Config", {**_GQA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", _HEADS),
    "mistral": ("MistralConfig", {**_GQA, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", {**_HEADS, "sliding_window": 4, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", {**_HEADS, "sliding_window": 4}),
    "gpt2": ("GPT2Config", _GPT),
    "gpt-j": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", _FFN),
    "phi": ("PhiConfig", _FFN),
    "phi3": ("Phi3Config", _GQA),
    "opt": ("OPTConfig", {**_SIZE, **_OPT}),
    "cohere": ("CohereConfig", {**_GQA, "logit_scale": 0.25}),
    "granite": ("GraniteConfig", {**_GQA, "logits_scaling": 3.0}),
    "olmo2": ("Olmo2Config", _GQA),
    "starcoder2": ("Starcoder2Config", _GQA),
    "stablelm": ("StableLmConfig", _GQA),
    "falcon": ("FalconConfig", _SIZE),
    "mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Config classes and their arguments. Weights are large, so that attention is far from uniform and mistakes show."""
WITHOUT_SDPA = frozenset({"gemma2", "gpt-j"})


def tiny_network(family: str, *, attention: str = "eager", **changes: Any) -> Any:
    """A model of 2 layers, 32 wide, with 64 tokens and the weights of seed 0, in evaluation mode, without dropout."""
    kind, settings = FAMILIES[family]
    config = getattr(transformers, kind)(**{**settings, **changes})
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def tiny_huggingface(family: str = "llama", *, attention: str = "eager", **changes: Any) -> HuggingFaceModel:
    """`tiny_network`, wrapped."""
    return HuggingFaceModel(tiny_network(family, attention=attention, **changes)).eval()


def write_tiny_folder(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """`tiny_network` as a model folder, with a tokenizer of 64 words and a chat template."""
    tiny_network(family, **changes).save_pretrained(folder)
    words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCAB_SIZE)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def write_tiny_chat_folder(
    folder: Path, family: str = "llama", *, template: str | None = CHATML, adds_bos: bool = False, **changes: Any
) -> Path:
    """`tiny_network` as a model folder, with the tokenizer of `tiny_chat_tokenizer` and a context of 128 tokens."""
    tokenizer = tiny_chat_tokenizer(template, adds_bos=adds_bos)
    tokenizer.save_pretrained(folder)
    network = tiny_network(family, **{"vocab_size": len(tokenizer), "max_position_embeddings": 128, **changes})
    network.save_pretrained(folder)
    return folder


def write_tiny_adapter(folder: Path, base: Path, **lora: Any) -> Path:
    """A LoRA adapter that changes what the model in `base` says, without a tokenizer of its own."""
    network = AutoModelForCausalLM.from_pretrained(base)
    tuned = add_lora(network, LoraConfig.model_validate({"r": 4, "alpha": 8, **lora}), base=str(base))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "modules_to_save.default" in name:  # B begins at zero: no change at all
                parameter.add_(torch.randn_like(parameter) * 0.2)
    write_adapter(folder, tuned, trainable_state_dict(tuned))
    return folder
