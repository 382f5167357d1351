"""`make demo-finetune`: the model of `make demo` learns to answer questions about functions, and shows that it does.

rows of the standard library's functions → LoRA (`finetune-local`) → base and tuned on held-out rows, compared →
published, if better → loaded once more, in plain transformers
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.demos.function_rows import OUTPUT, function_rows
from llmtrain.distributed.native_bf16 import with_computing_dtype
from llmtrain.errors import ConfigError, RunError
from llmtrain.screen import counted, known_width, visible, wrapped
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.publish import publish
from llmtrain.verbs.train import train

MAX_NEW_TOKENS = 48
SHOWN = ("loss", "perplexity", "bits_per_byte", "exact_match", "rougeL", "chrf")
SAMPLES = 3
REQUIRED = "exact_match"
"""Published only if the comparison shows that this is better."""
LICENSE = "other"


def main() -> int:
    """Run the demo. The exit code: 1 if the tuned model is not shown to be better, or not the same in transformers."""
    try:
        return demo_finetune()
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def demo_finetune(
    *, corpus: Sequence[str] = (), overrides: Sequence[str] = (), required: str = REQUIRED, num_test: int | None = None
) -> int:
    """Make rows, fine-tune, compare, publish; print what came of it.

    `corpus` overrides keys of quickstart, whose files the rows are from, `overrides` those of finetune-local;
    `num_test`: only so many held-out rows. Raises ConfigError where there is no run of quickstart, RunError if
    `required` is not shown to be better.
    """
    began = time.monotonic()
    options = load_config("quickstart", corpus).config.prepare
    assert isinstance(options, PrepareConfig)
    counts = function_rows(options, OUTPUT)
    print("\n".join(f"{OUTPUT / split}.jsonl  {counted(count, 'row')}" for split, count in counts.items()))
    run = train(load_config("finetune-local", overrides))
    asked = {"data": [str(OUTPUT / "test.jsonl")], "max_new_tokens": MAX_NEW_TOKENS, "max_samples": num_test}
    found = evaluate(run["run"], settings=asked)
    predictions = _read_lines(Path(found["output"]) / "predictions.jsonl")
    _print_samples(predictions)
    _print_comparison(found)
    done = publish(
        run["run"],
        given={"license": LICENSE, "require_improvement": required},
        root_dir=str(Path(run["run"]).parent),
    )
    same = _same_in_transformers(Path(done["to"]), predictions[:SAMPLES])
    print(f"\npublished  {done['to']}")
    print(f"           loaded in plain transformers: {same} of {SAMPLES} answers are the same there")
    print(f"report     {found['output']}/report.html\nrun        {run['run']}")
    print(f"time       {(time.monotonic() - began) / 60:.1f} minutes")
    return 0 if same == SAMPLES else 1


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def _print_samples(predictions: list[dict[str, Any]]) -> None:
    """The first questions of the held-out rows, and what was answered before and after."""
    print(f"\nThe first {SAMPLES} questions about files that neither model has seen:")
    for row in predictions[:SAMPLES]:
        print("\n" + textwrap.indent(row["prompt"].strip("\n"), "    │ "))
        for who, text in (
            ("expected", row["expected"]),
            ("before", row["baseline"]["prediction"]),
            ("after", row["prediction"]),
        ):
            told = f"    {who:<9} {visible(' '.join(text.split())[:100])}"
            print("\n".join(wrapped(told, known_width(1), indent=10)))


def _print_comparison(found: Mapping[str, Any]) -> None:
    print(f"\n{found['rows']} held-out questions, before and after\n")
    print(f"    {'':<14} {'before':>8} {'after':>8} {'difference':>11}   95 % interval")
    for name in SHOWN:
        one = found["comparison"].get(name)
        if one is not None:
            interval = f"{one['low']:+.3g} … {one['high']:+.3g}"
            print(
                f"    {name:<14} {one['base']:8.3g} {one['tuned']:8.3g} {one['difference']:+11.3g}   {interval:<18} "
                f"{one['verdict']}"
            )


def _same_in_transformers(folder: Path, predictions: list[dict[str, Any]]) -> int:
    """Return how many of the answers a program that knows only transformers and peft writes, too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = with_computing_dtype(AutoModelForCausalLM.from_pretrained(folder), torch.device("cpu")).eval()
    same = 0
    for row in predictions:
        ids = tokenizer(row["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        written = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        same += tokenizer.decode(written, skip_special_tokens=True) == row["prediction"]
    return same


if __name__ == "__main__":
    sys.exit(main())
