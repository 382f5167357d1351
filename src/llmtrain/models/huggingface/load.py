"""Builds a `HuggingFaceModel` from a config: fetch, build or load, quantize, add adapters.

Trained weights are float32 and computed in bfloat16 under bf16-mixed. So full fine-tuning and LoRA both have float32
master weights and optimizer moments. Frozen weights need no master copy and are bfloat16.
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

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.distributed.native_bf16 import choose_compute_dtype, warn_if_emulated, with_computing_dtype
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra
from llmtrain.models.fetch import fetch_model, fetch_tokenizer
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.huggingface.parts import why_not_in_parts
from llmtrain.models.huggingface.quantization import Quantized, keep_stored_layout, round_as_quantized
from llmtrain.models.lora import add_lora, weights_left_out, with_adapter

log = logging.getLogger("llmtrain.model")

CPU = torch.device("cpu")


def fetch(config: HuggingFaceConfig) -> tuple[Path, Path]:
    """Return the folders of the model and the tokenizer, fetched if needed. One rank calls it before the others.

    Raises ConfigError or RunError as `fetch_model` does.
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
    """Build the model in `folder` with the settings of `config`. `precision` is the resolved trainer.precision.

    Weights in 4 or 8 bits are created on `device`, others on the CPU. With `empty`, weights that can be read tensor by
    tensor stay on the meta device, for `read_in_parts`.

    Raises ConfigError if the folder has no causal model that transformers knows, if tensors are missing or have the
    wrong shape, if a LoRA target matches nothing, or if this machine cannot quantize.
    """
    if config.quantization != "none":
        check_quantization(config.quantization, device=device)
        if empty:
            raise ConfigError(
                f"model.quantization {config.quantization}: distributed.strategy fsdp cannot shard such weights: set "
                "distributed.strategy=ddp"
            )
    if empty and config.lora is not None and config.lora.target_parameters:
        raise ConfigError(
            "model.lora.target_parameters: distributed.strategy fsdp cannot shard such parameters: set "
            "distributed.strategy=ddp"
        )
    if config.dtype == "bfloat16" and not precision.startswith("bf16"):  # else the precision was warned about
        warn_if_emulated("model.dtype", "bfloat16", device=device.type, instead="model.dtype=auto or float32")
    transformers_logging.disable_progress_bar()
    if config.init == "random":
        network = _random(config, folder, seed=seed)
    else:
        dtype = weights_dtype(config, precision=precision)
        quantized = _quantized(config.quantization, precision=precision, device=device)
        network = _empty(config, folder, dtype) if empty else None
        network = network or _pretrained(config, folder, dtype, quantized)
    if not precision.startswith("bf16"):
        choose_compute_dtype(network, device)  # layers stored in 4 bits have a compute dtype of their own
    keep_stored_layout(network)
    make_generation_config_savable(network)
    if config.lora is None:
        return HuggingFaceModel(network)
    local = Path(config.path).expanduser()
    base = str(local.resolve()) if local.is_dir() else config.path
    torch.manual_seed(seed)
    tuned = add_lora(network, config.lora, base=base)
    tuned.peft_config["default"].revision = config.revision
    if config.lora.target_modules == "all-linear" and (left_out := weights_left_out(tuned)):
        log.warning(left_out)
    return HuggingFaceModel(tuned)


def read_huggingface(
    folder: Path,
    *,
    adapter: Path | None = None,
    quantized: Quantized | None = None,
    device: torch.device,
    trust_remote_code: bool = False,
) -> HuggingFaceModel:
    """Load the model in `folder`, with `adapter` if one is given, to `device`, in evaluation mode.

    Weights keep their stored dtype, unless `device` does not compute it natively; then they are float32. With
    `quantized`, the base is float32, rounded to the values that it has in 4 or 8 bits. Raises ConfigError if the folder
    has no causal model that transformers knows, if tensors are missing, or if the adapter belongs to another model.
    """
    transformers_logging.disable_progress_bar()
    dtype = "auto" if quantized is None else torch.float32
    config = HuggingFaceConfig(path=str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    network = _pretrained(config, folder, dtype)
    if quantized is not None:
        round_as_quantized(network, quantized)
    # This comes before the adapter, since adding one may compute matrix products.
    keep_stored_layout(network)
    network = with_computing_dtype(HuggingFaceModel(network), device).network
    if adapter is not None:
        network = with_adapter(network, adapter)
    return HuggingFaceModel(network).eval().to(device)


def weights_dtype(config: HuggingFaceConfig, *, precision: str) -> torch.dtype:
    """Return the dtype of the base model's weights."""
    if config.dtype != "auto":
        return torch.float32 if config.dtype == "float32" else torch.bfloat16
    if precision == "bf16-true":
        return torch.bfloat16
    frozen = config.lora is not None
    return torch.bfloat16 if frozen and precision == "bf16-mixed" else torch.float32


def check_quantization(quantization: str, *, device: torch.device) -> None:
    """Raise ConfigError if this machine cannot hold weights in 4 or 8 bits."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization {quantization} needs bitsandbytes: `{install_extra('bnb')}`, or set it to none"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"model.quantization {quantization} runs on cuda and cpu, not on {device.type}: set run.device, or set "
            "it to none"
        )


def quantization_config(quantization: str, *, compute_dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return transformers' settings for nf4 with double quantization (QLoRA, arXiv:2305.14314) or int8; else None."""
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _quantized(quantization: str, *, precision: str, device: torch.device) -> dict[str, Any]:
    """Return the arguments of from_pretrained for weights in 4 or 8 bits on `device`, computed in `precision`."""
    if quantization == "none":
        return {}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every cast of every layer
    compute_dtype = {"32": torch.float32, "16-mixed": torch.float16}.get(precision, torch.bfloat16)
    settings = quantization_config(quantization, compute_dtype=compute_dtype)
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def _random(config: HuggingFaceConfig, folder: Path, *, seed: int) -> Any:
    transformers_config = read_transformers_config(config, folder)
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return network_of(config, transformers_config, dtype=dtype)


def _empty(config: HuggingFaceConfig, folder: Path, dtype: torch.dtype) -> Any:
    """Return the model without values. If each process has to read all weights, log why and return None."""
    if config.quantization != "none" or (config.lora and config.lora.begins_with_base):
        return None
    with init_empty_weights(include_buffers=False):
        network = network_of(config, read_transformers_config(config, folder), dtype=dtype)
    network.tie_weights()
    if why := why_not_in_parts(folder, network):
        log.info("%s: each process reads all the weights before it keeps its shard, since %s", config.path, why)
        return None
    return network


def network_of(config: HuggingFaceConfig, transformers_config: Any, *, dtype: torch.dtype) -> Any:
    """Build the network of a config of transformers, with random weights. Raises ConfigError if it is unknown."""
    try:
        return AutoModelForCausalLM.from_config(
            transformers_config,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (ValueError, ImportError, KeyError) as error:
        raise _cannot_build(config, error) from error


def _pretrained(
    config: HuggingFaceConfig, folder: Path, dtype: torch.dtype | str, quantized: Mapping[str, Any] | None = None
) -> Any:
    transformers_config = read_transformers_config(config, folder)
    try:
        network, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=transformers_config,
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
            f"model.path {config.path}: the weights lack {_some(missing)}, which would be drawn at random: name a "
            "complete causal language model"
        )
    if wrong := sorted(str(key[0] if isinstance(key, tuple) else key) for key in found["mismatched_keys"]):
        raise ConfigError(f"model.path {config.path}: tensors of the wrong shape: {_some(wrong)}")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("%s: tensors that the model does not use: %s", config.path, _some(unused))
    if dtype == torch.float32:
        HuggingFaceModel(network).float()  # weights that are stored in 4 bits are loaded in their own dtype
    return network


def read_transformers_config(config: HuggingFaceConfig, folder: Path) -> Any:
    """Return the config of transformers in a folder. Raises ConfigError if transformers does not know it."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise _cannot_build(config, error) from error


def _cannot_build(config: HuggingFaceConfig, error: Exception) -> ConfigError:
    first = str(error).strip().partition("\n")[0]
    advice = ""
    if "trust_remote_code" in str(error):
        advice = (
            ". If you trust that code: model.trust_remote_code=true with a commit as model.revision, "
            "or, for a command that takes MODEL, --trust-remote-code"
        )
    return ConfigError(f"model.path {config.path} cannot be built: {first}{advice}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def make_generation_config_savable(network: Any) -> None:
    """Change the model's generation settings so that transformers saves them; it rejects many published ones.

    Afterwards the base's generation_config.json, if there is one, replaces the saved file. Sampling settings have no
    effect in a greedy model, and are removed there.
    """
    settings = network.generation_config
    if settings is None:
        return
    if not settings.do_sample:
        for name in ("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError as error:
        log.warning("generation settings that transformers does not save: %s", str(error).strip().partition("\n")[0])
        ends = ("bos_token_id", "eos_token_id", "pad_token_id")
        network.generation_config = GenerationConfig(**{name: getattr(settings, name) for name in ends})
