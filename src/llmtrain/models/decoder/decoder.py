"""The decoder-only transformer: embeddings, blocks, final norm, output. Files beside this one hold the parts.

    input_ids ─ embedding (+ positions) ─ block × num_layers ─ norm ─┬─ loss.py: sum of losses, a chunk of logits a time
                                                                    └─ logits

Training, optimizers and devices are elsewhere. Other libraries' names for the same weights are in models/layouts.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.sharding import fill
from llmtrain.models.decoder.attention import Attention
from llmtrain.models.decoder.cache import KVCache
from llmtrain.models.decoder.feed_forward import build_feed_forward
from llmtrain.models.decoder.loss import ChunkKernels, compiled_kernels, next_token_loss
from llmtrain.models.decoder.mask import Alibi, AttentionInputs, build_mask
from llmtrain.models.decoder.norm import LayerNorm, Norm, RMSNorm, build_norm
from llmtrain.models.decoder.position import Rotary, Sinusoidal, restarting_positions
from llmtrain.models.device_type import device_type_of


class Block(nn.Module):
    """One layer of the decoder, [b, t, d_model] → [b, t, d_model].

    With f for attention, then for the feed-forward layer: pre is x + f(norm(x)); post is norm(x + f(x)), as in Vaswani
    et al. 2017; sandwich is x + norm(f(norm(x))) (Ding et al. 2021, arXiv:2105.13290). Parallel layers take the same
    input through the same norm and are added together, x + attention(norm(x)) + feed_forward(norm(x)), as in GPT-J and
    PaLM (Chowdhery et al. 2022, arXiv:2204.02311); post then norms their sum once, sandwich each by itself.
    """

    def __init__(self, config: DecoderConfig, *, layer: int) -> None:
        super().__init__()
        self.placement, self.parallel = config.norm.placement, config.parallel_layers
        sandwich = self.placement == "sandwich"
        self.attention_norm = build_norm(config.norm, width=config.d_model)
        self.attention = Attention(config, layer=layer)
        self.attention_out_norm = build_norm(config.norm, width=config.d_model) if sandwich else None
        self.feed_forward_norm = None if self.parallel else build_norm(config.norm, width=config.d_model)
        self.feed_forward = build_feed_forward(config)
        self.feed_forward_out_norm = build_norm(config.norm, width=config.d_model) if sandwich else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, inputs: AttentionInputs, cache: KVCache | None = None) -> Tensor:
        normed = self._before(x, self.attention_norm)
        attended = F.dropout(self.attention(normed, inputs, cache), self.dropout, self.training)
        if self.feed_forward_norm is None:
            fed = self._after(self.feed_forward(normed), self.feed_forward_out_norm)
            return self._sum(x, self._after(attended, self.attention_out_norm) + fed, self.attention_norm)
        x = self._sum(x, self._after(attended, self.attention_out_norm), self.attention_norm)
        fed = self.feed_forward(self._before(x, self.feed_forward_norm))
        return self._sum(x, self._after(fed, self.feed_forward_out_norm), self.feed_forward_norm)

    def _before(self, x: Tensor, norm: Norm) -> Tensor:
        """Return the input of a sublayer."""
        return x if self.placement == "post" else _call(norm, x)

    def _after(self, out: Tensor, norm: Norm | None) -> Tensor:
        """Return the output of a sublayer."""
        return out if norm is None else _call(norm, out)

    def _sum(self, x: Tensor, out: Tensor, norm: Norm) -> Tensor:
        """Add a sublayer's output to the residual."""
        return _call(norm, x + out) if self.placement == "post" else x + out


class Decoder(nn.Module):
    """A decoder as `config` describes it, over a vocabulary of `vocab_size` tokens.

    It meets `llmtrain.contracts.Model`. Two-dimensional parameters under `blocks.` are the matrices of matrix
    optimizers. With tied embeddings there is no output parameter, and so no alias in the state dict.
    """

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        learned = config.positional.encoding == "learned"
        self.position_embedding = nn.Embedding(config.max_seq_len, config.d_model) if learned else None
        sinusoidal = config.positional.encoding == "sinusoidal"
        self.sinusoidal = Sinusoidal(config.d_model, max_seq_len=config.max_seq_len) if sinusoidal else None
        self.rotary = _rotary(config) if config.positional.encoding == "rope" else None
        self.alibi = Alibi(config.attention.num_heads) if config.positional.encoding == "alibi" else None
        self.blocks = nn.ModuleList(Block(config, layer=layer) for layer in range(config.num_layers))
        # Post-norm blocks end in a norm already.
        self.final_norm = None if config.norm.placement == "post" else build_norm(config.norm, width=config.d_model)
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        self._loss_kernels: ChunkKernels | None = None
        self._num_checkpointed = 0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from PyTorch's global generator: the same values, sharded or not."""
        config: DecoderConfig = self.config
        std = config.init_std
        into_residual = std / math.sqrt(2 * config.num_layers) if config.residual_scaled_init else std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into = into_residual if name.endswith(("o_proj", "down_proj")) else std
                fill(module.weight, partial(nn.init.normal_, std=into))
                if module.bias is not None:
                    fill(module.bias, nn.init.zeros_)
            elif isinstance(module, nn.Embedding):
                fill(module.weight, partial(nn.init.normal_, std=std))
            elif isinstance(module, RMSNorm | LayerNorm):
                fill(module.weight, nn.init.ones_)
                if isinstance(module, LayerNorm):
                    fill(module.bias, nn.init.zeros_)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the supervised tokens' losses in nats (float32 scalar), and their number (int64 scalar)."""
        labels = batch["labels"]
        hidden = self._hidden(batch["input_ids"], batch.get("document_ids"), None, cu_seqlens=batch.get("cu_seqlens"))
        loss_sum = next_token_loss(
            hidden.flatten(0, 1), self.output_weight, labels.flatten(), kernels=self._loss_kernels
        )
        return loss_sum, (labels != IGNORE_INDEX).sum()

    def logits(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Return [b, t, vocab] scores of the token after each position; [b, 1, vocab] with `last_only`.

        With a cache, `input_ids` follow the tokens that the cache holds, and are added to it.
        """
        hidden = self._hidden(input_ids, document_ids, cache)
        return F.linear(hidden[:, -1:] if last_only else hidden, self.output_weight)

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> KVCache:
        """Return an empty cache for `max_len` tokens a row; `first_slots` [b] counts each row's padding on the left."""
        weight = self.token_embedding.weight
        return KVCache(
            self.config,
            batch_size=batch_size,
            max_len=max_len,
            dtype=_residual_dtype(weight),
            device=weight.device,
            first_slots=first_slots,
        )

    @property
    def max_seq_len(self) -> int:
        """Longest sequence, in tokens."""
        return self.config.max_seq_len

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.token_embedding.weight.device

    @property
    def _adds_positions(self) -> bool:
        """True if positions are added to embeddings.

        If so, they restart at each document, so that a document means the same in a pack as alone. The other encodings
        see only distances, which are the same in both.
        """
        return self.position_embedding is not None or self.sinusoidal is not None

    @property
    def output_weight(self) -> Tensor:
        """Weight [vocab, d_model] of the output projection: its own, or the tied embedding's."""
        return self.token_embedding.weight if self.output is None else self.output.weight

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Count all parameters, tied ones once. `non_embedding` counts only those that a token is multiplied with.

        That leaves out the position table, and the token table unless it is also the output projection.
        """
        parameters = self._multiplied_parameters() if non_embedding else self.parameters()
        return sum(parameter.numel() for parameter in parameters)

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward and backward in the convention of PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

        The sum is 6N + 12·L·(num_heads·head_dim)·T, where N is `num_parameters(non_embedding=True)`. Recomputation is
        not counted, and attention counts as if it were not causal. With a sliding window T is at most the window.
        Complex queries and keys are twice as wide as their values, so the 12 becomes 18. A frozen parameter, whose own
        gradient is not computed, counts 4 and not 6.
        """
        config: DecoderConfig = self.config
        attention = config.attention
        num_keys = min(seq_len, attention.window or seq_len)
        width = attention.num_heads * (config.key_dim + config.head_dim)
        products = sum((6 if p.requires_grad else 4) * p.numel() for p in self._multiplied_parameters())
        return products + 6 * config.num_layers * width * num_keys

    def _multiplied_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that a token is multiplied with: all except lookup tables."""
        tables = [self.position_embedding, None if self.output is None else self.token_embedding]
        lookup = {id(table.weight) for table in tables if table is not None}
        return (parameter for parameter in self.parameters() if id(parameter) not in lookup)

    def layers(self) -> list[nn.Module]:
        """Return the blocks, which are sharded one at a time."""
        return list(self.blocks)

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Map each layer to how it is split over `size` ranks. A rank gets some heads and some of the feed-forward."""
        ways = {"o_proj": "rowwise", "down_proj": "rowwise", "q_norm": "per_head", "k_norm": "per_head"}
        ways |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "colwise")
        return {"alibi": "share"} | {f"blocks.*.{name}": way for name, way in ways.items()}

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def checkpointable(self) -> Sequence[int]:
        """Numbers of blocks that `checkpoint_blocks` takes."""
        return range(self.num_blocks + 1)

    def checkpoint_blocks(self, count: int | None = None) -> None:
        """Keep only the inputs of the first `count` blocks (None: of all) for the backward pass, which recomputes them.

        The backward pass reaches the first blocks last, when what the other blocks keep is free again. Results and
        gradients stay the same, dropout included, for about a third more computation of such a block (Chen et al. 2016,
        arXiv:1604.06174). Parameters keep their names. It works with and without `compile_parts`.
        """
        self._num_checkpointed = len(self.blocks) if count is None else count

    def compile_parts(self, **options: Any) -> None:
        """Compile the blocks, which share their compiled code, and the loss. Everything between them is cheap.

        In one graph for the full model each layer would be compiled by itself: minutes instead of seconds. Parameters
        keep their names.
        """
        for block in self.blocks:
            block.compile(**options)
        if self.final_norm is not None:
            self.final_norm.compile(**options)
        self._loss_kernels = compiled_kernels(**options)

    def _hidden(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None,
        cache: KVCache | None,
        *,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Return [b, t, d_model] hidden states after the final norm."""
        num_tokens = input_ids.shape[1]
        end = num_tokens + (0 if cache is None else cache.length)
        _check_room(end, max_seq_len=self.config.max_seq_len, cache=cache)

        positions: int | Tensor = num_tokens
        if cache is not None:
            positions = cache.positions(num_tokens)
            cache.append_documents(num_tokens, document_ids)
            document_ids = cache.document_ids[:, :end]
        if self._adds_positions and document_ids is not None:
            positions = restarting_positions(document_ids)[:, -num_tokens:].clamp(max=self.max_seq_len - 1)
        x = self._embed(input_ids, positions)
        inputs = self._attention_inputs(input_ids, positions, document_ids, cache, cu_seqlens=cu_seqlens)
        recomputed = self._num_checkpointed if cache is None and torch.is_grad_enabled() else 0
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, inputs, use_reentrant=False) if index < recomputed else block(x, inputs, cache)
        if cache is not None:
            cache.advance(num_tokens)
        return x if self.final_norm is None else _call(self.final_norm, x)

    def _embed(self, input_ids: Tensor, positions: int | Tensor) -> Tensor:
        """Return [b, t, d_model], the residual stream at the first block.

        Sinusoids are added to embeddings times sqrt(d_model), as in their paper: they would dominate unscaled ones.
        """
        x: Tensor = self.token_embedding(input_ids)
        dtype = _residual_dtype(x)
        if self.position_embedding is not None:
            table = self.position_embedding.weight
            x = x + (table[:positions] if isinstance(positions, int) else self.position_embedding(positions))
        elif self.sinusoidal is not None:
            x = x * math.sqrt(self.config.d_model) + self.sinusoidal(positions)
        return F.dropout(x.to(dtype), self.config.dropout, self.training)

    def _attention_inputs(
        self,
        input_ids: Tensor,
        positions: int | Tensor,
        document_ids: Tensor | None,
        cache: KVCache | None,
        *,
        cu_seqlens: Tensor | None,
    ) -> AttentionInputs:
        """Build the inputs that all layers share in this forward pass."""
        attention, device = self.config.attention, input_ids.device
        slopes = None if self.alibi is None else self.alibi(device)
        inputs = AttentionInputs(
            mask=None,
            rope=None if self.rotary is None else self.rotary(positions),
            explicit=False,
            slopes=slopes,
            window=attention.window,
        )
        is_masked = document_ids is not None or attention.window is not None or slopes is not None
        if is_masked and cache is None and device_type_of(device) == "cuda":
            from llmtrain.models.decoder.gpu_kernels import kernel_inputs  # here, since it imports the compiler

            read = kernel_inputs(
                self.config,
                input_ids,
                dtype=_product_dtype(self.token_embedding.weight),
                dropout=attention.dropout if self.training else 0.0,
                document_ids=document_ids,
                cu_seqlens=cu_seqlens,
            )
            if read is not None:
                return inputs._replace(cu_seqlens=read.cu_seqlens, block_mask=read.block_mask)
        mask, explicit = build_mask(
            input_ids.shape[1],
            document_ids=document_ids,
            cache=cache,
            device=device,
            window=attention.window,
            slopes=slopes,
        )
        return inputs._replace(mask=mask, explicit=explicit)


def _call(norm: Norm, x: Tensor) -> Tensor:
    out: Tensor = norm(x)
    return out


def _rotary(config: DecoderConfig) -> Rotary:
    positional = config.positional
    return Rotary(
        config.key_dim, base=positional.rope_base, max_seq_len=config.max_seq_len, scaling=positional.rope_scaling
    )


def _check_room(num_tokens: int, *, max_seq_len: int, cache: KVCache | None) -> None:
    """Raise ValueError if a row would have more tokens than it may."""
    longest = num_tokens - (0 if cache is None else cache.least_padding)
    if longest > max_seq_len:
        raise ValueError(f"{longest} tokens are over the model's max_seq_len {max_seq_len}")
    if cache is not None and num_tokens > cache.max_len:
        raise ValueError(f"{num_tokens} tokens are over the {cache.max_len} that the cache was made for")


def _residual_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream, given the embeddings.

    Under bfloat16 autocast the stream is bfloat16 from the embedding on, as in a model with bfloat16 weights. In
    float32 it would be cast for every product and take twice the memory. Float16 is too narrow for the stream.
    """
    return torch.bfloat16 if _product_dtype(x) == torch.bfloat16 else x.dtype


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products, given the embeddings or their weights."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
