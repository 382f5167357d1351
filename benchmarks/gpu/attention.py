"""A table of attention kernels: forward and backward, and the first call of a new shape, in which kernels are planned.

causal    no mask: each backend of SDPA
dense     a mask of documents, [b, 1, t, t]: the backends of SDPA that take one
varlen    the same documents by their lengths (torch.nn.attention.varlen)
flex      the same documents by a block mask (flex_attention, compiled)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.document import Skipped
from benchmarks.gpu.setting import Setting
from llmtrain.data.document_bounds import cu_seqlens

TOKENS = 16_384
"""Number of tokens of a batch."""
QUERY_WIDTH = 2048
LENGTHS = (1024, 2048, 192, 8192)
HEAD_DIMS = (64, 128)
GROUPS = (1, 4)
"""Query heads for each key/value head."""
KINDS = ("causal", "dense", "varlen", "flex")
FLEX_SHAPES = ((64, 1), (128, 4))
"""Width of a head and group, on a GPU: each shape of flex is compiled, which takes seconds."""
MASKED = (SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Sizes of a call."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


def measure(setting: Setting) -> None:
    """Measure every kind and backend, those that need no compiler first."""
    lengths, dims = setting.sized(LENGTHS, smoke=(32,)), setting.sized(HEAD_DIMS, smoke=(16,))
    for kinds in (KINDS[:3], KINDS[3:]):
        for length, dim, group, kind in itertools.product(lengths, dims, GROUPS, kinds):
            heads = setting.sized(QUERY_WIDTH, smoke=64) // dim
            tokens = setting.sized(TOKENS, smoke=64)
            if kind == "flex" and not setting.smoke and (dim, group) not in FLEX_SHAPES:
                continue
            shape = Shape(max(1, tokens // length), length, heads, heads // group, dim)
            for backend in _backends(kind, setting):
                named = {"kind": kind, "backend": backend.name if backend else kind, "t": length, "head_dim": dim}
                with setting.recorder.trying(**named, gqa=group):
                    setting.recorder.row(**named, gqa=group, **_measured(kind, backend, shape, setting))


def _backends(kind: str, setting: Setting) -> tuple[SDPBackend | None, ...]:
    if kind in ("varlen", "flex"):
        return (None,)
    if setting.smoke:
        return (SDPBackend.MATH,)
    return (SDPBackend.FLASH_ATTENTION, *MASKED) if kind == "causal" else MASKED


def _measured(kind: str, backend: SDPBackend | None, shape: Shape, setting: Setting) -> dict[str, float | bool]:
    """Return milliseconds of forward and backward, and how far result and gradients are from float32."""
    make: dict[str, Callable[[], Attend]] = {
        "causal": lambda: _sdpa(None, backend, shape),
        "dense": lambda: _sdpa(_dense_mask(shape, setting), backend, shape),
        "varlen": lambda: _varlen(shape, setting),
        "flex": lambda: _flex(shape, setting),
    }
    attend = make[kind]()
    queries, keys, values = (
        torch.randn(
            shape.batch, heads, shape.length, shape.head_dim, device=setting.device, dtype=setting.half
        ).requires_grad_()
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    weight = torch.randn_like(queries)
    if kind == "flex" and setting.device.type != "cuda":
        attend(queries.detach(), keys.detach(), values.detach())
        raise Skipped("flex attention has a backward pass on a GPU alone")

    def call() -> None:
        queries.grad = keys.grad = values.grad = None
        torch.autograd.backward((attend(queries, keys, values) * weight).sum())

    first = setting.seconds(call)
    finite = all(bool(part.grad is not None and part.grad.isfinite().all()) for part in (queries, keys, values))
    seconds = setting.median_seconds(call, calls=5, rounds=3)
    with torch.no_grad():
        forward = setting.median_seconds(lambda: attend(queries, keys, values), calls=5, rounds=3)
    products = 2 * 2 * shape.batch * shape.heads * shape.length**2 * shape.head_dim / 2
    return {
        "forward_ms": forward * 1e3,
        "both_ms": seconds * 1e3,
        "first_call_ms": first * 1e3,
        "tflops": products * 3.5 / seconds / 1e12,
        "finite_gradients": finite,
    }


def _documents(shape: Shape, device: torch.device) -> Tensor:
    """Return [t] the number of each position's document: three of about the same length."""
    return torch.arange(shape.length, device=device) * 3 // shape.length


def _dense_mask(shape: Shape, setting: Setting) -> Tensor:
    slots, documents = torch.arange(shape.length, device=setting.device), _documents(shape, setting.device)
    mask = (slots <= slots[:, None]) & (documents == documents[:, None])
    return mask.expand(shape.batch, 1, -1, -1).contiguous()


def _sdpa(mask: Tensor | None, backend: SDPBackend | None, shape: Shape) -> Attend:
    assert backend is not None

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        gqa = shape.heads != shape.kv_heads
        if mask is not None and backend == SDPBackend.EFFICIENT_ATTENTION and gqa:  # it takes no groups
            keys, values = (x.repeat_interleave(shape.heads // shape.kv_heads, 1) for x in (keys, values))
            gqa = False
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa
            )

    return attend


def _varlen(shape: Shape, setting: Setting) -> Attend:
    if setting.device.type != "cuda":
        raise Skipped("varlen attention needs a GPU")
    from llmtrain.models.decoder.gpu_kernels import varlen_attention

    numbers = _documents(shape, torch.device("cpu")).int().expand(shape.batch, -1)
    bounds = torch.from_numpy(cu_seqlens(numbers.numpy())).to(setting.device)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = varlen_attention(queries, keys, values, bounds)
        return out.view(shape.batch, shape.length, shape.heads, shape.head_dim).transpose(1, 2)

    return attend


def _flex(shape: Shape, setting: Setting) -> Attend:
    from torch.nn.attention.flex_attention import flex_attention

    from llmtrain.models.decoder.gpu_kernels import build_block_mask

    numbers = _documents(shape, setting.device).expand(shape.batch, -1)
    mask = build_block_mask(numbers, document_ids=numbers, window=None)
    torch.compiler.reset()  # it would not compile for more than eight shapes
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        out = compiled(queries, keys, values, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)
        assert isinstance(out, Tensor)
        return out

    return attend
