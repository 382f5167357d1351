"""`export`: a model for transformers, as plain safetensors, or as a graph; loaded again and compared before it counts.

hf            transformers' layout, read by transformers
safetensors   the decoder's own names, or those of a model of your own, read by llmtrain
torch-export  model.pt2, read by torch
onnx          model.onnx, read by onnxruntime
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain.errors import ConfigError
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import device_named, load_language_model
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.fetch import is_adapter_folder
from llmtrain.models.folder import read_model_folder
from llmtrain.models.own_model import OwnModel
from llmtrain.publishing import graph
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
from llmtrain.publishing.transformers_folder import (
    check_has_layout,
    open_network,
    write_decoder,
    write_network,
)

FORMATS = ("hf", "safetensors", "torch-export", "onnx")
GRAPHS = ("torch-export", "onnx")


def export(model: str, request: Request, *, format: str = "hf") -> dict[str, Any]:
    """Write `model` in one of FORMATS; returns what is in its export.json, and where it is.

    Raises ConfigError for what cannot be exported, which it names; RunError if the result, loaded again, does not say
    what the model says.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: it should be one of {', '.join(FORMATS)}")
    if format == "onnx":
        graph.check_installed()
    source = find_source(model, root_dir=request.root_dir, trust_remote_code=request.trust_remote_code)
    if is_adapter_folder(source.folder):
        raise ConfigError(f"{source.folder} is an adapter: merge it into its base first, llmtrain merge {model}")
    destination_of(source, request, kind=format)
    device = device_named("cpu" if format in GRAPHS else request.device)  # a graph keeps the device that it was made on
    opened = load_language_model(source.folder, device=device, trust_remote_code=source.trusts_code)
    if isinstance(opened.model, OwnModel) and format != "safetensors":
        raise ConfigError(f"{source.folder} is of {opened.model.config.name}, your own class: use --format safetensors")
    if isinstance(opened.model, Decoder) and format == "hf":
        check_has_layout(opened.model)
    dtype = _dtype(opened, request.dtype, format=format)
    work = begin(source, request, opened, kind=format)
    form = _Form(format=format, source=source, model=opened, dtype=dtype)

    def reopen(folder: Path) -> Logits:
        logits = form.reopen(folder)
        if format in GRAPHS:
            graph.check_batches(logits, [list(row) for row in work.rows[:3]], tolerance=work.tolerance(dtype))
        return logits

    network = opened.model
    result = InMemory(network=network, logits=lambda ids: network.logits(ids.to(network.device)))
    return make_and_check(
        work, dtype=dtype, write=form.write, reopen=reopen, result=None if format in GRAPHS else result
    )


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Writer and reader of a model in a format."""

    format: str
    source: Source
    model: LanguageModel
    dtype: torch.dtype

    def write(self, folder: Path) -> None:
        """Write the weights or the graph, and the files that describe them."""
        network, own_names = self.model.model, self.format == "safetensors"
        if self.format in GRAPHS:
            write = graph.write_onnx if self.format == "onnx" else graph.write_torch
            write(folder, self._function())
            shutil.copyfile(self.source.folder / "config.json", folder / "config.json")
        elif isinstance(network, Decoder):
            eos_id = self.model.tokenizer.eos_id if self.model.tokenizer is not None else None
            write_decoder(folder, network, dtype=self.dtype, eos_id=eos_id, own_names=own_names)
        elif isinstance(network, OwnModel):
            write_own(folder, network, dtype=self.dtype)
        else:
            write_network(folder, network.network, dtype=self.dtype, one_file=own_names)

    def reopen(self, folder: Path) -> Logits:
        """Load what was written with the library that will read it, and return its logits."""
        device = self.model.model.device
        if self.format in GRAPHS:
            return graph.open_onnx(folder) if self.format == "onnx" else graph.open_torch(folder, device=device)
        if isinstance(self.model.model, OwnModel):
            return open_own(folder, self.model.model.config, device=device)
        if isinstance(self.model.model, Decoder) and self.format == "safetensors":
            decoder = read_model_folder(folder, device=device)[0].float().eval()
            return lambda ids: decoder.logits(ids.to(device))
        return open_network(folder, device=device, trust_remote_code=self.source.trusts_code)

    def _function(self) -> nn.Module:
        network = self.model.model
        if isinstance(network, Decoder):
            from llmtrain.models.decoder.traceable import TraceableDecoder

            return TraceableDecoder(network).to(self.dtype).eval()
        return graph.WithoutCache(network.to(self.dtype).network).eval()


def _dtype(model: LanguageModel, asked: str | None, *, format: str) -> torch.dtype:
    """Return the dtype of the weights. Raises ConfigError for one that the format's readers cannot compute in."""
    if format not in GRAPHS or asked is not None:
        dtype = stored_dtype(model, asked)
        if format == "onnx" and dtype != torch.float32:
            raise ConfigError(
                f"--dtype {asked}: onnxruntime computes a model in float32; convert the result if need be"
            )
        return dtype
    return torch.float32  # a graph computes in what it stores
