"""What a run computes on: device, precision, processes. The one place that imports Lightning Fabric.

With one process every collective is the identity, so nobody else asks whether the run is distributed.
Checkpoints, clipping and the decision to launch processes are not here.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import re
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llmtrain.config.errors import ConfigError, Hang, Preempted
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, TrainerConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.asked import refuse_backend
from llmtrain.distributed.gang import ALONE, Gang
from llmtrain.distributed.limits import memory_bytes, usable_cores
from llmtrain.distributed.nccl import contradictions, nccl_settings
from llmtrain.distributed.rendezvous import file_to_meet_at, settle
from llmtrain.distributed.sharding import shard
from llmtrain.distributed.strategy import Choice
from llmtrain.distributed.watchdog import Watchdog

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's imports deprecate each other
    from lightning.fabric import Fabric
    from lightning.fabric.plugins import MixedPrecision
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

log = logging.getLogger("llmtrain.device")
T = TypeVar("T")


class Choose(Protocol):
    """How `auto` takes a strategy for several processes."""

    def __call__(self, *, world_size: int, precision: str, memory_bytes: int) -> Choice: ...


CUTTING = frozenset({"fsdp", "fsdp_tp"})
"""Strategies under which each rank holds a part of the parameters."""

_LOST_PEER = re.compile("gloo.*(closed by peer|reset by peer|timed out|broken pipe)|NCCL", re.IGNORECASE | re.DOTALL)
"""gloo throws plain runtime errors, whose text names its own source file."""
_TIMED_OUT = re.compile("time[d]? ?out", re.IGNORECASE)
_POLL_SEC = 0.2
_blocks = itertools.count(1)
"""Of `main_first`, in this process: a second engine may meet the others at the same store."""
_LATER_SEC = 30
"""A collective gives up so long after the watchdog, whose stacks tell more. Before the loop it is the only guard."""


@dataclass(frozen=True)
class Resolved:
    """Every `auto` of the config, decided once for a run and used again when it resumes."""

    device: str
    precision: str
    compile: bool
    strategy: str
    backend: str
    because: str = ""
    """Why this strategy, where the config left it open."""

    def as_dict(self) -> dict[str, Any]:
        """For state.json and meta.json."""
        return asdict(self)


def resolve(
    run: RunConfig,
    trainer: TrainerConfig,
    distributed: DistributedConfig,
    *,
    previous: Mapping[str, Any] | None = None,
    choose: Choose | None = None,
) -> Resolved:
    """Decide every `auto`: as `previous` did if the run is resumed, else by what this machine has.

    `choose` takes a strategy for several processes, by their number, the precision and the bytes that each has; without
    it that is ddp.

    Raises ConfigError if this machine cannot do what the config, or the resumed run, asks for, and where the config and
    the environment contradict each other about the processes.
    """
    settle(distributed.rendezvous)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(run.device)
    precision = trainer.precision
    if precision == "auto":
        precision = (previous or {}).get("precision") or ("bf16-mixed" if computes_bf16(device) else "32")
        if precision.startswith("bf16") and not computes_bf16(device):
            raise ConfigError(
                f"the run was trained in {precision}, which {device} here does not compute natively: "
                "resume it on such a machine, or say so with trainer.precision=32 (the losses will differ)"
            )
    wanted: bool | str = trainer.compile
    if wanted == "auto":
        wanted = (previous or {}).get("compile", True)
    missing = missing_for_compile() if wanted else None
    if missing:
        log.warning("torch.compile is off: %s; the run goes on without it, at about half the speed", missing)
    strategy, because = str(distributed.strategy), ""
    if strategy == "auto":
        choice = _choose(choose, previous or {}, device=device, world_size=world_size, precision=precision)
        strategy, because = choice.strategy, choice.because
    if strategy == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but {world_size} processes were started: "
            "set it to ddp or auto, or start one process"
        )
    if strategy in ("ddp", *CUTTING) and world_size == 1 and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"distributed.strategy is {strategy}, but this is one process: add --nproc N, start it as "
            "`torchrun --nproc-per-node N -m llmtrain train …`, or set distributed.strategy=auto"
        )
    backend = distributed.backend
    if backend == "auto":
        backend = "nccl" if device.startswith("cuda") else "gloo"
    refuse_backend(backend, device=device)
    return Resolved(
        device=device,
        precision=precision,
        compile=bool(wanted) and not missing,
        strategy=strategy,
        backend=backend,
        because=because,
    )


def _choose(
    choose: Choose | None, previous: Mapping[str, Any], *, device: str, world_size: int, precision: str
) -> Choice:
    if world_size == 1:
        return Choice("single", "one process")
    before = previous.get("strategy")
    if before in ("ddp", *CUTTING):
        return Choice(str(before), previous.get("because") or "as before")
    if choose is None:
        return Choice("ddp", "every process holds the whole model")
    each = _bytes_of_each(device, local_world_size=_local_world_size(world_size))
    return choose(world_size=world_size, precision=precision, memory_bytes=each)


def _bytes_of_each(device: str, *, local_world_size: int) -> int:
    """What one process has: a GPU, or its share of what this machine, or its container, has."""
    if device.startswith("cuda"):
        index = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        return int(torch.cuda.get_device_properties(index).total_memory)
    return memory_bytes() // local_world_size


def _device(wanted: str) -> str:
    if wanted == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if wanted.startswith("cuda"):
        index = int(wanted.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise ConfigError(f"run.device is {wanted}, but there are {torch.cuda.device_count()} CUDA devices here")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("run.device is mps, but there is none here")
    return wanted


def computes_bf16(device: str) -> bool:
    """Whether the hardware multiplies bf16 natively: CUDA ≥ 8.0, or a CPU with AVX512-BF16 or AMX."""
    if device.startswith("cuda"):
        major, _ = torch.cuda.get_device_capability(torch.device(device))
        return int(major) >= 8
    if device == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may move
        return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return False


def missing_for_compile() -> str | None:
    """What torch.compile would miss on this machine, or None."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        return "no C++ compiler was found (install g++ or clang++, or name one in CXX)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python's C headers were not found (install python3-dev)"
    return None


def _hush_libraries(device: str) -> None:
    """Keep lines that tell the user nothing new out of the run's output."""
    for name in ("lightning.fabric", "lightning.pytorch"):  # which precision it was asked for
        logging.getLogger(name).setLevel(logging.WARNING)
    if device == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no GPU


def keep_to_usable_cores() -> None:
    """Let torch compute on no more threads than there are cores for this process, unless the environment says how many.

    torch counts the machine's cores; in a container with a quota the rest of its threads only take turns.
    """
    cores = usable_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


def _keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a step frees, since the next step asks for the same ones.

    Otherwise each is mapped anew, and the kernel zeroes tens of thousands of pages a step: 2 to 3 % of a CPU step.
    """
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, which has its own ways
        return
    trim_threshold, mmap_threshold = -1, -3
    set_option(mmap_threshold, 1 << 30)
    set_option(trim_threshold, 1 << 30)


def _precision(resolved: Resolved) -> dict[str, Any]:
    """Fabric's arguments. In float16 without its scaler: ours is in the step, and its value in the checkpoint."""
    if resolved.precision != "16-mixed":
        return {"precision": resolved.precision if resolved.precision != "32" else "32-true"}
    plugin = MixedPrecision("16-mixed", device=resolved.device.partition(":")[0])
    plugin.scaler = None
    return {"plugins": [plugin]}


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return False
    return isinstance(error, torch.distributed.DistError) or bool(_LOST_PEER.search(str(error)))


def is_timeout(error: Exception) -> bool:
    """Of the errors of a lost peer: whether it is there, as far as anyone knows, and does not answer."""
    return bool(_TIMED_OUT.search(str(error)))


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """The processes find each other in this block; where they do not, one message says why.

    Raises ConfigError if the port that somebody chose is taken, Hang if others did not come, Preempted for the rest.
    """
    try:
        yield
    except torch.distributed.DistError as error:
        where, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        why = str(error).splitlines()[0]
        if "EADDRINUSE" in why and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's own it would choose anew
            raise ConfigError(
                f"the processes cannot meet at port {port}, where another program listens: name a free one by "
                "MASTER_PORT or distributed.rendezvous.master_port"
            ) from error
        world_size = os.environ.get("WORLD_SIZE")
        message = f"the {world_size} processes did not meet at {where}:{port} ({why}): start all, where each reaches it"
        raise (Hang if is_timeout(error) else Preempted)(message) from error


def _settle_nccl() -> None:
    for what in contradictions(os.environ):
        log.warning("%s", what)
    os.environ.update(nccl_settings(os.environ))


def abandon_groups() -> None:
    """After a peer was lost: keep gloo's groups from ever being destroyed, for their destructor waits for what is in
    flight, which may be for what the lost process owed (one start in thirty, with ddp).
    """
    for group in list(torch.distributed.distributed_c10d._world.pg_map):
        if torch.distributed.get_backend(group) == "gloo":
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _local_world_size(world_size: int) -> int:
    """Processes on this machine. Where only ranks were set, by hand, any number that can hold LOCAL_RANK will do."""
    if world_size == 1:
        return 1
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    local_rank = int(os.environ["LOCAL_RANK"])
    return next(number for number in range(local_rank + 1, world_size + 1) if world_size % number == 0)


class Engine:
    """Devices, precision and processes of one run."""

    def __init__(self, resolved: Resolved, *, distributed: DistributedConfig, deterministic: bool = False) -> None:
        self.resolved = resolved
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.replicas = distributed.ranks_per_matrix if resolved.strategy == "fsdp_tp" else 1
        """Ranks that share each matrix: they compute the same rows, and each counts them."""
        local_world_size = _local_world_size(self.world_size)
        accelerator, _, index = resolved.device.partition(":")
        reproducible = accelerator == "cpu" or deterministic
        if reproducible:
            # On a CPU the compiled backward of an embedding differs from run to run without this.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            # Filling fresh memory with NaN costs time, and nothing here reads what it has not written.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        timeout = timedelta(seconds=distributed.timeout_sec + _LATER_SEC)
        strategy: str | DDPStrategy | ModelParallelStrategy = "auto"
        if resolved.strategy == "ddp":
            strategy = DDPStrategy(
                process_group_backend=resolved.backend,
                timeout=timeout,
                # Otherwise DDP puts gradients in another order after its first step, and with it changes the order in
                # which more than two ranks' are added up: a resumed run would differ in the last bits.
                find_unused_parameters=distributed.find_unused_parameters or (reproducible and self.world_size > 2),
                gradient_as_bucket_view=True,
            )
        elif self.cuts:
            strategy = ModelParallelStrategy(
                partial(shard, precision=resolved.precision),
                data_parallel_size=self.dp_size,
                tensor_parallel_size=self.replicas,
                process_group_backend=resolved.backend,
                timeout=timeout,
            )
        _hush_libraries(resolved.device)
        if resolved.backend == "nccl":
            _settle_nccl()
        if accelerator == "cpu":
            _keep_freed_memory()
            keep_to_usable_cores()
        if (file := file_to_meet_at(distributed.rendezvous)) and not torch.distributed.is_initialized():
            torch.distributed.init_process_group(
                resolved.backend,
                init_method=file,
                rank=int(os.environ["RANK"]),
                world_size=self.world_size,
                timeout=timeout,
            )
        precision = _precision(resolved)
        plugins = [*precision.pop("plugins", []), *([TorchElasticEnvironment()] if "WORLD_SIZE" in os.environ else [])]
        self._fabric = Fabric(
            accelerator=accelerator,
            devices=[int(index)] if index else local_world_size,
            num_nodes=self.world_size // local_world_size,
            strategy=strategy,
            plugins=plugins,
            **precision,
        )
        with meeting():
            self._fabric.launch()
        self.rank = self._fabric.global_rank
        self.device = self._fabric.device
        self._timeout = timeout
        self._gang: Gang | None = None
        self.watchdog = Watchdog(rank=self.rank, world_size=self.world_size, timeout_sec=float(distributed.timeout_sec))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files."""
        return bool(self.rank == 0)

    @property
    def cuts(self) -> bool:
        """Whether `setup` leaves each rank a part of the parameters."""
        return self.resolved.strategy in CUTTING

    @property
    def dp_size(self) -> int:
        """Shares that the rows of a step have, and gradients are averaged over."""
        return self.world_size // self.replicas

    @property
    def dp_rank(self) -> int:
        """Which share of the rows this rank computes."""
        return int(self.rank) // self.replicas

    # -- the model ---------------------------------------------------------------------------------------------------

    def setup(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and wrap it for precision and data parallelism: call the result, not `model`.

        Under fsdp the model's parameters are cut over the ranks, in place; from the meta device they get no values.
        """
        # What is cut is put where it belongs then; Fabric would only warn that some of it lies elsewhere before.
        wrapped = self._fabric.setup_module(model, move_to_device=not self.cuts)
        if hasattr(model, "logits"):
            wrapped.mark_forward_method("logits")
        return cast(nn.Module, wrapped)

    def to_device(self, batch: Batch) -> Batch:
        """The batch on this rank's device."""
        moved = {name: cast(Tensor, tensor).to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return cast(Batch, moved)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to the parameters'."""
        self._fabric.backward(loss)
        self.watchdog.beat()

    def no_sync(self, model: nn.Module, *, enabled: bool) -> AbstractContextManager[None]:
        """Hold back the gradient exchange in this block: only the last micro-batch of a step needs it."""
        if self.resolved.strategy == "single":
            return contextlib.nullcontext()
        return cast(AbstractContextManager[None], self._fabric.no_backward_sync(model, enabled=enabled))

    @contextlib.contextmanager
    def asking(self, module: nn.Module) -> Iterator[None]:
        """A block in which `module`, which was set up, is asked for `logits`; by all ranks for the same ones if it is
        cut over them, for then each forward pass is a collective.

        They get those that the first rank computed: if others rounded differently, and chose another token, one would
        soon wait for a forward pass that nobody else makes. Then the precision is that of training too.
        """
        if not self.cuts:
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
            module.reshard()  # else what is outside of the layers stays whole, and stale after the next update

    # -- collectives -------------------------------------------------------------------------------------------------

    def sum(self, *values: int) -> list[int]:
        """Each value summed over the ranks."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64, device=self._collective_device)
        torch.distributed.all_reduce(tensor)
        totals = [int(value) for value in tensor.tolist()]
        self.watchdog.beat()
        return totals

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self._collective_device)
        torch.distributed.all_reduce(tensor)
        values = [float(value) for value in tensor.tolist()]
        self.watchdog.beat()
        return values

    def gather(self, value: T) -> list[T]:
        """Every rank's value (small, plain), in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[T | None] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        self.watchdog.beat()
        return cast(list[T], values)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; only there is it called."""
        return cast(T, self._fabric.broadcast(make() if self.is_main else None, src=0))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others do: it makes what they then find made.

        They wait as long as it takes, which may be hours: no collective would.
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

    def gang(self) -> Gang | None:
        """The ranks that save together: all where parameters are cut, else rank 0 alone (None on the others).

        A collective: all ranks call it at the same point.
        """
        if not self.cuts:
            return ALONE if self.is_main else None
        if self._gang is None:
            group = torch.distributed.new_group(backend="gloo", timeout=self._timeout)
            self._gang = Gang(rank=self.rank, size=self.world_size, group=group)
        return self._gang

    def close(self) -> None:
        """Leave the process group."""
        if self.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def _collective_device(self) -> torch.device:
        return self.device if self.resolved.backend == "nccl" else torch.device("cpu")
