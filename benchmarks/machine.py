"""Describe what benchmark results depend on: the kind of processor, and the time of a step's matrix products alone.

    python -m benchmarks.machine   →   the machine's line, and the floor of a step of 14m.yaml

The floor is the sum over the products of a training step, each measured alone with memory that it keeps, at the best
rate of the libraries at hand: torch's (MKL, oneDNN) in each layout, and numpy's (OpenBLAS). No step can be faster
without computing less.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.distributed.native_bf16 import computes_bf16, has_native_bf16, matmul_flops
from llmtrain.models.decoder.attention import query_blocks
from llmtrain.models.decoder.loss import chunk_tokens

CONFIG = Path(__file__).with_name("14m.yaml")
REPEATS = 7


class Product(NamedTuple):
    """`times` products [batch, rows, inner] × [batch, inner, columns] of a step."""

    times: int
    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """FLOPs of all `times` products."""
        return 2 * self.times * self.batch * self.rows * self.inner * self.columns


def kind() -> str:
    """Name the kind of processor as docs/performance.md does: A, B or C, or what else torch takes it for."""
    capability = torch.backends.cpu.get_cpu_capability()
    if computes_bf16("cpu"):
        return f"kind A ({capability}, native bfloat16)"
    if has_native_bf16("cpu"):
        return f"kind D ({capability}, native bfloat16 that is slower than float32)"
    return {"AVX512": "kind B (AVX512, no bfloat16)", "AVX2": "kind C (AVX2)"}.get(capability, capability)


def machine_line() -> str:
    """Describe this machine in one line: processor, kind, threads, and what products reach in both dtypes."""
    flops = {"float32": matmul_flops(torch.float32, size=1024, seconds=0.5)}
    flops["bfloat16"] = matmul_flops(torch.bfloat16, size=1024 if has_native_bf16("cpu") else 256, seconds=0.3)
    reached = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in flops.items())
    return (
        f"machine: {_processor()}, {kind()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"products reach {reached} GFLOP/s"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def products_of_step(
    model: DecoderConfig, *, vocab_size: int, batch: int, length: int, lora_rank: int | None = None
) -> Iterator[Product]:
    """Yield the products of a training step of a decoder, forward and backward, as our own decoder makes them.

    With `lora_rank` the matrices are frozen, with adapters on those of the blocks.
    """
    tokens, width = batch * length, model.d_model
    queries, keys = (heads * model.key_dim for heads in (model.attention.num_heads, model.attention.kv_heads))
    values, inner = model.attention.kv_heads * model.head_dim, model.ffn.d_ff or 0
    gates = 2 if model.ffn.variant in ("swiglu", "geglu") else 1
    matrices = [(width, queries), (width, keys), (width, values), (model.attention.num_heads * model.head_dim, width)]
    for rows, columns in [*matrices, *[(width, inner)] * gates, (inner, width)]:
        weights = [(rows, columns)] if lora_rank is None else [(rows, lora_rank), (lora_rank, columns)]
        frozen = [] if lora_rank is None else [(tokens, rows, columns), (tokens, columns, rows)]
        trained = [shape for a, b in weights for shape in ((tokens, a, b), (tokens, b, a), (a, tokens, b))]
        for shape in frozen + trained:
            yield Product(model.num_layers, 1, *shape)
    heads = batch * model.attention.num_heads
    for block in query_blocks(length, length):
        num_queries, num_keys = block.end - block.start, block.end_key - block.first_key
        yield Product(2 * model.num_layers, heads, num_queries, model.head_dim, num_keys)  # scores; their gradient
        yield Product(2 * model.num_layers, heads, num_queries, num_keys, model.head_dim)  # output; queries' gradient
        yield Product(2 * model.num_layers, heads, num_keys, num_queries, model.head_dim)  # keys' and values' gradients
    chunk = min(tokens, chunk_tokens(vocab_size, device="cpu", num_tokens=tokens))
    head = [(chunk, width, vocab_size), (chunk, vocab_size, width)]
    for shape in head if lora_rank is not None else [*head, (vocab_size, chunk, width)]:
        yield Product(tokens // chunk, 1, *shape)


def floor_seconds(products: Iterator[Product], *, dtype: torch.dtype) -> float:
    """Return the seconds of all `products`, each at the best rate of the libraries at hand. Equal shapes share one."""
    seconds: dict[tuple[int, ...], float] = {}
    total = 0.0
    for product in products:
        shape = tuple(product[1:])
        if shape not in seconds:
            seconds[shape] = _best_seconds(*shape, dtype=dtype)
        total += product.times * seconds[shape]
    return total


def _best_seconds(batch: int, rows: int, inner: int, columns: int, *, dtype: torch.dtype) -> float:
    left, right = torch.randn(batch, rows, inner, dtype=dtype), torch.randn(batch, inner, columns, dtype=dtype)
    out = torch.empty(batch, rows, columns, dtype=dtype)
    left_t, right_t = left.mT.contiguous().mT, right.mT.contiguous().mT
    ways: list[Callable[[], object]] = [
        lambda a=a, b=b: torch.bmm(a, b, out=out)  # type: ignore[misc]
        for a, b in ((left, right), (left, right_t), (left_t, right))
    ]
    if batch == 1:
        ways = [
            lambda a=a, b=b: torch.mm(a[0], b[0], out=out[0])  # type: ignore[misc]
            for a, b in ((left, right), (left, right_t), (left_t, right))
        ]
        if dtype == torch.float32:
            ways.append(lambda: np.matmul(left[0].numpy(), right[0].numpy(), out=out[0].numpy()))
    return min(_seconds(way) for way in ways)


def _seconds(way: Callable[[], object]) -> float:
    way()
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        way()
        best = min(best, time.perf_counter() - began)
    return best


def floor_of_benchmark(*, batch: int = 16, length: int = 256, lora_rank: int | None = None) -> float:
    """Return the floor, in seconds, of a step of the model of 14m.yaml in the precision that `auto` takes here."""
    model = load_config(str(CONFIG)).config.model
    assert isinstance(model, DecoderConfig)
    products = products_of_step(model, vocab_size=8192, batch=batch, length=length, lora_rank=lora_rank)
    return floor_seconds(products, dtype=torch.bfloat16 if computes_bf16("cpu") else torch.float32)


def print_machine(floor: float | None = None) -> None:
    """Print the machine's line and a floor, which is measured if it is not given: the foot of every table."""
    print(f"\n{machine_line()}")
    seconds = floor_of_benchmark() if floor is None else floor
    print(f"floor: the products of a training step of 14m.yaml take {seconds:.3f} s alone")


if __name__ == "__main__":
    print_machine()
