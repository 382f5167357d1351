"""Measures the memory that a training step would hold, by running the step on tensors without storage.

    model + optimizer under FakeTensorMode ─ every new storage is recorded until it is freed ─▶ the peak

So no formula has to be kept up to date for each variant of the model and the optimizer. Token ids, and tensors that are
computed from them only, have values, since the supervised tokens decide what is computed. Compiled parts are in
`fused_graph`; what a process holds besides a step's tensors is in `memory`.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.contracts import Batch
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.distributed.resolve import Resolved
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.device_type import assume_device_type
from llmtrain.models.own_model import OwnModel
from llmtrain.planning.fused_graph import backend_without_kernels
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer

if TYPE_CHECKING:
    from llmtrain.models.huggingface.model import HuggingFaceModel

    Trainable = Decoder | HuggingFaceModel | OwnModel

PARTS = ("parameters", "gradients", "optimizer_state", "activations", "logits", "optimizer_temporary")
TRANSIENT = frozenset({"activations", "logits", "optimizer_temporary"})
"""Parts that a step allocates and frees again."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Properties of a step on one rank on which its memory depends."""

    optimizer: OptimizerConfig
    micro_batch_size: int
    seq_len: int
    num_micro_batches: int = 1
    mask_documents: bool = False
    """True if a row of a batch holds several documents, which do not attend to each other."""
    narrow_weights: bool = False
    """True if the trained weights are bfloat16 with float32 masters."""
    recomputed_blocks: int = 0
    """Number of blocks that keep only their input, and are computed again in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes that one rank holds at the peak of a step, by part."""

    parts: Mapping[str, int]
    persistent: int
    """Bytes of the trained parameters and the optimizer state, which a snapshot for a checkpoint copies."""

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(self.parts.values())

    @property
    def transient(self) -> int:
        """Bytes of the tensors that a step allocates and frees again."""
        return sum(size for part, size in self.parts.items() if part in TRANSIENT)


def step_memory(model: Trainable, step: Step, resolved: Resolved) -> StepMemory:
    """Run the second step, which begins with optimizer state, and return the memory at its peak.

    `model` may be on any device, including the meta device, and is not changed.
    """
    batch = _batch(step)
    ledger = _Ledger(model.vocab_size)
    # Tensors without storage can be on a GPU only where there is one.
    device_type = assume_device_type("cuda") if resolved.device.startswith("cuda") else nullcontext()
    with device_type, FakeTensorMode(allow_non_fake_inputs=True), ledger:
        model = _without_storage(model, in_bfloat16=resolved.precision == "bf16-true" or step.narrow_weights)
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.move(tensor, "parameters")
        saved = ledger.size_of(parameter for parameter in model.parameters() if parameter.requires_grad)
        if step.recomputed_blocks:
            model.checkpoint_blocks(step.recomputed_blocks)
        if resolved.compile:
            torch._dynamo.reset()
            model.compile_parts(backend=backend_without_kernels(ledger.mute))
        optimizer = build_optimizer(step.optimizer, model, outline=True)
        for parameter in optimizer.parameters:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: ledger.move(p.grad, "gradients")
            )
        _fill_gradients(optimizer, ledger)
        optimizer.step()
        for tensor in optimizer.state_tensors().values():
            ledger.move(tensor, "optimizer_state")
        optimizer.zero_grad()
        if step.num_micro_batches > 1:  # the last one begins with the gradients of those before
            _fill_gradients(optimizer, ledger)
        ledger.peak = 0
        _run_step(model, optimizer, batch, precision=resolved.precision, ledger=ledger)
    if resolved.compile:
        torch._dynamo.reset()
    persistent = saved + ledger.now["optimizer_state"]
    return StepMemory(parts={part: ledger.at_peak[part] for part in PARTS}, persistent=persistent)


def _run_step(model: nn.Module, optimizer: NamedOptimizer, batch: Batch, *, precision: str, ledger: _Ledger) -> None:
    autocast = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    model.train()
    ledger.part = "activations"
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        loss_sum, _ = model(batch)
    loss_sum.backward()
    del loss_sum
    ledger.part = "optimizer_temporary"
    torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()


def _fill_gradients(optimizer: NamedOptimizer, ledger: _Ledger) -> None:
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
        ledger.move(parameter.grad, "gradients")


def _batch(step: Step) -> Batch:
    """Return a micro-batch in which every token is supervised; with `mask_documents`, each row holds two documents."""
    ids = torch.zeros(step.micro_batch_size, step.seq_len, dtype=torch.int64)
    batch = Batch(input_ids=ids, labels=torch.zeros_like(ids))
    if step.mask_documents:
        halves = torch.arange(step.seq_len) * 2 // step.seq_len
        batch["document_ids"] = halves.int().repeat(step.micro_batch_size, 1)
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    return batch


def _without_storage(model: Trainable, *, in_bfloat16: bool) -> Trainable:
    """Return a copy of a model with fake tensors on the CPU; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        # The module's own variables may be tables, which are neither parameters nor buffers.
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if not isinstance(tensor, Tensor) or id(tensor) in made:
                continue
            if isinstance(tensor, nn.Parameter):
                dtype = torch.bfloat16 if in_bfloat16 and tensor.is_floating_point() else tensor.dtype
                empty = torch.zeros(tensor.shape, dtype=dtype)
                made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            else:
                made[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return copy.deepcopy(model, made)


class _Ledger(TorchDispatchMode):
    """Records every storage that an operation allocates, under the current part, until it is freed."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.part = "activations"
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = 0
        self._muted = False
        self._vocab_size = vocab_size
        self._storages: dict[int, tuple[str, int]] = {}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True, since Dynamo does not compile a frame under other modes."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with unset_fake_temporarily() if _has_values(args, kwargs or {}) else nullcontext():
            grouped = func is torch.ops.aten._grouped_mm.default
            out = _grouped_product(*args, **(kwargs or {})) if grouped else func(*args, **(kwargs or {}))
        if not self._muted:
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self._add(tensor)
        return out

    def mute(self, muted: bool) -> None:
        """Stop recording new storages (`muted`), or record them again."""
        self._muted = muted

    def move(self, tensor: Tensor | None, part: str) -> None:
        """Record a tensor's storage under another part from now on."""
        assert tensor is not None
        key = tensor.untyped_storage()._cdata
        if key in self._storages:
            old, size = self._storages[key]
            self._storages[key] = (part, size)
            self.now[old] -= size
            self.now[part] += size

    def size_of(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of the tensors' storages; a shared one counts once."""
        storages = {tensor.untyped_storage()._cdata for tensor in tensors}
        return sum(self._storages[key][1] for key in storages if key in self._storages)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        part, size = self.part, storage.nbytes()
        if part == "activations" and self._vocab_size in tensor.shape and tensor.is_floating_point():
            part = "logits"
        self._storages[storage._cdata] = (part, size)
        self.now[part] += size
        weakref.finalize(storage, self._drop, storage._cdata)
        total = sum(self.now.values())
        if total > self.peak:
            self.peak, self.at_peak = total, self.now.copy()

    def _drop(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self.now[part] -= size


def _grouped_product(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Return a tensor with the shape of a mixture's grouped product. torch's own rule only knows bfloat16."""
    groups = [] if (left.ndim == 2) != (right.ndim == 2) else [left.shape[0] if left.ndim == 3 else _length(offs)]
    return left.new_empty([*groups, left.shape[-2], right.shape[-1]])


def _length(offs: Tensor | None) -> int:
    assert offs is not None
    return int(offs.shape[0])


def _has_values(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether an operation only uses tensors with values: token ids, and what is computed from them."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if tensors:
        return not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
    return kwargs.get("dtype") in (torch.int64, torch.int32, torch.bool)
