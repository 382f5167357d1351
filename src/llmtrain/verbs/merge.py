"""`merge`: a LoRA adapter into its base, as one model that needs no peft; compared with the two before it counts.

base, as it was trained on (in 4 bits too) ─┐
adapter ────────────────────────────────────┴─ answers ─ merged in float32 ─ written ─ loaded again ─ compared
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.errors import ConfigError
from llmtrain.generation.open_model import base_of, device_named, load_language_model
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import is_adapter_folder
from llmtrain.models.folder import read_model_folder
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.huggingface.quantization import Quantized
from llmtrain.models.layouts import layout_for
from llmtrain.models.lora import add_lora_to_decoder, add_lora_to_own, merge_adapter, read_adapter
from llmtrain.models.own_model import OwnModel, read_own_model
from llmtrain.publishing.agreement import Logits
from llmtrain.publishing.exported import (
    InMemory,
    Request,
    Source,
    begin,
    destination_of,
    find_source,
    make_and_check,
    stored_dtype,
)
from llmtrain.publishing.own_folder import open_own, write_own
from llmtrain.publishing.transformers_folder import logits_of, open_network, write_decoder, write_network
from llmtrain.runs.folders import find_model
from llmtrain.runs.json_files import json_object
from llmtrain.runs.stores import runs_folder
from llmtrain.training.checkpoint import STATE
from llmtrain.training.setup.trained import ADAPTER_FOLDER

KIND = "merged"


def merge(model: str, request: Request) -> dict[str, Any]:
    """Merge the adapter that `model` names into its base; returns what is in export.json, and where it is.

    A base that was trained on in 4 or 8 bits is taken with the values that it had there, and the result is bfloat16.
    Raises ConfigError where there is no adapter, or its base is gone; RunError if the result, loaded again, does not
    say what base and adapter say.
    """
    source = find_source(model, root_dir=request.root_dir, trust_remote_code=request.trust_remote_code)
    destination_of(source, request, kind=KIND)
    if is_adapter_folder(source.folder):
        return _merge_network(source, request)
    if (source.folder / ADAPTER_FOLDER).is_dir():
        return _merge_inside(source, request)
    raise ConfigError(f"{source.folder} is a whole model, without an adapter to merge: llmtrain export {model}")


def _merge_network(source: Source, request: Request) -> dict[str, Any]:
    quantized = _quantized(source)
    opened = load_language_model(
        source.folder,
        device=device_named(request.device),
        quantized=quantized,
        trust_remote_code=source.trusts_code,
    )
    network = opened.model
    assert isinstance(network, HuggingFaceModel)
    wide = quantized is None or request.dtype is not None
    dtype = stored_dtype(opened, request.dtype) if wide else torch.bfloat16
    work = begin(source, request, opened, kind=KIND, base=base_of(source.folder, trust_remote_code=source.trusts_code))
    merged = merge_adapter(network.network)
    return make_and_check(
        work,
        dtype=dtype,
        write=lambda folder: write_network(folder, merged, dtype=dtype),
        result=InMemory(network=merged, logits=logits_of(merged)),
        reopen=lambda folder: open_network(folder, device=work.device, trust_remote_code=source.trusts_code),
        base_quantization="none" if quantized is None else quantized.kind,
    )


def _quantized(source: Source) -> Quantized | None:
    """Return the quantization of the base while the adapter was trained."""
    from llmtrain.models.huggingface.load import weights_dtype

    trained = source.config.model if source.config is not None else None
    if not isinstance(trained, HuggingFaceConfig) or trained.quantization == "none":
        return None
    resolved = json_object(source.folder.parent / STATE, problems=[]).get("resolved") or {}
    precision = str(resolved.get("precision", "bf16-mixed"))
    return Quantized(trained.quantization, weights_dtype(trained, precision=precision))


def _merge_inside(source: Source, request: Request) -> dict[str, Any]:
    """Compare a run's `model/`, which the run itself has merged, with base and adapter, and write it."""
    trained = source.config.model if source.config is not None else None
    if not isinstance(trained, DecoderConfig | OwnModelConfig) or trained.init_from is None or trained.lora is None:
        raise ConfigError(f"{source.folder} has an adapter, and nothing says of what: name the run that trained it")
    device = device_named(request.device)
    opened = load_language_model(source.folder, device=device)
    merged = opened.model
    assert isinstance(merged, Decoder | OwnModel)
    base = find_model(trained.init_from, runs_folder(request.root_dir))
    adapted: Decoder | OwnModel
    if isinstance(trained, OwnModelConfig):
        adapted = read_own_model(base, trained).float()
        add_lora_to_own(adapted.network, trained.lora)
        read_adapter(source.folder / ADAPTER_FOLDER, adapted.network)
    else:
        adapted = read_model_folder(base, device=device)[0].float()
        add_lora_to_decoder(adapted, trained.lora)
        read_adapter(source.folder / ADAPTER_FOLDER, adapted)
    dtype = stored_dtype(opened, request.dtype)
    work = begin(source, request, replace(opened, model=adapted.to(device).eval()), kind=KIND)

    def write(folder: Path) -> None:
        if isinstance(merged, OwnModel):
            write_own(folder, merged, dtype=dtype)
        else:
            eos_id = opened.tokenizer.eos_id if opened.tokenizer is not None else None
            write_decoder(folder, merged, dtype=dtype, eos_id=eos_id)

    def reopen(folder: Path) -> Logits:
        if isinstance(merged, OwnModel):
            return open_own(folder, merged.config, device=device)
        if layout_for(merged.config) is not None:
            return open_network(folder, device=device)
        decoder = read_model_folder(folder, device=device)[0].float().eval()
        return lambda ids: decoder.logits(ids.to(device))

    stored = stored_dtype(opened, None)
    result = InMemory(network=merged.float(), logits=lambda ids: merged.logits(ids.to(device)), source_dtype=stored)
    return make_and_check(work, dtype=dtype, write=write, reopen=reopen, result=result)
