"""Reads a decoder from its config and one safetensors file of any origin. Model folders are in folder.py."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import check_tensors, clean_state_dict, decoder_with
from llmtrain.models.layouts import layout_for
from llmtrain.screen import counted

EMBEDDING = "token_embedding.weight"
OUTPUT = "output.weight"


def read_decoder(config: DecoderConfig, file: Path, *, device: str | torch.device = "cpu") -> Decoder:
    """Return the decoder that `config` describes with the weights in `file`, in their dtype and in training mode.

    Tensors may have our names or those of the layout that fits the config (as a checkpoint's `model.safetensors` has),
    with or without the prefixes of torch.compile, DDP and others. If embeddings are tied, one of the two names is
    enough, and two must be equal. The file decides the size of the vocabulary.

    Raises:
        ConfigError: the file cannot be read, or does not have exactly the tensors of such a decoder; it names each.
    """
    try:
        tensors = clean_state_dict(load_file(file))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as safetensors ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    layout = layout_for(config)
    try:
        if layout is not None and EMBEDDING not in tensors and layout.entries(config)[0].theirs in tensors:
            tensors = layout.to_ours(tensors, config)
        if config.tie_embeddings:
            _join_tied(tensors)
        table = tensors.get(EMBEDDING)
        vocab_size = len(table) if table is not None and table.ndim else config.vocab_size or 1
        if config.vocab_size not in (None, vocab_size):
            raise ValueError(
                f"{EMBEDDING} has {counted(vocab_size, 'row')}, but the config's vocab_size is {config.vocab_size}"
            )
        check_tensors(tensors, config, vocab_size, where=str(file))
    except ValueError as error:
        raise ConfigError(str(error) if str(file) in str(error) else f"{file}: {error}") from error
    return decoder_with(tensors, config, vocab_size, device=device)


def _join_tied(tensors: dict[str, Tensor]) -> None:
    """Give a tied embedding the name of the embedding, whichever of the two names the file has."""
    output = tensors.pop(OUTPUT, None)
    if output is None:
        return
    if EMBEDDING in tensors and not torch.equal(tensors[EMBEDDING], output):
        raise ValueError(f"the embeddings are tied, but {OUTPUT} differs from {EMBEDDING}")
    tensors[EMBEDDING] = output
