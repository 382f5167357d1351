"""LoRA through peft, on a model of transformers and on the decoder that is built here.

Which layers get adapters is resolved here against the layers that exist; the adapters themselves, their names and their
files are peft's. Trainable tensors are float32, whatever the frozen ones are.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.lora import LoraConfig
from llmtrain.distributed.sharding import take_part

ADAPTER_FILE = "adapter_model.safetensors"


def add_lora(network: nn.Module, lora: LoraConfig, *, base: str | None = None) -> Any:
    """The PeftModel around a model of transformers, which is changed in place: base frozen, adapters trainable.

    `base` is where peft will look for the base model on loading. Raises ConfigError if a target matches nothing.
    """
    head = network.get_output_embeddings()  # type: ignore[operator]
    config = _peft_config(network, lora, head=head)
    config.base_model_name_or_path = base
    config.task_type = "CAUSAL_LM"
    tuned = _wrapped(network, config)
    tuned.peft_config["default"].base_model_name_or_path = base
    _keep_trainable_in_float32(tuned)
    return tuned


def add_lora_to_decoder(decoder: nn.Module, lora: LoraConfig) -> None:
    """Adapters on the linear layers of the decoder that is built here, in place; what it is called with stays as it is.

    Raises ConfigError if a target matches nothing, or is the output, whose weight the loss uses as it is.
    """
    config = _peft_config(decoder, lora, head=getattr(decoder, "output", None))
    if isinstance(getattr(decoder, "output", None), nn.Linear) and "output" in (config.target_modules or ()):
        raise ConfigError("model.lora.target_modules: the decoder's output takes no adapter; remove it from the list")
    with _stand_ins(decoder):
        inject_adapter_in_model(config, decoder)
    _keep_trainable_in_float32(decoder)


@torch.no_grad()
def merged_state_dict(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model without adapters, with its adapters merged in.

    `tensors`: copies of the adapters (as of `trainable_state_dict`), which go with the frozen weights in `network`; or
    of everything, if `network` is on the meta device. They may change.
    """
    whole = copy.deepcopy(network)
    whole.load_state_dict(dict(tensors), strict=False, assign=any(p.is_meta for p in network.parameters()))
    for layer in whole.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in whole.state_dict().items() if ".lora_" not in name
    }


def trainable_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that are trained, under the module's own names: what a checkpoint of an adapter needs."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def write_adapter(folder: Path, network: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors, as peft loads them; `state_dict` as from the one above."""
    folder.mkdir(parents=True, exist_ok=True)
    own = network.state_dict()
    if unknown := [name for name in state_dict if name not in own]:
        raise ValueError(f"tensors that the model does not have: {', '.join(unknown)}")
    whole = {**own, **state_dict}  # peft picks the adapter's by name, so the frozen ones are not copied
    tensors = get_peft_model_state_dict(network, state_dict=whole, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config: Any = network.peft_config["default"]  # type: ignore[index]
    training, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = training


def with_adapter(network: nn.Module, folder: Path) -> Any:
    """The PeftModel around a model of transformers with the adapter in a folder, to be used and not trained.

    Raises ConfigError if it is not exactly this model's, or of a kind that peft does not know.
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
    """Take over the adapter in a folder. Raises ConfigError if it is not exactly this model's."""
    file = folder / ADAPTER_FILE
    if not file.exists():
        raise ConfigError(f"{folder}: no {ADAPTER_FILE} here")
    tensors = load_file(file)
    wanted = get_peft_model_state_dict(network, save_embedding_layers=False)
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} is not the model's" for name in tensors if name not in wanted]
    faults += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if faults:
        raise ConfigError(f"{file} is of another adapter: {'; '.join(faults)}")
    for name, tensor in wanted.items():
        take_part(tensor, tensors[name])


@contextmanager
def _stand_ins(network: nn.Module) -> Iterator[None]:
    """In this block one number stands for each parameter that is on the meta device.

    peft puts adapters where the base is; there they would lose the values that they begin with.
    """
    held = [
        (module, name, parameter)
        for module in network.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    for module, name, parameter in held:
        number = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        module._parameters[name] = nn.Parameter(number, requires_grad=parameter.requires_grad)
    try:
        yield
    finally:
        for module, name, parameter in held:
            stand_in = module._parameters[name]
            assert stand_in is not None
            parameter.requires_grad_(stand_in.requires_grad)
            module._parameters[name] = parameter


def linear_layers(network: nn.Module) -> list[str]:
    """The full names of all layers that can take an adapter."""
    return [name for name, module in network.named_modules() if is_linear(module)]


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can take an adapter. GPT-2 has transformers' Conv1D for its linear layers."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _wrapped(network: nn.Module, config: PeftConfig) -> Any:
    with warnings.catch_warnings(), _stand_ins(network):  # peft asks transformers by a name that is going away
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(network, config)


def _peft_config(network: nn.Module, lora: LoraConfig, *, head: nn.Module | None) -> PeftLoraConfig:
    _check_modules_to_save(network, lora.modules_to_save)
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(network, lora.target_modules, head=head),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in network.modules()),
    )


def _targets(network: nn.Module, wanted: str | list[str], *, head: nn.Module | None) -> str | list[str]:
    """What peft is told: a pattern as it is, else names, the short ones where they say the same."""
    modules = dict(network.named_modules())
    linear = linear_layers(network)
    if wanted == "all-linear":
        inside = [name for name in linear if modules[name] is not head]
        short = sorted({name.rpartition(".")[2] for name in inside})
        if head is None or all(name in inside or name.rpartition(".")[2] not in short for name in linear):
            return short
        return inside
    if isinstance(wanted, str):
        if not any(re.fullmatch(wanted, name) for name in linear):
            raise _no_such_layer(wanted, linear)
        return wanted
    for name in wanted:
        if not any(layer == name or layer.endswith(f".{name}") for layer in linear):
            raise _no_such_layer(name, linear)
    return wanted


def _no_such_layer(wanted: str, linear: list[str]) -> ConfigError:
    short = sorted({name.rpartition(".")[2] for name in linear})
    return ConfigError(
        f"model.lora.target_modules: {wanted!r} matches no linear layer of the model. There are {', '.join(short)} "
        f"(in full for example {linear[0] if linear else 'none'})"
    )


def _check_modules_to_save(network: nn.Module, wanted: list[str]) -> None:
    names = [name for name, _ in network.named_modules() if name]
    for name in wanted:
        if not any(module == name or module.endswith(f".{name}") for module in names):
            short = sorted({module.rpartition(".")[2] for module in names} - {str(n) for n in range(len(names))})
            raise ConfigError(f"model.lora.modules_to_save: the model has no {name!r}. There are {', '.join(short)}")


def _keep_trainable_in_float32(network: nn.Module) -> None:
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
