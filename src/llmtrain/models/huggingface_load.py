"""From a config to a `HuggingFaceModel`: fetch, build or load, quantize, add adapters.

Weights that are trained are float32, and computed in bfloat16 under bf16-mixed: that is, with float32 master weights
and moments in the optimizer, in full fine-tuning as with LoRA. Frozen weights need no master, and are bfloat16.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.distributed.engine import computes_bf16
from llmtrain.models.hub import fetch_model, fetch_tokenizer
from llmtrain.models.huggingface import HuggingFaceModel
from llmtrain.models.huggingface_parts import why_not_in_parts
from llmtrain.models.lora import add_lora, with_adapter
from llmtrain.models.quantized import Quantized, round_as_quantized

log = logging.getLogger("llmtrain.model")

CPU = torch.device("cpu")


def fetch(config: HuggingFaceConfig) -> tuple[Path, Path]:
    """The folders of model and tokenizer, fetched from the Hub if need be: by one rank, before the others.

    Raises ConfigError or RunError as `hub.fetch_model` does.
    """
    model = fetch_model(
        config.path,
        revision=config.revision,
        local_files_only=config.local_files_only,
        weights=config.init == "pretrained",
        code=config.trust_remote_code,
    )
    own = config.tokenizer is None
    return model, model if own else fetch_tokenizer(str(config.tokenizer), local_files_only=config.local_files_only)


def build_huggingface(
    config: HuggingFaceConfig,
    folder: Path,
    *,
    seed: int,
    precision: str,
    device: torch.device = CPU,
    empty: bool = False,
) -> HuggingFaceModel:
    """The model in `folder` as `config` wants it. `precision` is the resolved one of the trainer.

    `device`: where weights in 4 or 8 bits are made; others are on the CPU. `empty`: weights that can be read tensor by
    tensor are left on the meta device, for `read_in_parts`.

    Raises ConfigError: the folder holds no causal model that transformers knows, tensors are missing or of the wrong
    shape, a LoRA target matches nothing, or this machine cannot quantize.
    """
    if config.quantization != "none":
        check_quantization(config.quantization, device=device)
        if empty:
            raise ConfigError(
                f"model.quantization {config.quantization}: distributed.strategy fsdp cannot cut such weights: take ddp"
            )
    transformers_logging.disable_progress_bar()
    if config.init == "random":
        network = _random(config, folder, seed=seed)
    else:
        dtype = weights_dtype(config, precision=precision)
        quantized = _quantized(config.quantization, precision=precision, device=device)
        network = _empty(config, folder, dtype) if empty else None
        network = network or _pretrained(config, folder, dtype, quantized)
    _check_generation_config(network, folder)
    if config.lora is None:
        return HuggingFaceModel(network)
    if config.quantization != "none" and device.type == "cpu":
        for layer in network.modules():  # else an evaluation brings weights into an order that cannot be trained with
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
    local = Path(config.path).expanduser()
    base = str(local.resolve()) if local.is_dir() else config.path
    torch.manual_seed(seed)
    tuned = add_lora(network, config.lora, base=base)
    tuned.peft_config["default"].revision = config.revision
    return HuggingFaceModel(tuned)


def read_huggingface(
    folder: Path,
    *,
    adapter: Path | None = None,
    quantized: Quantized | None = None,
    device: torch.device,
) -> HuggingFaceModel:
    """The model in `folder`, with the adapter in another folder if one is given: on `device`, in evaluation mode.

    Weights have the dtype that they are stored in, unless `device` cannot compute in it: then float32. `quantized`
    gives the base the values that it has in so few bits, in float32. Raises ConfigError: it is no causal
    model that transformers knows, tensors are missing, or the adapter is another model's.
    """
    transformers_logging.disable_progress_bar()
    dtype = "auto" if quantized is None else torch.float32
    network = _pretrained(HuggingFaceConfig(path=str(folder), local_files_only=True), folder, dtype)
    if quantized is not None:
        round_as_quantized(network, quantized)
    if adapter is not None:
        network = with_adapter(network, adapter)
    model = HuggingFaceModel(network).eval()
    dtype, on_cpu = next(network.parameters()).dtype, device.type == "cpu"
    if (dtype == torch.float16 and on_cpu) or (dtype == torch.bfloat16 and not computes_bf16(str(device))):
        model = model.float()
    return model.to(device)


def weights_dtype(config: HuggingFaceConfig, *, precision: str) -> torch.dtype:
    """What the weights of the base model are kept in."""
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    if precision == "bf16-true":
        return torch.bfloat16
    frozen = config.lora is not None
    return torch.bfloat16 if frozen and precision == "bf16-mixed" else torch.float32


def check_quantization(quantization: str, *, device: torch.device) -> None:
    """ConfigError where this machine cannot hold weights in 4 or 8 bits."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization {quantization} needs bitsandbytes: `pip install 'llmtrain[bnb]'`, or set it to none"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"model.quantization {quantization} runs on cuda and cpu, not on {device.type}: set run.device, or set "
            "it to none"
        )


def quantization_config(quantization: str, *, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """What transformers is told: nf4 with double quantization (QLoRA, arXiv:2305.14314), int8, or None."""
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _quantized(quantization: str, *, precision: str, device: torch.device) -> dict[str, Any]:
    """Arguments for weights in 4 or 8 bits, made on `device`. Products are computed as `precision` says."""
    if quantization == "none":
        return {}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast of each layer
    compute_dtype = {"32": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
    wanted = quantization_config(quantization, compute_dtype=compute_dtype)
    return {"quantization_config": wanted, "device_map": {"": str(device)}}


def _random(config: HuggingFaceConfig, folder: Path, *, seed: int) -> Any:
    described = describe(config, folder)
    torch.manual_seed(seed)
    return from_description(config, described, dtype=torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)


def _empty(config: HuggingFaceConfig, folder: Path, dtype: torch.dtype) -> Any:
    """The model without values, or None where it has to be read whole, which the log says."""
    if config.quantization != "none" or (config.lora and config.lora.begins_with_base):
        return None
    with init_empty_weights(include_buffers=False):
        network = from_description(config, describe(config, folder), dtype=dtype)
    network.tie_weights()
    if why := why_not_in_parts(folder, network):
        log.info("%s: each process reads all the weights before it keeps its part, since %s", config.path, why)
        return None
    if (folder / "generation_config.json").exists():
        network.generation_config = GenerationConfig.from_pretrained(folder)
    return network


def from_description(config: HuggingFaceConfig, described: Any, *, dtype: torch.dtype) -> Any:
    """The network that the config of transformers describes, with random weights. Raises ConfigError if unknown."""
    try:
        return AutoModelForCausalLM.from_config(
            described,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (ValueError, ImportError, KeyError) as error:
        raise _cannot_build(config, error) from error


def _pretrained(
    config: HuggingFaceConfig, folder: Path, dtype: torch.dtype | str, quantized: Mapping[str, Any] | None = None
) -> Any:
    described = describe(config, folder)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=described,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **(quantized or {}),
        )
    except (ValueError, ImportError, KeyError, OSError, RuntimeError) as error:
        raise _cannot_build(config, error) from error
    if missing := sorted(found["missing_keys"]):
        raise ConfigError(
            f"model.path {config.path}: the weights lack {_some(missing)}, which would be drawn at random: "
            "is this a causal language model, and complete?"
        )
    if wrong := sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]):
        raise ConfigError(f"model.path {config.path}: tensors of the wrong shape: {_some(wrong)}")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: tensors that the model does not use: %s", config.path, _some(unused))
    return network


def describe(config: HuggingFaceConfig, folder: Path) -> Any:
    """The config of transformers in a folder. Raises ConfigError if there is none that it knows."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise _cannot_build(config, error) from error


def _cannot_build(config: HuggingFaceConfig, error: Exception) -> ConfigError:
    first = str(error).strip().partition("\n")[0]
    advice = ""
    if "trust_remote_code" in str(error):
        advice = ". If you trust that code: model.trust_remote_code=true with a commit as model.revision"
    return ConfigError(f"model.path {config.path} cannot be built: {first}{advice}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _check_generation_config(network: Any, folder: Path) -> None:
    """What cannot be saved is found now and not after the training: many published ones sample without do_sample."""
    settings = network.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            first = str(error).strip().partition("\n")[0]
            raise ConfigError(f"{folder / 'generation_config.json'} is not valid, correct it: {first}") from error
