"""samples.jsonl: what the model in training wrote after the prompts of `tracking.samples`, one line for each prompt.

    {"step": 300, "prompt": "def f", "completion": "(x):", "turn": true}

`turn`: the completion is the model's turn of a conversation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from llmtrain.runs.json_files import json_lines_of

SAMPLES_NAME: Final = "samples.jsonl"
MAX_SAMPLES: Final = 200


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the newest samples in the order of steps. Of a step that was trained twice only the later ones count."""
    samples: dict[tuple[Any, Any], dict[str, Any]] = {}
    for line in json_lines_of(path):
        if isinstance(line.get("step"), int) and isinstance(line.get("prompt"), str) and "completion" in line:
            sample = {key: line[key] for key in ("step", "prompt", "completion")}
            samples[line["step"], line["prompt"]] = sample | ({"turn": True} if line.get("turn") else {})
    return sorted(samples.values(), key=lambda sample: sample["step"])[-MAX_SAMPLES:]
