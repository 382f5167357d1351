"""Writes a folder that transformers can load, from a model of transformers or a decoder, and loads it for checks.

Tokenizer, chat template, end tokens and generation config are included, and are checked by loading them as well.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.data.tokenizers import make_repeatable
from llmtrain.errors import ConfigError, RunError
from llmtrain.models.companions import copy_companions, copy_tokenizer, has_tokenizer, set_end_tokens
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.models.layouts import layout_for, why_no_layout
from llmtrain.publishing.agreement import Logits


def check_has_layout(decoder: Decoder) -> None:
    """Raise ConfigError if no class of transformers fits the decoder, with the features that do not fit."""
    if layout_for(decoder.config) is None:
        raise ConfigError(
            "no class of transformers is exactly this model: "
            f"{why_no_layout(decoder.config)}. --format safetensors, onnx and torch-export take any decoder"
        )


def write_decoder(
    folder: Path, decoder: Decoder, *, dtype: torch.dtype, eos_id: int | None, own_names: bool = False
) -> None:
    """Write the decoder with weights in `dtype`, in transformers' layout or with its own names; no tokenizer."""
    weights = {name: tensor.to(dtype) for name, tensor in decoder.state_dict().items()}
    write_model_folder(
        folder,
        config=decoder.config,
        vocab_size=decoder.vocab_size,
        state_dict=weights,
        eos_id=eos_id,
        own_names=own_names,
    )


@torch.no_grad()
def write_network(folder: Path, network: Any, *, dtype: torch.dtype, one_file: bool = False) -> None:
    """Write a model of transformers, converted to `dtype` in place. `one_file`: do not split a large model."""
    from transformers.utils import logging as transformers_logging

    from llmtrain.models.huggingface.load import make_generation_config_savable

    transformers_logging.disable_progress_bar()
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    network.config.dtype = dtype
    output, table = network.get_output_embeddings(), network.get_input_embeddings()
    if network.config.tie_word_embeddings and output is not None and output.weight is not table.weight:
        network.config.tie_word_embeddings = False  # they have different weights, and loading would drop one
    make_generation_config_savable(network)
    network.save_pretrained(folder, **({"max_shard_size": "10TB"} if one_file else {}))


def find_tokenizer(folders: Sequence[Path]) -> Path | None:
    """Return the first of `folders` that has a tokenizer, and not only a chat template; None if there is none."""
    return next((folder for folder in folders if has_tokenizer(folder)), None)


def write_companions(folder: Path, *, sources: Sequence[Path], eos_ids: Collection[int]) -> None:
    """Copy a model's companions to `folder`, each from the first of `sources` that has it; set all end tokens."""
    for source in reversed(sources):
        copy_companions(source, folder)
    if (tokenizer := find_tokenizer(sources)) is not None:
        copy_tokenizer(tokenizer, folder)
    set_end_tokens(folder, eos_ids)


def open_network(folder: Path, *, device: torch.device, trust_remote_code: bool = False) -> Logits:
    """Load the model in a folder with transformers only, in float32. Raises RunError if that fails."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RunError(f"the result cannot be loaded by transformers: {error}") from error
    if faults := sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])}):
        raise RunError(f"the result does not fit its class in transformers: {', '.join(map(str, faults))}")
    return logits_of(network.to(device).eval())


def logits_of(network: Any) -> Logits:
    """Return the logits of a model of transformers, computed on its device without a cache."""

    def logits(ids: Tensor) -> Tensor:
        scores: Tensor = network(input_ids=ids.to(network.device), use_cache=False).logits
        return scores

    return logits


def check_companions(
    folder: Path, *, source: Path, texts: dict[str, list[int]], eos_ids: Collection[int]
) -> dict[str, Any]:
    """Check that transformers reads tokenizer and generation config as the source's.

    `source` is the folder of the source's tokenizer; `texts` maps texts to its ids. Raises RunError for a difference.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns about our decoder, of which only the tokenizer is loaded
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        template = AutoTokenizer.from_pretrained(source, local_files_only=True).chat_template
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"the result's tokenizer or generation config cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    make_repeatable(tokenizer.backend_tokenizer)
    for text, ids in texts.items():
        if (theirs := tokenizer(text, add_special_tokens=False).input_ids) != ids:
            raise RunError(
                f"the result's tokenizer encodes {text[:40]!r} as {theirs[:8]} …, but the source's as {ids[:8]} …"
            )
    if tokenizer.chat_template != template:
        raise RunError("the result does not have the chat template of its source")
    declared = settings.eos_token_id
    ends = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if ends != set(eos_ids) or tokenizer.eos_token_id not in ends:
        raise RunError(f"the result ends texts at {sorted(ends)}, and its source at {sorted(eos_ids)}")
    return {"eos_token_ids": sorted(ends), "chat_template": tokenizer.chat_template is not None}
