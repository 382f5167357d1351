"""The table of docs/scaling.md: what many GPUs should give, worked out from figures of one device and of links.

    python -m benchmarks.scaling_on_paper

Nothing here is measured. Every assumption is a constant below; change them to those of your machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PEAK = 989e12
"""FLOP/s of an H100 SXM in bf16, dense."""
GPUS_PER_NODE = 8
NVLINK = 0.8 * 450e9
"""Bytes/s each way and GPU: NVLink 4 at 80 %."""
NIC = 0.9 * 50e9
"""Bytes/s of one 400 Gbit/s adapter at 90 %."""
HOP_NODE, HOP_NETWORK = 1e-6, 5e-6
"""Seconds for a small message to the next GPU."""
NETWORKS = {"8 × 400 Gbit/s": 8 * NIC, "1 × 100 Gbit/s": NIC / 4}
"""Adapters of a node, and the bytes/s that a ring over nodes gets: each adapter carries a ring of its own."""


@dataclass(frozen=True)
class Case:
    """A model and what one GPU computes of a step."""

    name: str
    strategy: str
    parameters: float
    flops_per_token: float
    tokens: int
    layers: int
    mfu: float
    """Assumed of one GPU."""

    @property
    def compute_sec(self) -> float:
        return self.tokens * self.flops_per_token / (self.mfu * PEAK)

    def exchange_sec(self, gpus: int, network: float) -> float:
        """ddp: all-reduce of float32 gradients. fsdp: bf16 weights gathered twice, float32 gradients reduced once.

        Replicas: fsdp within a node, then each GPU sums its shard of the gradients with its peers on other nodes.
        """
        if gpus == 1:
            return 0.0
        if self.strategy == REPLICAS and gpus > GPUS_PER_NODE:
            nodes = gpus // GPUS_PER_NODE
            # A GPU sends twice its eighth of the gradients, over its eighth of the node's bandwidth.
            between = 8 * self.parameters * (nodes - 1) / nodes / min(NVLINK, network)
            hops = (self.layers + 1) * 2 * math.log2(nodes) * HOP_NETWORK
            return self.exchange_sec(GPUS_PER_NODE, network) + between + hops
        bandwidth = NVLINK if gpus <= GPUS_PER_NODE else min(NVLINK, network)
        hop = HOP_NODE if gpus <= GPUS_PER_NODE else HOP_NETWORK
        num_bytes = 8 * self.parameters * (gpus - 1) / gpus  # either way
        if self.strategy == "ddp":
            buckets = math.ceil(4 * self.parameters / 25e6)
            return num_bytes / bandwidth + buckets * 2 * math.log2(gpus) * hop  # trees
        return num_bytes / bandwidth + 3 * (self.layers + 1) * (gpus - 1) * hop  # rings


REPLICAS = "fsdp, a replica a node"
CASES = (
    Case("124M", "ddp", 124e6, 6 * 124e6 + 12 * 12 * 768 * 1024, 32 * 1024, 12, 0.40),
    Case("1.3B", "fsdp", 1.3e9, 6 * 1.3e9 + 12 * 24 * 2048 * 2048, 8 * 2048, 24, 0.40),
    Case("1.3B", REPLICAS, 1.3e9, 6 * 1.3e9 + 12 * 24 * 2048 * 2048, 8 * 2048, 24, 0.40),
    Case("8B", "fsdp", 8.0e9, 6 * 8.0e9 + 12 * 32 * 4096 * 8192, 8192, 32, 0.33),
    Case("8B", REPLICAS, 8.0e9, 6 * 8.0e9 + 12 * 32 * 4096 * 8192, 8192, 32, 0.33),
)


def main() -> None:
    """Print the tables."""
    for network, bandwidth in NETWORKS.items():
        print(f"\nnodes with {network}\n")
        print(
            "| model, strategy | GPUs | compute, ms | exchange, ms | tokens/s, all hidden | none hidden | efficiency |"
        )
        print("|---|---|---|---|---|---|---|")
        for case in CASES:
            for gpus in (8, 64, 1024):
                compute, exchange = case.compute_sec, case.exchange_sec(gpus, bandwidth)
                best, worst = max(compute, exchange), compute + exchange
                speeds = " | ".join(f"{case.tokens * gpus / sec / 1e6:,.2f}M" for sec in (best, worst))
                share = f"{compute / worst:.0%} to {compute / best:.0%}"
                row = f"{case.name}, {case.strategy} | {gpus:,} | {compute * 1e3:,.0f} | {exchange * 1e3:,.0f}"
                print(f"| {row} | {speeds} | {share} |")


if __name__ == "__main__":
    main()
