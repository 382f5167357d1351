"""A causal model of transformers, wrapped to meet `llmtrain.contracts.Model`.

    batch ─ positions that restart at each document ─ base model ─ hidden states of supervised tokens ─ head ─▶ loss

Logits are computed only for supervised tokens. Documents that share a row do not attend to each other: before the first
packed batch the model is tried with two documents in one row, on the device and backend of the training, and a model
that mixes them is rejected. Loading is in `load`, adapters are in `models.lora`, the loss is in `head`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.strategy import reject_uneven
from llmtrain.distributed.tensor_parallel import STYLES
from llmtrain.errors import ConfigError
from llmtrain.models.decoder.loss import ChunkKernels, compiled_kernels
from llmtrain.models.decoder.position import restarting_positions
from llmtrain.models.device_type import device_type_of
from llmtrain.models.huggingface.attention import BLOCKED, VARLEN, NotCovered, choose_attention
from llmtrain.models.huggingface.cache import HuggingFaceCache
from llmtrain.models.huggingface.head import Head
from llmtrain.models.huggingface.packed_rows import rows_hold_several
from llmtrain.screen import counted

Packing = Literal["positions", "flat", "varlen", "mask"]
"""Way in which documents that share a row are kept from attending to each other.

- positions: position_ids restart at each document, and transformers derives a mask from them.
- flat: the same position_ids, with all rows joined into one, and where documents begin. Flash attention requires it.
- varlen: the same, for our own attention on a GPU, with a mask that nobody reads and so transformers makes none.
- mask: a mask that is built here.
"""


class HuggingFaceModel(nn.Module):
    """Wraps `network`, a model of transformers or a PeftModel. Parameters keep its names, under `network.`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._loss_kernels: ChunkKernels | None = None
        self._packing: Packing | None = None
        self._head_is_known: bool | None = None
        self._attention_is_chosen = False

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the supervised tokens' losses in nats (float32 scalar), and their number (int64 scalar)."""
        input_ids, labels = batch["input_ids"], batch["labels"]
        documents = batch.get("document_ids"), batch.get("cu_seqlens")
        if not self._attention_is_chosen:  # here, where the model is on its final device
            choose_attention(self.causal_lm, compiled=self._loss_kernels is not None)
            self._attention_is_chosen = True
        supervised = batch.get("supervised")
        if supervised is None:
            supervised = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
        labels_n = labels.flatten()[supervised]
        num_tokens = torch.full((), labels_n.numel(), device=labels.device)
        if self._knows_head(input_ids):
            hidden_nd = self.hidden(input_ids, *documents).flatten(0, 1)[supervised]
            if not labels_n.numel():
                return self._head().logits(hidden_nd).float().sum(), num_tokens  # 0, and gradients of 0 for DDP
            return self._head().loss(hidden_nd, labels_n, kernels=self._loss_kernels), num_tokens
        with self._head_sees_only(supervised):
            logits = self._outputs(self.network, input_ids, *documents).logits.flatten(0, -2)
        if not labels_n.numel():
            return logits.float().sum(), num_tokens
        return F.cross_entropy(logits.float(), labels_n, reduction="sum"), num_tokens

    def logits(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Return [b, t, vocab] scores of the token after each position; [b, 1, vocab] with `last_only`.

        With a cache, `input_ids` follow the tokens that the cache holds, and are added to it. Then `document_ids` have
        no effect.
        """
        if cache is not None:
            return self._continued(input_ids, cache, last_only=last_only)
        logits = self._logits(input_ids, document_ids)
        return logits[:, -1:] if last_only else logits

    def _logits(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return `logits` from within a forward pass, where a sharded model must not begin another forward pass."""
        logits: Tensor = self._outputs(self.network, input_ids, document_ids).logits
        return logits.view(*input_ids.shape, -1)

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> HuggingFaceCache:
        """Return an empty cache, which grows as it fills; `first_slots` [b] counts each row's padding on the left."""
        return HuggingFaceCache(
            self.causal_lm.config, batch_size=batch_size, first_slots=first_slots, device=self.device
        )

    def hidden(self, input_ids: Tensor, document_ids: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return [b, t, d] hidden states after the final norm, the input of the output layer."""
        outputs = self._outputs(self._base, input_ids, document_ids, cu_seqlens)
        hidden: Tensor = outputs.last_hidden_state if hasattr(outputs, "last_hidden_state") else outputs[0]
        return hidden.view(*input_ids.shape, -1)

    @property
    def causal_lm(self) -> Any:
        """Model of transformers, without peft's wrapper."""
        return self.network.get_base_model() if hasattr(self.network, "get_base_model") else self.network

    @property
    def vocab_size(self) -> int:
        """Number of scores per position."""
        return int(self._text_config.vocab_size)

    @property
    def max_seq_len(self) -> int | None:
        """Longest sequence that the model takes, in tokens; None if it has no such limit."""
        return getattr(self._text_config, "max_position_embeddings", None)

    def check_length(self, seq_len: int, *, path: str) -> None:
        """Raise ConfigError if the model at `path` takes only rows shorter than `seq_len` tokens."""
        if self.max_seq_len is not None and seq_len > self.max_seq_len:
            raise ConfigError(
                f"data.seq_len is {seq_len}, but the model in {path} takes at most "
                f"{counted(self.max_seq_len, 'token')}: lower "
                "data.seq_len"
            )

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        parameter: Tensor = next(self.network.parameters())
        return parameter.device

    def num_parameters(self, *, trainable: bool = False, non_embedding: bool = False) -> int:
        """Count the parameters, tied ones once. A tensor in 4 bits counts as many weights as it encodes.

        `trainable` counts only trained parameters; `non_embedding` only those that a token is multiplied with.
        """
        left_out = self._lookup_tables() if non_embedding else set()
        found = (p for p in self.network.parameters() if p.requires_grad or not trainable)
        return sum(_numel(parameter) for parameter in found if id(parameter) not in left_out)

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward and backward in the convention of PaLM (arXiv:2204.02311, appendix B), without recomputation.

        A trainable parameter counts 6. A frozen one counts 4, since its own gradient is not computed. Lookup tables
        count nothing. Of a mixture's experts only those count that a token goes through. Attention adds 12·L·width·T.
        """
        config, tables = self._text_config, self._lookup_tables()
        experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
        total = 0.0
        for name, parameter in self.network.named_parameters():
            if id(parameter) not in tables:
                per_weight = 6 if parameter.requires_grad else 4
                total += per_weight * _numel(parameter) * (share if ".experts." in name else 1.0)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        return int(total) + 12 * int(config.num_hidden_layers) * int(width) * seq_len

    def assume_standard(self) -> None:
        """Assume the usual head and packing, for a model without values, which cannot be tried with a first batch."""
        self._head_is_known = True
        self._packing = "positions"

    def tensor_parallel_plan(self, size: int) -> dict[str, str]:
        """Return by name how each layer is split over `size` ranks, from the plan that transformers has for the model.

        Raises ConfigError if there is no plan, if the plan has styles that are not known here, or if `size` does not
        divide the heads.
        """
        config, kind = self._text_config, type(self.causal_lm).__name__
        theirs: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
        if not theirs:
            raise ConfigError(f"distributed.strategy is fsdp_tp, but transformers has no plan for {kind}: use fsdp")
        reject_uneven(
            {
                f"the model's {name}": int(number)
                for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
                if (number := getattr(config, name, None))
            },
            size=size,
        )
        prefix = next(name for name, module in self.named_modules() if module is self._base)
        plan = dict[str, str]()
        for name, style in theirs.items():
            is_head_norm = style == "replicated_with_grad_allreduce" and name.endswith(("q_norm", "k_norm"))
            known = "per_head" if is_head_norm else style
            if known not in STYLES:
                raise ConfigError(
                    f"distributed.strategy is fsdp_tp, but {kind} splits {name} in a way that is not supported "
                    f"({style}): use fsdp"
                )
            plan[f"{prefix}.{name}"] = known
        return plan

    @property
    def keep_in_float32(self) -> Sequence[str]:
        """Names of modules and tensors that are never bfloat16, by the model's own code."""
        return sorted(getattr(self.causal_lm, "_keep_in_fp32_modules_strict", None) or ())

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return int(self._text_config.num_hidden_layers)

    @property
    def checkpointable(self) -> Sequence[int]:
        """Numbers of blocks that `checkpoint_blocks` takes. Code of older models has one switch for all blocks."""
        if not self.causal_lm.supports_gradient_checkpointing:
            return (0,)
        each = all(hasattr(layer, "gradient_checkpointing") for layer in self.layers())
        return range(self.num_blocks + 1) if each else (0, self.num_blocks)

    def checkpoint_blocks(self, count: int | None = None) -> None:
        """Keep only the inputs of the first `count` blocks (None: of all), which the backward pass recomputes.

        Raises ConfigError if the model cannot do so.
        """
        causal_lm, options = self.causal_lm, {"use_reentrant": False}
        if not causal_lm.supports_gradient_checkpointing:
            raise ConfigError(
                f"trainer.activation_checkpointing: {type(causal_lm).__name__} does not support it; set it to none"
            )
        kept = [] if count is None else self.layers()[count:]
        if any(not hasattr(layer, "gradient_checkpointing") for layer in kept):
            raise ConfigError(
                f"trainer.activation_checkpointing: {type(causal_lm).__name__} recomputes all of its blocks or none: "
                "set it to full or none"
            )
        if hasattr(causal_lm, "activation_checkpointing_enable"):
            causal_lm.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:  # the older name of the method
            causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        for layer in kept:
            setattr(layer, "gradient_checkpointing", False)  # noqa: B010 (as a field, it would have to be a module)

    def compile_parts(self, **options: Any) -> None:
        """Compile the blocks, which share their compiled code, and the loss. Parameters keep their names."""
        for block in self.layers():
            block.compile(**options)
        self._loss_kernels = compiled_kernels(**options)
        self._attention_is_chosen = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFaceModel:
        """Move and cast all tensors, but do not cast buffers that are derived from the config, as rotary frequencies.

        In bfloat16 the frequencies would be wrong by up to 0.4 %, and so would the positions in a long sequence.
        """
        derived = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set and buffer.is_floating_point()
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in derived:
            moved = module._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                module._buffers[name] = buffer.to(moved.device)
        return self

    # -- the parts of the network --------------------------------------------------------------------------------------

    @property
    def _base(self) -> Any:
        """Model without its output layer."""
        return getattr(self.causal_lm, self.causal_lm.base_model_prefix)

    def _lookup_tables(self) -> set[int]:
        """Return the ids of the embedding tables, without one that is tied to the output layer."""
        causal_lm = self.causal_lm
        tables = [module for module in causal_lm.modules() if isinstance(module, nn.Embedding)]
        return {id(table.weight) for table in tables} - {id(getattr(causal_lm.get_output_embeddings(), "weight", 0))}

    @property
    def _text_config(self) -> Any:
        return self.causal_lm.config.get_text_config()

    def layers(self) -> list[nn.Module]:
        """Return the blocks, which are compiled and sharded one at a time."""
        for module in self._base.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_blocks:
                return list(module)
        raise ConfigError(f"trainer.compile: no blocks found in {type(self.causal_lm).__name__}; set it to false")

    def _head(self) -> Head:
        """Return the output layer with the model's change to logits: Gemma caps them, Cohere and Granite scale them."""
        config = self._text_config
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        if config.model_type.startswith("granite"):
            scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        linear = self.causal_lm.get_output_embeddings()
        return Head(linear, scale=scale, softcap=getattr(config, "final_logit_softcapping", None))

    @torch.no_grad()
    def _knows_head(self, input_ids: Tensor) -> bool:
        """Return whether `_head` gives the model's own logits, which is tried once. If not, its own forward is used."""
        if self._head_is_known is None:
            few = input_ids[:1, :4]
            with self._evaluating():
                theirs = self._logits(few).float()
                ours = self._head().logits(self.hidden(few)).float()
            self._head_is_known = bool(_error(ours, theirs) < _tolerance(self.device, self._base))
        return self._head_is_known

    @contextmanager
    def _head_sees_only(self, positions: Tensor) -> Iterator[None]:
        """Pass the output layer only the hidden states of these positions of the flattened batch, within the block."""
        head = self.causal_lm.get_output_embeddings()

        def gather(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, 1)[positions][None], *args[1:])

        handle = head.register_forward_pre_hook(gather)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Turn off dropout, autocast's cache and compiled code within the block, in which the model is tried.

        If autocast cached a weight that is first cast here, without gradients, the weight would have no gradient in the
        step. Compiled code is off because a few tokens are not worth a compilation.
        """
        device = self.device.type
        training = [module for module in self.network.modules() if module.training]
        self.network.eval()
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        try:
            with (
                torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False),
                torch.compiler.set_stance("force_eager"),
            ):
                yield
        finally:
            for module in training:
                module.training = True

    def _continued(self, input_ids: Tensor, cache: HuggingFaceCache, *, last_only: bool) -> Tensor:
        knows_head = self._knows_head(input_ids[:1, -1:])
        module, num_tokens = self._base if knows_head else self.causal_lm, input_ids.shape[1]
        inputs: dict[str, Any] = {"attention_mask": cache.mask(num_tokens)}
        if "position_ids" in inspect.signature(module.forward).parameters:
            inputs["position_ids"] = cache.positions(num_tokens)
        outputs = module(input_ids=input_ids, past_key_values=cache.past, use_cache=True, **inputs)
        cache.advance(num_tokens)
        found: Tensor = outputs[0][:, -1:] if last_only else outputs[0]
        return self._head().logits(found) if knows_head else found

    # -- documents in one row ------------------------------------------------------------------------------------------

    def _outputs(
        self, module: Any, input_ids: Tensor, document_ids: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> Any:
        if document_ids is None or not _has_several(document_ids):
            with rows_hold_several(False):
                return module(input_ids=input_ids, use_cache=False)
        if self._packing is None:
            self._packing = self._find_packing(input_ids)
        return self._packed(module, input_ids, document_ids, cu_seqlens, packing=self._packing)

    def _packed(
        self,
        module: Any,
        input_ids: Tensor,
        document_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        packing: Packing,
    ) -> Any:
        positions = restarting_positions(document_ids)
        bounds: dict[str, Any] = {}
        mask = None
        if packing in ("flat", "varlen"):
            input_ids, positions = input_ids.reshape(1, -1), positions.reshape(1, -1)
            if packing == "varlen":
                mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=positions.device)
            if cu_seqlens is None:  # the loader makes them; others wait here for the GPU
                starts = (positions[0] == 0).nonzero()[:, 0]
                cu_seqlens = torch.cat((starts, starts.new_tensor([positions.numel()]))).int()
            if _takes_any_keyword(self._base.forward):
                # Without them each layer derives them from the positions, and waits for the GPU to do so.
                bounds = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), cu_seqlens)
                bounds |= dict.fromkeys(("max_length_q", "max_length_k"), document_ids.shape[1])
        if packing == "mask":
            allowed = block_causal(document_ids)
            dtype = next(p.dtype for p in self._base.parameters() if p.is_floating_point())
            mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            mask = mask.masked_fill(~allowed, torch.finfo(dtype).min)
        with rows_hold_several(True):
            return module(input_ids=input_ids, position_ids=positions, attention_mask=mask, use_cache=False, **bounds)

    @torch.no_grad()
    def _find_packing(self, input_ids: Tensor) -> Packing:
        """Return the first packing with which a document in a packed row has the same hidden states as alone.

        Raises ConfigError if there is none.
        """
        causal_lm, config = self.causal_lm, self._text_config
        kind, attention = type(causal_lm).__name__, config._attn_implementation
        layers = set(getattr(config, "layer_types", None) or [])
        recurrent = getattr(causal_lm, "_is_stateful", False) or any("attention" not in layer for layer in layers)
        if recurrent or any("linear" in layer for layer in layers):
            raise _cannot_pack(kind, "its state passes from one document of a row to the next")
        ways: list[Packing] = ["flat"] if "flash" in str(attention) else ["positions"]
        if attention == VARLEN and _takes_any_keyword(self._base.forward):
            ways.insert(0, "varlen")
        if "position_ids" not in inspect.signature(self._base.forward).parameters:
            raise _cannot_pack(kind, "its positions cannot restart within a row")
        if (
            attention in ("eager", "sdpa", BLOCKED, VARLEN)
            and not getattr(config, "sliding_window", None)
            and len(layers) < 2
        ):
            ways.append("mask")
        for way in ways:
            with self._evaluating(), suppress(NotCovered):
                if self._keeps_apart(input_ids, way):
                    return way
        raise _cannot_pack(kind, f"with attention {attention} documents in one row attend to each other")

    def _keeps_apart(self, input_ids: Tensor, packing: Packing) -> bool:
        """Return whether a second document in a row has the same hidden states as alone, whatever the first one is.

        Two rows of two documents each are tried, whose first documents differ. The comparison has the same tokens, one
        document a row, since int8 layers round by the largest value of all tokens in a batch.
        """
        vocab_size, device = self.vocab_size, input_ids.device
        first, other, second = (torch.arange(start, start + 6, device=device) % vocab_size for start in (3, 11, 29))
        rows = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
        documents = torch.tensor([0] * 6 + [1] * 6, device=device).expand(2, -1)
        hidden = self._packed(self._base, rows, documents, packing=packing)
        hidden = getattr(hidden, "last_hidden_state", hidden).reshape(2, 12, -1)
        alone = self._base(input_ids=torch.stack([first, second, other, second]), use_cache=False)
        alone = getattr(alone, "last_hidden_state", alone)[1]
        tolerance = _tolerance(self.device, self._base)
        return bool(_error(hidden[0, 6:], hidden[1, 6:]) < tolerance and _error(hidden[0, 6:], alone) < 4 * tolerance)


def block_causal(document_ids: Tensor) -> Tensor:
    """Return [b, 1, t, t] bool: true where the query (row) may attend to the key (column)."""
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same.tril()


def _has_several(document_ids: Tensor) -> bool:
    """Return whether a row has several documents, without asking a GPU, which would have to be waited for."""
    on_gpu = device_type_of(document_ids.device) == "cuda"
    return on_gpu or bool((document_ids[:, 1:] != document_ids[:, :-1]).any())


def _takes_any_keyword(function: Callable[..., Any]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())


def _error(found: Tensor, expected: Tensor) -> Tensor:
    """Return the largest difference, relative to the largest value."""
    return (found - expected).abs().max().float() / expected.abs().max().float().clamp(min=1e-6)


def _tolerance(device: torch.device, module: nn.Module) -> float:
    """Return the allowed `_error`, which is larger in 16 bits than in float32."""
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return 0.02 if narrow or torch.is_autocast_enabled(device.type) else 1e-4


def _numel(parameter: Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def _cannot_pack(kind: str, why: str) -> ConfigError:
    return ConfigError(f"data.packing: {kind} cannot train on packed rows, since {why}: set data.packing=false")
