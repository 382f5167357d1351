"""Writes the folder of a model of the user's own, for `export` and `merge`, and loads it again for their checks."""

from __future__ import annotations

from pathlib import Path

import torch

from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.models.own_model import OwnModel, read_own_model, write_own_folder
from llmtrain.publishing.agreement import Logits


def write_own(folder: Path, model: OwnModel, *, dtype: torch.dtype) -> None:
    """Write the model with weights in `dtype`; no tokenizer."""
    weights = {name: tensor.to(dtype) for name, tensor in model.saved_tensors().items()}
    write_own_folder(folder, model=model, state_dict=weights, tokenizer_folder=None)


def open_own(folder: Path, config: OwnModelConfig, *, device: torch.device) -> Logits:
    """Load the model in a folder, in float32."""
    model = read_own_model(folder, config).to(device).float().eval()
    return lambda ids: model.logits(ids.to(device))
