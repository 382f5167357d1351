"""LoRA through peft, on the three kinds of models.

    LoraConfig ─ target layers that exist ─▶ peft's config ─┬─ add_lora: a PeftModel around a model of transformers
                                                            ├─ add_lora_to_decoder: adapters inside the decoder
                                                            └─ add_lora_to_own: inside a model of the user's own

They share everything else. peft makes the adapters, their names and their files. Trainable tensors are float32,
whatever the dtype of the frozen ones.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrain.config.sections.lora import LoraConfig
from llmtrain.distributed.sharding import take_part, without_values
from llmtrain.errors import ConfigError
from llmtrain.models.fetch import ADAPTER_WEIGHTS
from llmtrain.models.folder import misfits

_TYING_WARNINGS = "(Model has|Model with) `tie_word_embeddings=True`|Input and output embeddings are no longer tied"
"""Warnings of peft about an adapter on a tied weight. They do not apply, since `merge_adapter` unties it."""


def add_lora(network: nn.Module, lora: LoraConfig, *, base: str | None = None) -> Any:
    """Wrap a model of transformers in a PeftModel, in place: base frozen, adapters trainable.

    peft looks for the base model in `base` when it loads the adapter. Raises ConfigError if a target matches nothing.
    """
    head = network.get_output_embeddings()  # type: ignore[operator]
    config = _peft_config(network, lora, head=head)
    config.task_type = "CAUSAL_LM"
    tuned = _wrapped(network, config)
    tuned.peft_config["default"].base_model_name_or_path = base
    _keep_trainable_in_float32(tuned)
    return tuned


def weights_left_out(tuned: nn.Module) -> str | None:
    """Return a sentence about the blocks' matrices that have no adapter; None if all have one.

    A mixture's experts and router are not in linear layers, so `all-linear` does not include them.
    """
    no_matrices = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    inside = [module for module in tuned.modules() if not isinstance(module, no_matrices)]
    matrices = {id(p) for module in inside for p in module.parameters(recurse=False) if p.ndim > 1}
    matrices -= {id(parameter) for parameter in _adapted(tuned)}
    head = getattr(tuned.get_output_embeddings(), "weight", None)  # type: ignore[operator]
    left_out, total = Counter[str](), 0
    for name, parameter in tuned.named_parameters():
        if ".lora_" in name or name.endswith("bias"):  # the biases of experts are matrices too
            continue
        total += parameter.numel()
        if id(parameter) in matrices and parameter is not head and not parameter.requires_grad:
            left_out[re.sub(r"^.*\.\d+\.|base_layer\.", "", name)] += parameter.numel()
    if not left_out:
        return None
    return (
        f"LoRA does not adapt {', '.join(left_out)}: {left_out.total() / total:.0%} of the weights stay as they are. "
        f"model.lora.target_parameters=[{','.join(left_out)}] adapts them too"
    )


def merge_adapter(tuned: Any) -> Any:
    """Return the model of transformers with its adapter merged into its weights, which change in place.

    If output layer and embedding share one weight, and one of them has an adapter, each gets a weight of its own.
    Raises ValueError if a merged weight is not finite.
    """
    network = tuned.get_base_model()
    head, table = network.get_output_embeddings(), network.get_input_embeddings()
    if head.weight is table.weight and any(isinstance(layer, BaseTunerLayer) for layer in (head, table)):
        own = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TYING_WARNINGS)
        return tuned.merge_and_unload(safe_merge=True)


def add_lora_to_decoder(decoder: nn.Module, lora: LoraConfig) -> None:
    """Add adapters to the decoder's linear layers, in place. The decoder is called as before.

    Raises ConfigError if a target matches nothing, or is the output layer, whose weight the loss uses directly.
    """
    if lora.target_parameters:
        raise ConfigError("model.lora.target_parameters: the decoder only has linear layers; remove the key")
    config = _peft_config(decoder, lora, head=getattr(decoder, "output", None))
    if isinstance(getattr(decoder, "output", None), nn.Linear) and "output" in (config.target_modules or ()):
        raise ConfigError(
            "model.lora.target_modules: the decoder's output can have no adapter; remove it from the list"
        )
    _inject(config, decoder)


def add_lora_to_own(network: nn.Module, lora: LoraConfig) -> None:
    """Add adapters to the linear layers of a model of the user's own, in place.

    Raises ConfigError if a target matches nothing, or shares its weight, which merging would change elsewhere.
    """
    uses = Counter(id(parameter) for _, parameter in network.named_parameters(remove_duplicate=False))
    _inject(_peft_config(network, lora, head=None), network)
    for name, layer in network.named_modules():
        if isinstance(layer, BaseTunerLayer) and uses[id(layer.get_base_layer().weight)] > 1:
            raise ConfigError(
                f"model.lora.target_modules: {name} shares its weight with another layer, so it can have no adapter: "
                "list the names of the other linear layers"
            )


def _inject(config: PeftLoraConfig, network: nn.Module) -> None:
    with _placeholders(network):
        inject_adapter_in_model(config, network)
    _keep_trainable_in_float32(network)


@torch.no_grad()
def merged_state_dict(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the model with its adapters merged in, computed on the CPU.

    `tensors` are copies on the CPU: of the adapters (as from `trainable_state_dict`), which are merged into the frozen
    weights of `network`; or of all tensors, if `network` is on the meta device. They may be changed in place.
    """
    merged = without_values(network)
    frozen = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in chain(network.named_parameters(remove_duplicate=False), network.named_buffers())
        if name not in tensors and not parameter.is_meta
    }
    merged.load_state_dict(frozen | dict(tensors), strict=False, assign=True)
    for layer in merged.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in merged.state_dict().items()
        if ".lora_" not in name
    }


def trainable_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return the trained tensors by the module's own names, which are the tensors of an adapter's checkpoint."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def write_adapter(folder: Path, network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Write adapter_config.json and adapter_model.safetensors in peft's format.

    `state_dict` is as `trainable_state_dict` returns it. The network's own state_dict() is not called, since in 4 or 8
    bits it would wait for the GPU at each layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    if unknown := [name for name in state_dict if name not in own]:
        raise ValueError(f"tensors that the model does not have: {', '.join(unknown)}")
    tensors = get_peft_model_state_dict(network, state_dict=dict(state_dict), save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config: Any = network.peft_config["default"]  # type: ignore[index]
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training


def with_adapter(network: nn.Module, folder: Path) -> Any:
    """Wrap a model of transformers in a PeftModel with the adapter in a folder, for inference.

    Raises ConfigError if the adapter does not fit this model exactly, or is of a kind that peft does not know.
    """
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        tuned = _wrapped(network, config)
    except (ValueError, KeyError, TypeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"{folder}: the adapter does not fit its base model: {first}") from error
    read_adapter(folder, tuned)
    return tuned


@torch.no_grad()
def read_adapter(folder: Path, network: nn.Module) -> None:
    """Load the adapter in a folder. Raises ConfigError if it does not fit this model exactly."""
    file = folder / ADAPTER_WEIGHTS
    if not file.exists():
        raise ConfigError(f"{folder}: no {ADAPTER_WEIGHTS} here")
    tensors = load_file(file)
    own = dict(network.named_parameters(remove_duplicate=False))
    expected = get_peft_model_state_dict(network, state_dict=own, save_embedding_layers=False)
    if faults := misfits(tensors, expected):
        raise ConfigError(f"{file} is of another adapter: {'; '.join(faults)}")
    for name, tensor in expected.items():
        take_part(tensor, tensors[name])


@contextmanager
def _placeholders(network: nn.Module) -> Iterator[None]:
    """Replace each parameter on the meta device within the block by one number on the CPU, expanded to its shape.

    peft puts adapters on the device of the base, and on the meta device they would have no initial values.
    """
    replaced = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for module, name, parameter in replaced:
        number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(number, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in replaced:
            placeholder = module._parameters[name]
            assert placeholder is not None
            parameter.requires_grad_(placeholder.requires_grad)
            module._parameters[name] = parameter


def linear_layers(network: nn.Module) -> list[str]:
    """Return the full names of all layers that can take an adapter."""
    return [name for name, module in network.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer can take an adapter. GPT-2's linear layers are transformers' Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _wrapped(network: nn.Module, config: PeftConfig) -> Any:
    config.base_model_name_or_path = None  # peft warns if it is not the folder that was loaded
    with warnings.catch_warnings(), _placeholders(network):  # peft calls transformers by a deprecated name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message=_TYING_WARNINGS)
        return get_peft_model(network, config)


def _adapted(tuned: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the frozen parameters that have an adapter."""
    for module in tuned.modules():
        if isinstance(module, BaseTunerLayer):
            name = getattr(module, "parameter_name", "weight")
            yield getattr(module.get_base_layer(), name)


def _peft_config(network: nn.Module, lora: LoraConfig, *, head: nn.Module | None) -> PeftLoraConfig:
    _check_modules_to_save(network, lora.modules_to_save)
    _check_target_parameters(network, lora.target_parameters)
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(network, lora.target_modules, head=head),
        target_parameters=list(lora.target_parameters) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in network.modules()),
    )


def _targets(network: nn.Module, requested: str | list[str], *, head: nn.Module | None) -> str | list[str]:
    """Return peft's target_modules: a pattern unchanged, else names, in short form if that selects the same layers."""
    modules = dict(network.named_modules())
    linear = linear_layers(network)
    if requested == "all-linear":
        inside = [name for name in linear if modules[name] is not head]
        short = sorted({name.rpartition(".")[2] for name in inside})
        if head is None or all(name in inside or name.rpartition(".")[2] not in short for name in linear):
            return short
        return inside
    if isinstance(requested, str):
        if not any(re.fullmatch(requested, name) for name in linear):
            raise _no_such_layer(requested, linear)
        return requested
    for name in requested:
        if not any(layer == name or layer.endswith(f".{name}") for layer in linear):
            raise _no_such_layer(name, linear)
    return requested


def _no_such_layer(target: str, linear: list[str]) -> ConfigError:
    short = sorted({name.rpartition(".")[2] for name in linear})
    return ConfigError(
        f"model.lora.target_modules: {target!r} matches no linear layer of the model. There are {', '.join(short)} "
        f"(in full for example {linear[0] if linear else 'none'})"
    )


def _check_modules_to_save(network: nn.Module, requested: list[str]) -> None:
    names = [name for name, _ in network.named_modules() if name]
    for name in requested:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            short = sorted({module.rpartition(".")[2] for module in names} - {str(n) for n in range(len(names))})
            raise ConfigError(f"model.lora.modules_to_save: the model has no {name!r}. There are {', '.join(short)}")


def _check_target_parameters(network: nn.Module, requested: list[str]) -> None:
    found = [name for name, parameter in network.named_parameters() if parameter.ndim in (2, 3)]
    for target in requested:
        if not any(name == target or name.endswith(f".{target}") for name in found):
            short = dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in found)
            raise ConfigError(
                f"model.lora.target_parameters: the model has no matrix {target!r}. There are {', '.join(short)}"
            )


def _keep_trainable_in_float32(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
