"""A machine on which nothing is in the way of training, for tests that change one fact of it."""

from __future__ import annotations

from llmtrain.distributed.diagnosis import MachineFacts
from llmtrain.training.disk import DiskFacts, RunsFolder

GOOD_MACHINE = MachineFacts(
    system="Linux",
    is_wsl=False,
    cores=8,
    threads=8,
    memory_bytes=32 * 10**9,
    gpus=[],
    mps=False,
    cuda_built=True,
    nvidia_driver=False,
    bf16_on_cpu=True,
    missing_for_compile=None,
    interfaces=["eth0", "lo"],
    adapters=[],
)
RUNS = RunsFolder(path="/data/runs", free_bytes=10**12, writable=True, lacks=[])
GOOD_DISKS = DiskFacts(runs=RUNS, cache="/home/user/.cache/huggingface", cache_free_bytes=10**12)
