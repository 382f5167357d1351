"""A guard that fails at matrix products in bfloat16, and a CPU whose native bfloat16 is present or absent as told.

with no_bfloat16_products(): …      every thread that computes, forward, backward and optimizer
count_bfloat16_products(graph)      what a compiled graph would compute
"""

from __future__ import annotations

import json
import re
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.distributed import native_bf16

PRODUCT = re.compile(
    r"(^|_)(mm|bmm|addmm|addbmm|baddbmm|mv|addmv|dot|vdot|inner|addr|ger|outer|matmul|linear|bilinear|einsum|tensordot)"
    r"($|_)|convolution|^conv(_|\d|$)|mkldnn|attention|gem[mv]|packed_mm|(^|_)(lstm|gru|rnn)($|_)"
)
"""Operators that multiply matrices, by name: torch's, oneDNN's, those of quantized layers."""


class BFloat16Product(AssertionError):
    """A matrix product was computed in bfloat16 on the CPU."""


def is_bfloat16_product(operator: Any, arguments: Any) -> bool:
    """Whether a call of `operator` multiplies bfloat16 values on the CPU. Meta and fake tensors hold no values."""
    name = operator.name().partition("::")[2].partition(".")[0]
    return bool(PRODUCT.search(name)) and any(
        isinstance(value, Tensor)
        and value.dtype == torch.bfloat16
        and value.device.type == "cpu"
        and not isinstance(value, FakeTensor)
        for value in tree_leaves(arguments)
    )


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise at each product in bfloat16, and keep where it was: the caller may catch the error."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_bfloat16_product(func, (args, kwargs)):
            self._found.append(f"{func}\n{''.join(traceback.format_stack(limit=12))}")
            raise BFloat16Product(f"{func} in bfloat16")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_bfloat16_products() -> Iterator[None]:
    """Fail where this block computes a matrix product in bfloat16, in this thread or in one that it starts.

    The backward pass of CPU tensors runs in the thread that asks for it, so the guard sees it. Compiled code and other
    processes are not seen.
    """
    found: list[str] = []
    run = threading.Thread.run

    def guarded_run(thread: threading.Thread) -> None:
        with _Guard(found):
            run(thread)

    with pytest.MonkeyPatch.context() as patch, _Guard(found):
        patch.setattr(threading.Thread, "run", guarded_run)
        yield
    if found:
        raise BFloat16Product(f"{len(found)} matrix products in bfloat16, the first:\n{found[0]}")


def set_native_bfloat16(monkeypatch: pytest.MonkeyPatch, *, native: bool) -> None:
    """Let torch report that this CPU computes bfloat16 natively, and faster than float32, or that it does not."""
    monkeypatch.setattr(native_bf16, "bf16_slowdown", lambda: 0.4 if native else 118.4)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)


def count_bfloat16_products(graph: torch.fx.GraphModule) -> int:
    """Matrix products in bfloat16 among the nodes of a graph of ATen operators."""
    return sum(
        node.op == "call_function"
        and hasattr(node.target, "name")
        and bool(PRODUCT.search(node.target.name().partition("::")[2].partition(".")[0]))
        and any(
            isinstance(value := source.meta.get("val"), Tensor) and value.dtype == torch.bfloat16
            for source in node.all_input_nodes
        )
        for node in graph.graph.nodes
    )


def store_in_bfloat16(folder: Path) -> Path:
    """Rewrite the weights of a model folder in bfloat16, as most published models have them; return the folder."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    return folder
