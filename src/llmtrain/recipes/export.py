"""`export`: a model as transformers loads it, or as plain safetensors; loaded again and compared before it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_model_folder
from llmtrain.models.hub import is_adapter_folder
from llmtrain.publishing.agreement import Logits
from llmtrain.publishing.transformers_folder import check_has_layout, open_network, write_decoder, write_network
from llmtrain.recipes.exported import Request, begin, destination_of, find_source, make_and_check, stored_dtype
from llmtrain.recipes.open_model import device_named, load_language_model

FORMATS = ("hf", "safetensors")


def export(model: str, request: Request, *, format: str = "hf") -> dict[str, Any]:
    """Write `model` in one of FORMATS; returns what is in its export.json, and where it is.

    Raises ConfigError for what cannot be exported, which it names; RunError if the result, loaded again, does not say
    what the model says.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: it should be one of {', '.join(FORMATS)}")
    source = find_source(model, root_dir=request.root_dir)
    if is_adapter_folder(source.folder):
        raise ConfigError(f"{source.folder} is an adapter: merge it into its base first, llmtrain merge {model}")
    destination_of(source, request, kind=format)
    opened = load_language_model(source.folder, device=device_named(request.device))
    network, own_names = opened.model, format == "safetensors"
    if isinstance(network, Decoder) and not own_names:
        check_has_layout(network)
    dtype = stored_dtype(opened, request.dtype)
    work = begin(source, request, opened, kind=format)

    def write(folder: Path) -> None:
        if isinstance(network, Decoder):
            eos_id = opened.tokenizer.eos_id if opened.tokenizer is not None else None
            write_decoder(folder, network, dtype=dtype, eos_id=eos_id, own_names=own_names)
        else:
            write_network(folder, network.network, dtype=dtype, one_file=own_names)

    def reopen(folder: Path) -> Logits:
        if isinstance(network, Decoder) and own_names:
            decoder = read_model_folder(folder, device=work.device)[0].float().eval()
            return lambda ids: decoder.logits(ids.to(work.device))
        return open_network(folder, device=work.device)

    return make_and_check(work, dtype=dtype, write=write, reopen=reopen)
