"""Settings of this process that make computing fast and reproducible: threads, memory, determinism, libraries' logs."""

from __future__ import annotations

import ctypes
import logging
import os

import torch
from torch._inductor import config as inductor

from llmtrain.distributed.limits import usable_cores


def keep_to_usable_cores(*, num_processes: int = 1) -> None:
    """Limit torch's threads to this process's share of the usable cores, unless the environment sets their number.

    `num_processes` share the cores. torch reads the affinity but not a container's CPU quota, and threads beyond the
    quota would only take turns. The processes that torch.compile starts are limited in the same way.
    """
    cores = max(1, usable_cores() // num_processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
    compile_threads = inductor.compile_threads
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ and compile_threads is not None and compile_threads > cores:
        inductor.compile_threads = cores


def keep_freed_memory() -> None:
    """Let glibc keep the large blocks that a step frees, since the next step allocates the same ones.

    Otherwise each block is mapped again, and the kernel zeroes tens of thousands of pages a step, which takes 2 to 3 %
    of a step on a CPU.
    """
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, without this function
        return
    trim_threshold, mmap_threshold = -1, -3
    set_option(mmap_threshold, 1 << 30)
    set_option(trim_threshold, 1 << 30)


_users: set[object] = set()
_before: tuple[bool, bool] | None = None
"""torch's settings before the first user: deterministic algorithms, and whether new memory is filled."""


def use_deterministic_algorithms(user: object) -> None:
    """Make torch deterministic in this process, until each `user` has called `release_deterministic_algorithms`."""
    global _before
    _users.add(user)
    if _before is None:
        fills_memory: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        _before = torch.are_deterministic_algorithms_enabled(), fills_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling new memory with NaN takes time, and nothing here reads memory before writing it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def release_deterministic_algorithms(user: object) -> None:
    """Restore torch's earlier settings if `user` was the last one that needed deterministic algorithms."""
    global _before
    _users.discard(user)
    if _before is not None and not _users:
        torch.use_deterministic_algorithms(_before[0])
        torch.utils.deterministic.fill_uninitialized_memory = _before[1]  # type: ignore[attr-defined]
        _before = None


def use_expandable_segments() -> None:
    """Let CUDA's allocator grow its segments, for less fragmentation, unless the environment configures it.

    The allocator reads the variable when the first tensor is put on a GPU, so call this before.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def avoid_cudnn_attention() -> None:
    """Disable cuDNN's kernel in PyTorch's fused attention, for the rest of the process.

    With a mask, its gradients are NaN if the number of keys is 64 more than a multiple of 128 (pytorch#196678), and
    each new shape costs about half a second. A model may still select the kernel itself.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def silence_libraries(device: str) -> None:
    """Hide log lines of libraries that tell the user nothing new."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # repeats the precision
    if device == "cpu":
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # says that there is no GPU
