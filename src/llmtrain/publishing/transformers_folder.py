"""A folder that plain transformers loads: written from a model of it or from the decoder, and opened again for checks.

Tokenizer, chat template, end tokens and generation config go along, and are checked by loading them too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError, RunError
from llmtrain.contracts import TOKENIZER_FILES
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.models.layouts import layout_for, why_no_layout
from llmtrain.publishing.agreement import Logits

GENERATION_CONFIG = "generation_config.json"


def check_has_layout(decoder: Decoder) -> None:
    """ConfigError that names what of this decoder no class of transformers has."""
    if layout_for(decoder.config) is None:
        raise ConfigError(
            "no class of transformers is exactly this model: "
            f"{why_no_layout(decoder.config)}. --format safetensors, onnx and torch-export take any decoder"
        )


def write_decoder(
    folder: Path, decoder: Decoder, *, dtype: torch.dtype, eos_id: int | None, own_names: bool = False
) -> None:
    """The decoder with its weights as `dtype`, in transformers' layout or under its own names; without a tokenizer."""
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
    """A model of transformers, whose weights become `dtype` in place; `one_file`: however large it is."""
    from transformers import GenerationConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    network.config.dtype = dtype
    output, table = network.get_output_embeddings(), network.get_input_embeddings()
    if network.config.tie_word_embeddings and output is not None and output.weight is not table.weight:
        network.config.tie_word_embeddings = False  # the one was trained alone, and would be lost on loading
    network.generation_config = GenerationConfig()  # a published one may be refused by save; its file is copied after
    network.save_pretrained(folder, **({"max_shard_size": "10TB"} if one_file else {}))


def find_tokenizer(folders: Sequence[Path]) -> Path | None:
    """The first of `folders` that has a tokenizer; a chat template alone is none."""
    names = [name for name in TOKENIZER_FILES if name != "chat_template.jinja"]
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def write_companions(folder: Path, *, tokenizer: Path | None, source: Path, eos_ids: Collection[int]) -> None:
    """Tokenizer and chat template, of the folder `tokenizer`; the source's generation config, with all end tokens."""
    if tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, folder / name)
    settings = _json(source / GENERATION_CONFIG) or _json((tokenizer or source) / GENERATION_CONFIG)
    if eos_ids:
        settings["eos_token_id"] = min(eos_ids) if len(eos_ids) == 1 else sorted(eos_ids)
    (folder / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def open_network(folder: Path, *, device: torch.device) -> Logits:
    """The logits of the model in a folder, by transformers alone, in float32. RunError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise RunError(f"the result cannot be loaded by transformers: {error}") from error
    if faults := sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])}):
        raise RunError(f"the result does not fit its class in transformers: {', '.join(map(str, faults))}")
    network = network.to(device).eval()

    def logits(ids: Tensor) -> Tensor:
        scores: Tensor = network(input_ids=ids.to(device), use_cache=False).logits
        return scores

    return logits


def check_companions(
    folder: Path, *, source: Path, texts: dict[str, list[int]], eos_ids: Collection[int]
) -> dict[str, Any]:
    """What transformers makes of tokenizer and generation config; `texts` have the ids that the source gives them.

    `source` has its tokenizer. Raises RunError where the result's differs.
    """
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of a decoder that it does not know, whose tokenizer it does
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
        template = AutoTokenizer.from_pretrained(source, local_files_only=True).chat_template
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"the result's tokenizer or generation config cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    for text, ids in texts.items():
        if (theirs := tokenizer(text, add_special_tokens=False).input_ids) != ids:
            raise RunError(
                f"the result's tokenizer makes {theirs[:8]} … of {text[:40]!r}, and the source's {ids[:8]} …"
            )
    if tokenizer.chat_template != template:
        raise RunError("the result has not the chat template of its source")
    declared = settings.eos_token_id
    ends = set(declared if isinstance(declared, list) else [] if declared is None else [declared])
    if ends != set(eos_ids) or tokenizer.eos_token_id not in ends:
        raise RunError(f"the result ends texts at {sorted(ends)}, and its source at {sorted(eos_ids)}")
    return {"eos_token_ids": sorted(ends), "chat_template": tokenizer.chat_template is not None}


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
