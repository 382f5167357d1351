"""Optimizers: which parameters each one updates, and the state that a checkpoint keeps.

    build.py        config + model ─▶ NamedOptimizer: which parameter takes which optimizer and decays
    named.py        one or two torch optimizers behind one interface; state by parameter name; float32 master weights
    masters.py      weights in bfloat16 that are rounded from float32 masters, which are saved in their place
    muon.py         Muon, for full and for sharded matrices
    adamw_8bit.py   AdamW with 8-bit state (bitsandbytes)

The learning rate of a step is computed in `training.learning_rate`.
"""

from llmtrain.training.optimizers.build import build_optimizer
from llmtrain.training.optimizers.masters import narrow_weights, trains_narrow_weights
from llmtrain.training.optimizers.named import MASTER, NamedOptimizer

__all__ = ["MASTER", "NamedOptimizer", "build_optimizer", "narrow_weights", "trains_narrow_weights"]
