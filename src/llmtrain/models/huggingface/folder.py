"""Writes and reads the `model/` of a checkpoint of a HuggingFaceModel: an adapter for peft, or a full model.

Both come with the tokenizer, the chat templates and the base's companions, byte for byte. The checkpoint store does
atomic writes and hashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from llmtrain.distributed.sharding import take_part
from llmtrain.errors import ConfigError
from llmtrain.models.companions import copy_companions, copy_tokenizer
from llmtrain.models.fetch import missing_files
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.huggingface.parts import read_in_parts, why_not_in_parts
from llmtrain.models.lora import read_adapter, trainable_state_dict, write_adapter


def checkpoint_tensors(model: HuggingFaceModel) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by the network's own names: with an adapter, only the trainable ones.

    Tied weights are included under each of their names.
    """
    return trainable_state_dict(model.network) if is_adapter(model) else dict(model.network.state_dict(keep_vars=True))


def is_adapter(model: HuggingFaceModel) -> bool:
    """Return whether the base model is frozen and adapters are trained."""
    return hasattr(model.network, "peft_config")


def write_huggingface_folder(
    folder: Path,
    *,
    model: HuggingFaceModel,
    state_dict: Mapping[str, Tensor],
    tokenizer_folder: Path | None,
    base: Path | None = None,
) -> None:
    """Write `state_dict`, as `checkpoint_tensors` returns it, and everything needed to use it.

    `base` is the folder of the model that is fine-tuned. `model` gives names and configuration. Its own tensors are not
    read, since training may change them meanwhile. Raises ValueError if the tensors are not those of such a model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected = checkpoint_tensors(model).keys()
    if expected != state_dict.keys():
        raise ValueError(f"tensors differ from the model's: {', '.join(sorted(expected ^ state_dict.keys()))}")
    if is_adapter(model):
        write_adapter(folder, model.network, state_dict)
    else:
        tensors = {name: tensor.detach() for name, tensor in state_dict.items()}
        model.network.save_pretrained(folder, state_dict=tensors)
    if base is not None:
        copy_companions(base, folder)
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


@torch.no_grad()
def read_huggingface_folder(folder: Path, model: HuggingFaceModel) -> None:
    """Load the tensors that `write_huggingface_folder` wrote into `model`. Raises ConfigError if they do not fit."""
    if is_adapter(model):
        read_adapter(folder, model.network)
        return
    if missing := missing_files(folder, weights=True):
        raise ConfigError(f"{folder} lacks {', '.join(missing)}")
    network = model.network
    if why_not_in_parts(folder, network, exactly=True) is None:
        read_in_parts(folder, network)
        return
    dtype = next(network.parameters()).dtype
    try:
        stored, found = type(network).from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error
    if faults := sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])}):
        raise ConfigError(f"{folder} is of another model: {', '.join(faults)}")
    tensors = stored.state_dict()
    for name, tensor in network.state_dict().items():
        take_part(tensor, tensors[name])
