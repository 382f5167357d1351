"""A decoder's model folder: weights in safetensors, config.json, tokenizer, generation_config.json. No pickle.

If a layout of transformers fits the architecture, the folder has that layout, and transformers and all tools that read
its format can load it. Otherwise the tensors have our own names, and `model_type` is `llmtrain-decoder`. config.json
always has our own DecoderConfig under `llmtrain`, so that reading back is exact. The checkpoint store does atomic
writes, hashes and fsync.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.errors import ConfigError
from llmtrain.models.companions import copy_tokenizer
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import WEIGHTS_FILE, WEIGHTS_INDEX
from llmtrain.models.layouts import layout_for, layout_named

OWN_MODEL_TYPE = "llmtrain-decoder"
WRAPPER_NAMES = frozenset({"_orig_mod", "module", "_forward_module", "_checkpoint_wrapped_module"})
"""Parts that torch.compile, DDP, Fabric and activation checkpointing add to the names of parameters."""


def clean_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors under their names without wrappers. Raises ValueError if two names become equal."""
    clean: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)
        if bare in clean:
            raise ValueError(f"two tensors would be named {bare}")
        clean[bare] = tensor
    return clean


def write_model_folder(
    folder: Path,
    *,
    config: DecoderConfig,
    vocab_size: int,
    state_dict: Mapping[str, Tensor],
    tokenizer_folder: Path | None = None,
    eos_id: int | None = None,
    own_names: bool = False,
) -> None:
    """Write a decoder's weights and everything needed to use them. Files of the same names are replaced.

    With `own_names`, tensors have the decoder's own names, even if a layout of transformers fits.

    Raises:
        ValueError: `state_dict` does not have exactly the tensors of such a decoder.
    """
    state_dict = clean_state_dict(state_dict)
    check_tensors(state_dict, config, vocab_size, where="the state dict")
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS_FILE, config=config, state_dict=state_dict, own_names=own_names)
    write_description(
        folder,
        config=config,
        vocab_size=vocab_size,
        dtype=common_dtype(state_dict),
        tokenizer_folder=tokenizer_folder,
        eos_id=eos_id,
        own_names=own_names,
    )


def unit_of(name: str) -> str:
    """Return the unit of a tensor: its block or itself. A unit is in one file, since layouts join a block's tensors."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else name


def write_weights(
    file: Path, *, config: DecoderConfig, state_dict: Mapping[str, Tensor], own_names: bool = False
) -> None:
    """Write a decoder's weights, or complete units of them, under the names of the model folder."""
    layout = None if own_names else layout_for(config)
    tensors = dict(state_dict) if layout is None else layout.to_theirs(state_dict, config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def write_description(
    folder: Path,
    *,
    config: DecoderConfig,
    vocab_size: int,
    dtype: torch.dtype,
    tokenizer_folder: Path | None = None,
    eos_id: int | None = None,
    own_names: bool = False,
) -> None:
    """Write a model folder without the weights, whose dtype is `dtype`."""
    layout, named_dtype = None if own_names else layout_for(config), str(dtype).removeprefix("torch.")
    description: dict[str, Any] = {
        "architectures": ["LlmtrainDecoder" if layout is None else layout.architecture],
        "model_type": OWN_MODEL_TYPE if layout is None else layout.model_type,
        "dtype": named_dtype,
        "torch_dtype": named_dtype,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    if layout is not None:
        description |= layout.write_config(config, vocab_size)
    description["llmtrain"] = {"decoder": config.model_dump(mode="json"), "vocab_size": vocab_size}
    _write_json(folder / "config.json", description)
    _write_json(folder / "generation_config.json", {"eos_token_id": eos_id})
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


def read_model_folder(folder: Path, *, device: str | torch.device = "cpu") -> tuple[Decoder, int]:
    """Return the decoder in a folder and its vocabulary size. Weights keep their stored dtype.

    It reads folders from `write_model_folder`, and folders of transformers in a layout that is known here.

    Raises:
        ConfigError: the folder has no such model, or tensors are missing, too many or of the wrong shape.
    """
    config, vocab_size = read_model_config(folder)
    state_dict = read_state_dict(folder, config, vocab_size=vocab_size)
    return decoder_with(state_dict, config, vocab_size, device=device), vocab_size


def decoder_with(
    state_dict: Mapping[str, Tensor], config: DecoderConfig, vocab_size: int, *, device: str | torch.device = "cpu"
) -> Decoder:
    """Return a decoder with these weights, in their dtype. No initial weights are drawn first."""
    with torch.device("meta"):
        decoder = Decoder(config, vocab_size)
    decoder.to(common_dtype(state_dict)).to_empty(device=device)
    decoder.load_state_dict(state_dict)
    return decoder


def read_model_config(folder: Path) -> tuple[DecoderConfig, int]:
    """Return the config and the vocabulary size of the model in a folder."""
    raw = _read_json(folder / "config.json")
    ours = raw.get("llmtrain")
    try:
        if ours is not None:
            return DecoderConfig.model_validate(ours["decoder"]), int(ours["vocab_size"])
        layout = layout_named(str(raw.get("model_type")))
        if layout is None:
            raise ConfigError(f"model_type {raw.get('model_type')} is not a decoder that can be built here")
        config = layout.read_config(raw)
        if (reason := layout.misfit(config)) is not None:
            raise ConfigError(f"the model has {reason}")
        return config, int(raw["vocab_size"])
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{folder / 'config.json'}: {key}: {first['msg']}") from error
    except KeyError as error:
        raise ConfigError(f"{folder / 'config.json'}: the key {error} is missing") from error


def declared_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that config.json names for the weights in a folder; float32 if it names none."""
    raw = _read_json(folder / "config.json")
    dtype = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def read_state_dict(folder: Path, config: DecoderConfig, *, vocab_size: int | None = None) -> dict[str, Tensor]:
    """Return the weights in a folder under our names, on the CPU, checked to be exactly those of such a decoder.

    Raises:
        ConfigError: tensors are missing, too many or of the wrong shape, or a file cannot be read; it names them.
    """
    model_type = str(_read_json(folder / "config.json").get("model_type"))
    tensors = clean_state_dict(_load_tensors(folder))
    layout = layout_named(model_type)
    try:
        if layout is not None:
            tensors = layout.to_ours(tensors, config)
        if vocab_size is None:
            vocab_size = read_model_config(folder)[1]
        check_tensors(tensors, config, vocab_size, where=str(folder))
    except ValueError as error:
        raise ConfigError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    return tensors


def check_tensors(tensors: Mapping[str, Tensor], config: DecoderConfig, vocab_size: int, *, where: str) -> None:
    """Raise a ValueError that names every tensor that is missing, too many or of the wrong shape."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Decoder(config, vocab_size).state_dict().items()}
    faults = []
    if missing := [name for name in expected if name not in tensors]:
        faults.append(f"missing tensors: {', '.join(missing)}")
    if extra := [name for name in tensors if name not in expected]:
        faults.append(f"tensors that such a model does not have: {', '.join(extra)}")
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            faults.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}")
    if faults:
        raise ValueError(f"{where}: {'; '.join(faults)}")


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return a line for each tensor by which `tensors` differ from the `expected` ones in name or shape."""
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not the model's" for name in tensors if name not in expected]
    return faults + [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]


def common_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """Return the dtype that all tensors share; float32 if they differ."""
    dtypes = {tensor.dtype for tensor in tensors.values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, from one file or from several with an index."""
    names = [WEIGHTS_FILE]
    if not (folder / WEIGHTS_FILE).exists() and (folder / WEIGHTS_INDEX).exists():
        names = sorted(set(_read_json(folder / WEIGHTS_INDEX)["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{folder / WEIGHTS_INDEX}: {name} is not a file name")
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError as error:
            raise ConfigError(f"{folder}: no {name} here") from error
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{folder / name} cannot be read: {error}") from error
    return tensors


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path.parent} is not a model folder: there is no {path.name} in it") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} should contain an object")
    return content
