"""Writes a model as one graph without Python: torch.export's archive, or ONNX, for any batch size and length.

decoder, or network of transformers ─ torch.export ─┬─ model.pt2 ──────────────── torch.export.load
                                                    └─ torch.onnx ─ model.onnx ── onnxruntime
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.node import map_aggregate

from llmtrain.distributed.native_bf16 import computing_dtype, with_computing_dtype
from llmtrain.errors import ConfigError, RunError
from llmtrain.installing import install_extra
from llmtrain.publishing.agreement import Logits

CPU = torch.device("cpu")
TORCH_FILE = "model.pt2"
ONNX_FILE = "model.onnx"
INPUT, OUTPUT = "input_ids", "logits"
_PROTOBUF_LIMIT = 1_900_000_000
"""Bytes of weights above which ONNX stores them in a second file, since the first one must be smaller than 2 GiB."""


class WithoutCache(nn.Module):
    """A causal model of transformers as a function of token ids only."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits [b, t, vocab] of the token after each of `input_ids` [b, t]."""
        scores: Tensor = self.network(input_ids=input_ids, use_cache=False).logits
        return scores


def check_installed() -> None:
    """Raise ConfigError if a package that writes or runs ONNX is not installed."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: {install_extra('onnx')}")


def trace(model: nn.Module) -> ExportedProgram:
    """Trace `model`, a function of token ids, for any batch size and length. Raises RunError if that fails."""
    example = torch.zeros(2, 7, dtype=torch.int64)
    try:
        with torch.no_grad():
            return torch.export.export(
                model, (example,), dynamic_shapes={INPUT: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}, strict=False
            )
    except Exception as error:  # a model's code may raise anything when it runs on symbols
        first = str(error).strip().partition("\n")[0]
        raise RunError(f"torch.export cannot trace this model ({type(error).__name__}: {first})") from error


def write_torch(folder: Path, model: nn.Module) -> None:
    """Write model.pt2. Raises RunError as `trace` does, and OSError if the file system does not take the file."""
    program = trace(model)
    with _PatientFile(folder / TORCH_FILE, "w+") as file:
        torch.export.save(program, file)
    if file.error is not None:
        raise file.error


class _PatientFile(io.FileIO):
    """File that keeps its first error and takes what follows: torch's writer would end the process at a full disk."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        try:
            while self.error is None and written < len(view):
                written += super().write(view[written:])
        except OSError as error:
            error.filename = str(self.name)
            self.error = error
        return len(view)


def open_torch(folder: Path, *, device: torch.device = CPU) -> Logits:
    """Load the graph in model.pt2, with float32 instead of each dtype that `device` does not compute natively.

    The weights have their stored values, and the file is not changed.
    """
    program = torch.export.load(folder / TORCH_FILE)
    module = with_computing_dtype(program.module(), device)
    for node in module.graph.nodes:  # a graph names the dtypes that it casts to
        node.args = map_aggregate(node.args, lambda value: _computed(value, device))
        node.kwargs = map_aggregate(node.kwargs, lambda value: _computed(value, device))
    module.recompile()
    return lambda ids: module(ids)


def _computed(argument: Any, device: torch.device) -> Any:
    return computing_dtype(argument, device) if isinstance(argument, torch.dtype) else argument


def write_onnx(folder: Path, model: nn.Module) -> None:
    """Write model.onnx, and model.onnx.data for a large model. Raises RunError if ONNX cannot express the model."""
    program = trace(model)
    try:
        with _quiet():
            written = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes={INPUT: {0: "batch", 1: "length"}},
            )
    except Exception as error:  # the exporter raises errors of many classes
        first = str(error).strip().partition("\n")[0]
        raise RunError(
            f"this model cannot be written as ONNX ({type(error).__name__}: {first}): use another --format"
        ) from error
    assert written is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    written.save(folder / ONNX_FILE, external_data=size > _PROTOBUF_LIMIT)


def open_onnx(folder: Path) -> Logits:
    """Load the graph in model.onnx, which onnxruntime computes on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # its default is the number of the machine's cores
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run([OUTPUT], {INPUT: ids.numpy()})[0])


@torch.no_grad()
def check_batches(logits: Logits, rows: list[list[int]], *, tolerance: float) -> None:
    """Raise RunError if rows of equal length have other logits in one batch than alone."""
    length = min(map(len, rows))
    batch = torch.tensor([row[:length] for row in rows])
    together = logits(batch).float()
    alone = torch.cat([logits(row[None]).float() for row in batch])
    difference = float((together - alone).abs().max() / alone.abs().max())
    if not difference <= tolerance:
        raise RunError(f"{len(rows)} rows in one batch differ from the rows alone by {difference:.2e} of the largest")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's warnings about libraries that are not installed and about its own deprecated calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)
