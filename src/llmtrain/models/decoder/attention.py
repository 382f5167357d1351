"""Self-attention: projections, and several ways to compute it. Masks are in mask.py, norms and residuals in decoder.py.

    x ─ q, k, v projections ─ heads ─ (QK-norm) ─ (rotary) ─ (cache) ─ attend ─ output projection

Shapes: b batch, t queries, s keys, h query heads, n key/value heads, g query heads per key/value head, d head_dim, c
width of queries and keys, which is d, or 2d where they are complex. Scores are always scaled by d^-½.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.models.decoder.cache import KVCache
from llmtrain.models.decoder.mask import AttentionInputs
from llmtrain.models.decoder.norm import RMSNorm
from llmtrain.models.decoder.position import RotaryTables, rotate
from llmtrain.models.device_type import device_type_of

QUERY_BLOCK = 128
MAX_QUERY_BLOCKS = 4
ONE_BLOCK = 2 * QUERY_BLOCK - 1
"""Largest number of queries that is computed as one block."""
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Kernels of fused attention on a GPU in the order of preference, including cuDNN's."""
CUDNN_MULTIPLE = 128
"""cuDNN plans each new shape for half a second. There are few lengths that are multiples of this number."""


class QueryBlock(NamedTuple):
    """Queries from start to end - 1, and the keys that they may attend to, from first_key to end_key - 1."""

    start: int
    end: int
    first_key: int
    end_key: int


def attend(q_bhtc: Tensor, k_bnsc: Tensor, v_bnsd: Tensor, inputs: AttentionInputs, *, dropout: float) -> Tensor:
    """Compute the attention of every query head to its key/value head, [b, t, h · d]."""
    mask, slopes, window = inputs.mask, inputs.slopes, inputs.window
    if inputs.cu_seqlens is not None:
        from llmtrain.models.decoder.gpu_kernels import varlen_attention  # here, since it imports the compiler

        return varlen_attention(q_bhtc, k_bnsc, v_bnsd, inputs.cu_seqlens, window=window)
    if inputs.block_mask is not None:
        from llmtrain.models.decoder.gpu_kernels import block_attention

        return block_attention(q_bhtc, k_bnsc, v_bnsd, inputs.block_mask, slopes=slopes)
    if not inputs.explicit:
        out_bhtd = fused_attention(q_bhtc, k_bnsc, v_bnsd, mask, dropout=dropout)
        return out_bhtd.transpose(1, 2).flatten(2)
    assert mask is not None
    if torch.compiler.is_compiling() and dropout == 0.0:
        return blocked_attention(q_bhtc, k_bnsc, v_bnsd, mask, slopes=slopes, window=window)
    return explicit_attention(q_bhtc, k_bnsc, v_bnsd, mask, slopes=slopes, window=window, dropout=dropout)


def fused_attention(
    q_bhtc: Tensor, k_bnsc: Tensor, v_bnsd: Tensor, mask: Tensor | None, *, dropout: float = 0.0
) -> Tensor:
    """Call PyTorch's scaled_dot_product_attention, [b, h, t, d].

    `mask` is bool, or float and added to the scores, or None for causal attention. On a GPU, training without a mask
    may use cuDNN's kernel, which is the fastest; elsewhere the engine has turned it off.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_bhtc.dtype)
    options: dict[str, Any] = {
        "attn_mask": mask,
        "dropout_p": dropout,
        "is_causal": mask is None,
        "scale": None if q_bhtc.shape[-1] == v_bnsd.shape[-1] else v_bnsd.shape[-1] ** -0.5,
        "enable_gqa": q_bhtc.shape[1] != k_bnsc.shape[1],
    }
    on_gpu = device_type_of(q_bhtc.device) == "cuda"
    if on_gpu and mask is None and torch.is_grad_enabled() and q_bhtc.shape[2] % CUDNN_MULTIPLE == 0:
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            return F.scaled_dot_product_attention(q_bhtc, k_bnsc, v_bnsd, **options)
    return F.scaled_dot_product_attention(q_bhtc, k_bnsc, v_bnsd, **options)


def explicit_attention(
    q_bhtc: Tensor,
    k_bnsc: Tensor,
    v_bnsd: Tensor,
    mask: Tensor,
    *,
    slopes: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute scores, float32 softmax and product, [b, t, h · d]. `mask` is added to scores; `slopes` [h] are ALiBi's.

    The queries are split into blocks, and each block is multiplied only with the keys up to its own end. That saves a
    quarter of the work with 2 blocks, three eighths with 4, and more with a window. A masked score has a weight of
    exactly 0, so leaving it out changes no result.
    """
    b, h, t, c = q_bhtc.shape
    n, s, d = v_bnsd.shape[1:]
    outputs = []
    for block in query_blocks(t, s, window=window):
        rows, keys = block.end - block.start, slice(block.first_key, block.end_key)
        q = q_bhtc[:, :, block.start : block.end].reshape(b, n, -1, c)  # the g heads of a group share its keys uncopied
        scores = (q @ k_bnsc[:, :, keys].transpose(-1, -2)).float().reshape(b, n, h // n, rows, -1)
        biased = _biased(scores * d**-0.5, mask, slopes, block)
        weights = torch.softmax(biased, dim=-1).to(v_bnsd.dtype)
        if dropout > 0.0:
            weights = F.dropout(weights, dropout)
        outputs.append((weights.flatten(2, 3) @ v_bnsd[:, :, keys]).reshape(b, h, rows, d))
    return torch.cat(outputs, dim=2).transpose(1, 2).reshape(b, t, h * d)


def blocked_attention(
    q_bhtc: Tensor,
    k_bnsc: Tensor,
    v_bnsd: Tensor,
    mask: Tensor,
    *,
    slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Compute `explicit_attention` without dropout in a form written for the compiler; [b, t, h · d]."""
    out: Tensor = _BlockedAttention.apply(q_bhtc, k_bnsc, v_bnsd, mask, slopes, window)  # type: ignore[no-untyped-call]
    return out


def query_blocks(num_queries: int, num_keys: int, *, window: int | None = None) -> list[QueryBlock]:
    """Split the last `num_queries` of `num_keys` tokens into blocks, each with the keys that its queries can see."""
    # Comparisons, not a division: one compiled graph then serves all lengths that have the same number of blocks.
    num_blocks = sum(num_queries >= count * QUERY_BLOCK for count in range(2, MAX_QUERY_BLOCKS + 1)) + 1
    size = -(-num_queries // num_blocks)
    past = num_keys - num_queries
    blocks = []
    for index in range(num_blocks):
        start = index * size
        end = num_queries if index == num_blocks - 1 else start + size
        first_key = 0 if window is None else max(0, past + start - window + 1)
        blocks.append(QueryBlock(start, end, first_key, past + end))
    return blocks


def _biased(scores_bngts: Tensor, mask: Tensor, slopes: Tensor | None, block: QueryBlock) -> Tensor:
    """Add the mask to a block's scores, and ALiBi's bias if there are slopes."""
    biased = scores_bngts + mask[:, :, None, block.start : block.end, block.first_key : block.end_key]
    if slopes is None:
        return biased
    keys = torch.arange(block.first_key, block.end_key, device=slopes.device)
    queries = torch.arange(block.start - block.end, 0, device=slopes.device) + block.end_key
    return biased + slopes.reshape(*scores_bngts.shape[1:3], 1, 1) * (keys - queries[:, None])


class _BlockedAttention(torch.autograd.Function):
    """Explicit attention with the fewest passes over the scores.

    Forward takes two passes: one for the maxima, and one that writes e = exp(score - max) in the products' dtype while
    it sums e. The division by the sum is applied to the output, which is narrower. Backward takes one pass: with
    o' = grad_out / sum and D = rowsum(o' ∘ out), the gradient of the scores is e ∘ (o' · vᵀ - D) (as in Dao et al.
    2022, arXiv:2205.14135). Under autograd a float32 softmax would go to memory and back twice in each direction.
    Slices are made contiguous, since the library's product would copy them slowly otherwise.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_bhtc: Tensor,
        k_bnsc: Tensor,
        v_bnsd: Tensor,
        mask: Tensor,
        slopes: Tensor | None,
        window: int | None,
    ) -> Tensor:
        b, h, t, c = q_bhtc.shape
        n, s, d = v_bnsd.shape[1:]
        k, v = k_bnsc.reshape(b * n, s, c), v_bnsd.reshape(b * n, s, d)
        exponentials, inverse_sums, outputs = [], [], []
        for block in query_blocks(t, s, window=window):
            rows, keys = block.end - block.start, slice(block.first_key, block.end_key)
            q = q_bhtc[:, :, block.start : block.end].reshape(b * n, -1, c)
            scores = torch.bmm(q, k[:, keys].contiguous().transpose(1, 2)).reshape(b, n, h // n, rows, -1)
            biased = _biased(scores.float() * d**-0.5, mask, slopes, block)
            exponential = (biased - biased.amax(-1, keepdim=True)).exp()
            inverse_sum = 1.0 / exponential.sum(-1, keepdim=True)
            exponential = exponential.to(v.dtype)
            product = torch.bmm(exponential.flatten(2, 3).flatten(0, 1), v[:, keys].contiguous())
            out = (product.reshape(b, n, h // n, rows, d) * inverse_sum).to(v.dtype)
            outputs.append(out.reshape(b, h, rows, d).transpose(1, 2))
            exponentials.append(exponential)
            inverse_sums.append(inverse_sum)
        out_bthd = torch.cat(outputs, dim=1)
        ctx.save_for_backward(q_bhtc, k_bnsc, v_bnsd, out_bthd, *exponentials, *inverse_sums)
        ctx.window = window
        return out_bthd.reshape(b, t, h * d)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q_bhtc, k_bnsc, v_bnsd, out_bthd, *rest = ctx.saved_tensors
        exponentials, inverse_sums = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        b, h, t, c = q_bhtc.shape
        n, s, d = v_bnsd.shape[1:]
        dtype = v_bnsd.dtype
        k, v = k_bnsc.reshape(b * n, s, c), v_bnsd.reshape(b * n, s, d)
        out_bhtd = out_bthd.transpose(1, 2)
        grad_bhtd = grad_outputs[0].reshape(b, t, h, d).transpose(1, 2)
        blocks = query_blocks(t, s, window=ctx.window)
        q_grads, k_grads, v_grads = [], [], []
        for block, exponential, inverse_sum in zip(blocks, exponentials, inverse_sums, strict=True):
            queries, keys = slice(block.start, block.end), slice(block.first_key, block.end_key)
            q = q_bhtc[:, :, queries].reshape(b * n, -1, c)
            grad = grad_bhtd[:, :, queries].reshape(b, n, h // n, -1, d).float() * inverse_sum
            shift = (grad * out_bhtd[:, :, queries].reshape(b, n, h // n, -1, d).float()).sum(-1, keepdim=True)
            grad = grad.to(dtype).reshape(b * n, -1, d)
            weight_grad = torch.bmm(grad, v[:, keys].contiguous().transpose(1, 2)).reshape(exponential.shape)
            score_grad = (exponential.float() * (weight_grad.float() - shift) * d**-0.5).to(dtype)
            score_grad = score_grad.flatten(2, 3).flatten(0, 1)
            q_grads.append(torch.bmm(score_grad, k[:, keys].contiguous()).reshape(b, h, -1, c))
            k_grads.append(torch.bmm(score_grad.transpose(1, 2), q))
            v_grads.append(torch.bmm(exponential.flatten(2, 3).flatten(0, 1).transpose(1, 2), grad))
        k_grad, v_grad = (_sum_over_blocks(grads, blocks, num_keys=s) for grads in (k_grads, v_grads))
        q_grad = torch.cat(q_grads, dim=2)
        return q_grad, k_grad.reshape(k_bnsc.shape), v_grad.reshape(v_bnsd.shape), None, None, None


def _sum_over_blocks(grads: list[Tensor], blocks: list[QueryBlock], *, num_keys: int) -> Tensor:
    """Sum the blocks' tensors [m, keys of the block, …], each placed at its keys, into [m, s, …]."""
    starts = sorted({0, *(block.first_key for block in blocks), *(block.end_key for block in blocks[:-1])})
    parts = []
    for start, end in zip(starts, [*starts[1:], num_keys], strict=True):
        covering = [
            grad[:, start - block.first_key : end - block.first_key].float()
            for grad, block in zip(grads, blocks, strict=True)
            if block.first_key <= start and block.end_key >= end
        ]
        if covering:
            parts.append(sum(covering[1:], start=covering[0]).to(grads[0].dtype))
        else:  # keys that a cache holds but that no window reaches any more
            parts.append(grads[0].new_zeros(grads[0].shape[0], end - start, grads[0].shape[2]))
    return torch.cat(parts, dim=1)


class Attention(nn.Module):
    """Multi-head, grouped-query (Ainslie et al. 2023, arXiv:2305.13245), multi-query (Shazeer 2019, arXiv:1911.02150)
    and complex attention.

    In complex attention a head's query and key are head_dim complex numbers. The projection gives their real parts,
    then their imaginary parts. Values are real. The score Re(q · k̄) equals the dot product of the 2·head_dim real
    numbers, so nothing else changes. Rotary positions multiply each complex number by e^{iθ}, each with its own
    frequency, which is what `rotate` does to halves. QK-norm divides a head's vector by the root mean square of its
    2·head_dim real numbers.
    """

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        attention = config.attention
        self.layer = layer
        self.key_dim, self.head_dim = config.key_dim, config.head_dim
        self.dropout = attention.dropout
        num_heads, kv_heads = attention.num_heads, attention.kv_heads
        self.q_proj = nn.Linear(config.d_model, num_heads * config.key_dim, bias=attention.bias)
        self.k_proj = nn.Linear(config.d_model, kv_heads * config.key_dim, bias=attention.bias)
        self.v_proj = nn.Linear(config.d_model, kv_heads * config.head_dim, bias=attention.bias)
        self.o_proj = nn.Linear(num_heads * config.head_dim, config.d_model, bias=attention.bias)
        self.q_norm = RMSNorm(config.key_dim, eps=config.norm.eps) if attention.qk_norm else None
        self.k_norm = RMSNorm(config.key_dim, eps=config.norm.eps) if attention.qk_norm else None

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        q = _heads(self.q_proj(x), width=self.key_dim, norm=self.q_norm, rope=inputs.rope)
        k = _heads(self.k_proj(x), width=self.key_dim, norm=self.k_norm, rope=inputs.rope)
        v = _heads(self.v_proj(x), width=self.head_dim, norm=None, rope=None)
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        out: Tensor = self.o_proj(attend(q, k, v, inputs, dropout=self.dropout if self.training else 0.0))
        return out


def _heads(x: Tensor, *, width: int, norm: RMSNorm | None, rope: RotaryTables | None) -> Tensor:
    """Reshape [b, t, heads · width] → [b, heads, t, width], with norm and rotary positions where they are given."""
    x_bthd = x.reshape(*x.shape[:2], -1, width)
    if norm is not None:
        x_bthd = norm(x_bthd)
    return x_bthd.transpose(1, 2) if rope is None else rotate(x_bthd, rope)
