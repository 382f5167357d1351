"""Times the optimizer steps of anything that trains with torch, and looks into two of them with the profiler.

    with StepClock(setting, …) as clock: train()   ─▶ clock.result()

It counts by torch's own hook after each optimizer step, so ours and every peer are measured alike.
"""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.setting import Setting

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
"""The last one is ours alone, at the end of what is profiled."""
CAUSES = ("aten::_local_scalar_dense", "aten::nonzero")
MOST_KERNELS = 12


class Measured(Exception):
    """Raised in a training that has taken all steps that are measured, so that it ends without saving."""


class StepClock:
    """Context manager: after `warm_up` steps it times `steps`, then profiles `profiled`, then may raise Measured."""

    def __init__(self, setting: Setting, *, warm_up: int, steps: int, profiled: int = 2, ends_run: bool = True) -> None:
        self._setting = setting
        self._first, self._last, self._end = warm_up, warm_up + steps, warm_up + steps + profiled
        self._steps, self._profiled, self._ends_run = steps, profiled, ends_run
        self._optimizer: int | None = None
        self._count = 0
        self._began = self._seconds = 0.0
        self._profile: profile | None = None
        self._seen: dict[str, Any] = {}

    @property
    def num_steps(self) -> int:
        """Steps that the training has to take."""
        return self._end

    def __enter__(self) -> StepClock:
        self._setting.forget()
        self._handle = register_optimizer_step_post_hook(self._stepped)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        self._handle.remove()
        if self._profile is not None:
            self._stop_profile()
        return isinstance(error, Measured)

    def result(self, *, tokens_per_step: int) -> dict[str, Any]:
        """Return speed, memory and what the profiler saw. Raises RuntimeError if the training ended too early."""
        if not self._seconds:
            raise RuntimeError(f"the training ended after {self._count} of {self._end} steps")
        seconds = self._seconds / self._steps
        speed = tokens_per_step / seconds
        return {"tokens_per_sec": speed, "step_sec": seconds, "peak_gb": self._peak_gb, **self._seen}

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        self._optimizer = self._optimizer or id(optimizer)
        if id(optimizer) != self._optimizer:
            return  # the second optimizer of a step, as Muon has AdamW beside it
        self._count += 1
        if self._count == self._first:
            self._setting.synchronize()
            self._began = time.perf_counter()
        if self._count == self._last:
            self._setting.synchronize()
            self._seconds = time.perf_counter() - self._began
            self._peak_gb = self._setting.peak_memory_gb()
            gpu = [ProfilerActivity.CUDA] if self._setting.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()
            self._began = time.perf_counter()
        if self._count == self._end:
            self._setting.synchronize()
            self._stop_profile()
            if self._ends_run:
                raise Measured

    def _stop_profile(self) -> None:
        assert self._profile is not None
        window = time.perf_counter() - self._began
        profiled, self._profile = self._profile, None
        profiled.stop()
        self._seen = what_was_seen(profiled.events(), window=window, steps=self._profiled)  # type: ignore[no-untyped-call]


def what_was_seen(events: Any, *, window: float, steps: int) -> dict[str, Any]:
    """Return, of `steps` steps that took `window` seconds, waits, synchronizations a step, and the longest kernels.

    gpu_idle   share of the time in which no kernel ran
    host_wait  share of the time in which the host waited for the GPU: its idle time
    """
    on_gpu = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
    counts = Counter(event.name for event in events if event.name in (*WAITS[:2], *CAUSES))
    waits = sum(counts[name] for name in (WAITS[:2] if on_gpu else CAUSES))
    pageable = sum("Pageable" in event.name for event in on_gpu)
    waited = sum(event.time_range.elapsed_us() for event in events if event.name in WAITS)
    kernels: Counter[str] = Counter()
    for event in on_gpu or events:
        kernels[event.name[:120]] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    total = sum(kernels.values()) or 1.0
    return {
        "gpu_idle": max(0.0, 1 - _covered_us(on_gpu) / 1e6 / window) if on_gpu else None,
        "host_wait": waited / 1e6 / window,
        "syncs_per_step": waits / steps,
        "synchronizations": {**counts, "pageable copies": pageable},
        "kernels": [{"name": name, "share": used / total} for name, used in kernels.most_common(MOST_KERNELS)],
    }


def _covered_us(events: Any) -> float:
    """Return the length of the union of the events' times."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in events):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
