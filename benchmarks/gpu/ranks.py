"""One process under torchrun, which trains several configs one after the other.

torchrun -m benchmarks.gpu.ranks RESULTS CONFIG …   ─▶ RESULTS: by run, its summary, or what it ended with
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed

from llmtrain.config.loading.load import load_config
from llmtrain.verbs.train import train


def main(results: Path, configs: list[str]) -> None:
    """Train each config; a run that fails leaves the others alone."""
    found: dict[str, Any] = {}
    for config in configs:
        try:
            found[Path(config).stem] = train(load_config(config, say=False))
        except Exception as error:
            traceback.print_exc()
            found[Path(config).stem] = {"error": f"{type(error).__name__}: {error}"}
        results.write_text(json.dumps(found))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # the next run meets anew, as in a process of its own


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
