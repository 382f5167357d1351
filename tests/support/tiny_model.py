"""A model folder with a tokenizer beside it, made in a moment: what `generate` and the Python API are tested with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmtrain.data.tokenizers import train_bpe
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from tests.support.tiny import tiny_config

TEXT = "def f(x):\n    return x + 1\n\n\ndef g(x):\n    return x - 1\n" * 20


def write_tiny_model(folder: Path, **changes: Any) -> Decoder:
    """Writes a decoder of 2 layers that was trained on nothing, with a tokenizer of 278 tokens; returns it.

    `changes` are keys of its config.
    """
    tokenizer = train_bpe([TEXT], vocab_size=300)
    tokenizer.save(folder.parent / f"{folder.name}-tokenizer")
    torch.manual_seed(0)
    decoder = Decoder(tiny_config(**changes), tokenizer.vocab_size).eval()
    write_model_folder(
        folder,
        config=decoder.config,
        vocab_size=tokenizer.vocab_size,
        state_dict=decoder.state_dict(),
        tokenizer_folder=folder.parent / f"{folder.name}-tokenizer",
        eos_id=tokenizer.eos_id,
    )
    return decoder
