"""Reads a model of transformers from its safetensors files one tensor at a time: each rank its own part.

transformers reads the full model, and changes names and shapes for some models. This file changes nothing, so
`why_not_in_parts` first checks that the files have every tensor with the network's name and shape. If not, transformers
has to read the model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmtrain.distributed.sharding import part_of, rows_of
from llmtrain.errors import ConfigError
from llmtrain.models.fetch import WEIGHTS_FILE, WEIGHTS_INDEX
from llmtrain.models.safetensors_header import read_header


def why_not_in_parts(folder: Path, network: Any, *, exactly: bool = False) -> str | None:
    """Return why `read_in_parts` cannot fill the network; None if it can.

    With `exactly`, tensors in the files that the network lacks are a reason too.
    """
    if getattr(network, "_keep_in_fp32_modules_strict", None):
        return "some of its tensors have a precision of their own"
    try:
        shapes = {name: stored.shape for file in _files(folder) for name, stored in read_header(file).tensors.items()}
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"its files cannot be read ({str(error).partition(chr(10))[0]})"
    expected = {_stored_name(n): tuple(p.shape) for n, p in network.named_parameters() if ".lora_" not in n}
    missing = [name for name in expected if name not in shapes]
    if missing:
        return f"{missing[0]} has another name in its files"
    if wrong := [name for name, shape in expected.items() if shapes[name] != shape]:
        return f"{wrong[0]} has another shape in its files"
    known = {_stored_name(name) for name in network.state_dict()}
    if exactly and (more := [name for name in shapes if name not in known]):
        return f"{more[0]} is not the model's"
    return None


@torch.no_grad()
def read_in_parts(folder: Path, network: Any) -> None:
    """Fill this rank's parts of the network's tensors, except adapters, from the files in `folder`."""
    tensors = {_stored_name(name): tensor for name, tensor in network.state_dict().items() if ".lora_" not in name}
    try:
        for path in _files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # the handle is not iterable
                    if name not in tensors:
                        continue
                    part = part_of(tensors[name])
                    if part.local.numel():
                        found = file.get_slice(name)[rows_of(part)] if part.shape else file.get_tensor(name)
                        part.local.copy_(found)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be read: {str(error).partition(chr(10))[0]}") from error


def _stored_name(name: str) -> str:
    """Return the name of a tensor without peft's additions."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).exists():
        return [folder / WEIGHTS_FILE]
    names = json.loads((folder / WEIGHTS_INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]
