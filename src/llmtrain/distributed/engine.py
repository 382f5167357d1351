"""Runs a model on one or more processes: device, precision, collectives. The only file that imports Lightning Fabric.

    Resolved ─▶ Engine ─┬─ setup(model) ─▶ the model, wrapped, or sharded over the ranks
                        ├─ collectives: sum, gather, from_main, main_first
                        └─ watchdog

With one process every collective is the identity, so no caller asks whether the run is distributed. The values of
`Resolved` come from `resolve`. Checkpoints, clipping and starting processes are elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmtrain.config.sections.training import DistributedConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.group import ALONE, RankGroup
from llmtrain.distributed.nccl import set_nccl_environment
from llmtrain.distributed.peers import explained_rendezvous, keep_gloo_groups
from llmtrain.distributed.process import (
    avoid_cudnn_attention,
    keep_freed_memory,
    keep_to_usable_cores,
    release_deterministic_algorithms,
    silence_libraries,
    use_deterministic_algorithms,
    use_expandable_segments,
)
from llmtrain.distributed.rendezvous import local_world_size_of, rendezvous_file
from llmtrain.distributed.resolve import Resolved
from llmtrain.distributed.sharding import shard
from llmtrain.distributed.strategy import SHARDING
from llmtrain.distributed.watchdog import Watchdog

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's imports deprecate each other
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

T = TypeVar("T")

_POLL_SEC = 0.2
_blocks = itertools.count(1)
"""Numbers the blocks of `main_first` in this process, since a second engine may use the same store."""
_LATER_SEC = 30
"""A collective times out this long after the watchdog, whose stacks tell more. Before the loop it is the only guard."""


class Engine:
    """Devices, precision and processes of one run."""

    def __init__(self, resolved: Resolved, *, distributed: DistributedConfig, deterministic: bool = False) -> None:
        self.resolved = resolved
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.tensor_parallel_size = distributed.tensor_parallel_size if resolved.strategy == "fsdp_tp" else 1
        """Number of ranks that share each matrix. They compute the same rows, and each of them counts these rows."""
        self.local_world_size = local_world_size_of(self.world_size)
        """Number of the run's processes on this machine."""
        accelerator, _, index = resolved.device.partition(":")
        reproducible = accelerator == "cpu" or deterministic
        self._release: weakref.finalize[..., Engine] | None = None
        if reproducible:  # on a CPU too, where the compiled backward of an embedding otherwise differs from run to run
            use_deterministic_algorithms(user := object())
            self._release = weakref.finalize(self, release_deterministic_algorithms, user)
        silence_libraries(resolved.device)
        if resolved.backend == "nccl":
            set_nccl_environment()
        keep_to_usable_cores(num_processes=self.local_world_size)
        if accelerator == "cpu":
            keep_freed_memory()
        elif accelerator == "cuda":
            use_expandable_segments()
            avoid_cudnn_attention()
        self._timeout = timedelta(seconds=distributed.timeout_sec + _LATER_SEC)
        if (file := rendezvous_file(distributed.rendezvous)) and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                resolved.backend,
                init_method=file,
                rank=int(os.environ["RANK"]),
                world_size=self.world_size,
                timeout=self._timeout,
            )
        precision = _precision(resolved)
        plugins = [*precision.pop("plugins", []), *([TorchElasticEnvironment()] if "WORLD_SIZE" in os.environ else [])]
        self._fabric = Fabric(
            accelerator=accelerator,
            devices=[int(index)] if index else self.local_world_size,
            num_nodes=self.world_size // self.local_world_size,
            # Without find_unused_parameters, DDP regroups the gradients after its first step. That changes the order in
            # which the gradients of more than two ranks are summed, so a resumed run would differ in the last bits.
            strategy=self._strategy(
                find_unused_parameters=distributed.find_unused_parameters or (reproducible and self.world_size > 2),
                replicate=distributed.replicate,
            ),
            plugins=plugins,
            **precision,
        )
        with explained_rendezvous():
            self._fabric.launch()
        self.rank = self._fabric.global_rank
        self.device = self._fabric.device
        self._save_group: RankGroup | None = None
        # Numbers of the host are exchanged by the hosts, so that they do not wait for what their GPUs have to do.
        self._hosts = None
        if self.world_size > 1 and resolved.backend == "nccl":
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
        self.watchdog = Watchdog(rank=self.rank, world_size=self.world_size, timeout_sec=float(distributed.timeout_sec))

    def _strategy(self, *, find_unused_parameters: bool, replicate: int) -> str | DDPStrategy | ModelParallelStrategy:
        if self.resolved.strategy == "ddp":
            return DDPStrategy(
                process_group_backend=self.resolved.backend,
                timeout=self._timeout,
                find_unused_parameters=find_unused_parameters,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,  # they are tables, which are the same on every rank
            )
        if self.is_sharded:
            return ModelParallelStrategy(
                partial(shard, precision=self.resolved.precision, replicate=replicate),
                data_parallel_size=self.data_parallel_size,
                tensor_parallel_size=self.tensor_parallel_size,
                process_group_backend=self.resolved.backend,
                timeout=self._timeout,
            )
        return "auto"

    @property
    def is_main(self) -> bool:
        """True on the process that writes the run's files."""
        return bool(self.rank == 0)

    @property
    def is_sharded(self) -> bool:
        """True if `setup` shards the parameters over the ranks."""
        return self.resolved.strategy in SHARDING

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks, or of groups that share matrices, among which a step's rows are divided.

        Gradients are averaged over them.
        """
        return self.world_size // self.tensor_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        """Number of this rank, or of its group, among them, which decides its share of the rows."""
        return int(self.rank) // self.tensor_parallel_size

    # -- the model ---------------------------------------------------------------------------------------------------

    def setup(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it for precision and data parallelism. Call the result, not `model`.

        Under fsdp the model's parameters are sharded in place; parameters on the meta device get no values.
        """
        # `shard` moves the tensors itself; Fabric would only warn that some are on another device before.
        wrapped = self._fabric.setup_module(model, move_to_device=not self.is_sharded)
        if hasattr(model, "logits"):
            wrapped.mark_forward_method("logits")
        return cast(nn.Module, wrapped)

    def to_device(self, batch: Batch) -> Batch:
        """Return the batch on this rank's device. The host does not wait for the copy of pinned memory."""
        self.watchdog.beat()
        moved = {name: cast(Tensor, tensor).to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return cast(Batch, moved)

    def to_host(self, values: Tensor) -> Callable[[], list[float]]:
        """Begin to copy `values` [n] to the host. The result waits for the copy, not for work queued after it."""
        copied, done = values, None
        if values.device.type == "cuda":
            copied, done = values.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()

        def read() -> list[float]:
            if done is not None:
                done.synchronize()
            numbers: list[float] = copied.tolist()
            self.watchdog.beat()
            return numbers

        return read

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those of the parameters."""
        self._fabric.backward(loss)
        self.watchdog.beat()

    def no_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Skip the gradient exchange within the block if `enabled`: only the last micro-batch of a step needs it.

        It has no effect where `Resolved.reduce_each_micro_batch` says so.
        """
        if self.resolved.strategy == "single" or self.resolved.reduce_each_micro_batch:
            return contextlib.nullcontext()
        return cast(AbstractContextManager[None], self._fabric.no_backward_sync(model, enabled=enabled))

    @contextlib.contextmanager
    def generating(self, module: nn.Module) -> Iterator[None]:
        """Let all ranks call the `logits` of `module`, the result of `setup`, within the block.

        If the module is sharded, `logits` is a collective in the precision of training: all ranks call it with the same
        tokens and get rank 0's result. If ranks rounded differently and chose different tokens, one of them would soon
        wait for a forward pass that no other rank makes.
        """
        if not self.is_sharded:
            yield
            return
        assert isinstance(module, FSDPModule)
        compute = cast(Callable[..., Tensor], module.logits)

        def logits(*args: Any, **kwargs: Any) -> Tensor:
            scores = compute(*args, **kwargs).contiguous()
            torch.distributed.broadcast(scores, src=0)
            self.watchdog.beat()
            return scores

        setattr(module, "logits", logits)  # noqa: B010 (as a field, it would have to be a module)
        try:
            with self._fabric.autocast():
                yield
        finally:
            setattr(module, "logits", compute)  # noqa: B010
            module.reshard()  # else parameters outside of the layers stay full, and out of date after the next update

    # -- collectives -------------------------------------------------------------------------------------------------

    def sum(self, *values: int) -> list[int]:
        """Sum each value over the ranks."""
        return self._summed(values, torch.int64)

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Sum each value over the ranks, in float64."""
        return self._summed(values, torch.float64)

    def _summed(self, values: Sequence[T], dtype: torch.dtype) -> list[T]:
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=dtype)
        torch.distributed.all_reduce(tensor, group=self._hosts)
        totals: list[T] = tensor.tolist()
        self.watchdog.beat()
        return totals

    def sum_on_device(self, value: Tensor) -> Tensor:
        """Sum a number over the ranks where it lies, in float64. No host waits for it."""
        if self.world_size == 1:
            return value
        total = value.double()
        torch.distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Return every rank's value (small, plain), in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        self.watchdog.beat()
        return cast(list[T], values)

    def from_main(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its result on every rank."""
        return cast(T, self._fabric.broadcast(make() if self.is_main else None, src=0))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks run it, so that they find what rank 0 has made.

        They wait as long as it takes, which may be hours. A collective would time out.
        """
        if self.world_size == 1:
            yield
            return
        store, key = torch.distributed.distributed_c10d._get_default_store(), f"main_first/{next(_blocks)}"
        while not self.is_main and not store.check([key]):
            time.sleep(_POLL_SEC)
        try:
            yield
        finally:
            if self.is_main:
                store.set(key, "done")

    def save_group(self) -> RankGroup | None:
        """Return the ranks that save together: all if parameters are sharded, else rank 0 alone (None on the others).

        It is a collective: all ranks call it at the same point.
        """
        if not self.is_sharded:
            return ALONE if self.is_main else None
        if self._save_group is None:
            group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
            self._save_group = RankGroup(rank=self.rank, size=self.world_size, group=group)
        return self._save_group

    def close(self) -> None:
        """Leave the process group, and restore torch's earlier settings."""
        if self._release is not None:
            self._release()
        if self.world_size > 1 and torch.distributed.is_initialized():
            keep_gloo_groups()
            torch.distributed.destroy_process_group()


def _precision(resolved: Resolved) -> dict[str, Any]:
    """Return Fabric's arguments for the precision.

    float16 gets no gradient scaler from Fabric, since the training step has one, which checkpoints save.
    """
    if resolved.precision != "16-mixed":
        return {"precision": resolved.precision if resolved.precision != "32" else "32-true"}
    plugin = MixedPrecision("16-mixed", device=resolved.device.partition(":")[0])
    plugin.scaler = None
    return {"plugins": [plugin]}
