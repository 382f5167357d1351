"""`make demo`: from raw text to a model that writes, in eight minutes, and how it compares with gzip and xz.

    measure matrix products ─▶ a size of the quickstart config that fits ─▶ trainer.max_minutes measures its steps
                                        ▲                                         │           │
                                        └────── too slow for it: a smaller one ───┘           └─▶ train

A second of products does not see what other processes will take, so the steps themselves have the last word.
What is trained is an ordinary config: the run's own config.yaml trains the same model again, on any machine.
"""

from __future__ import annotations

import gzip
import lzma
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.loading.load import LoadedConfig, load_config
from llmtrain.config.sections.data import TokensConfig
from llmtrain.data.manifest import find_manifest
from llmtrain.data.prepare.texts import iter_split_texts
from llmtrain.errors import ConfigError, RunError
from llmtrain.planning.target import SHARE_OF_CPU, precision_of_cpu, products_per_second
from llmtrain.screen import counted, known_width, visible, wrapped
from llmtrain.verbs.evaluate import evaluate
from llmtrain.verbs.generate import generate
from llmtrain.verbs.train import train

PROMPT = 'def read_config(path):\n    """'
MINUTES = 7.2
"""The whole of `make demo`, with set-up: less than it promises, since steps may become slower than the measured ones.
With 7.5, steps of 0.267 s became 0.31 on an otherwise idle virtual machine, and the demo took 8.1 minutes."""
MIN_TRAINING_MINUTES = 3.0
"""Training is not shorter than this, however long the set-up took."""
BEGAN = "LLMTRAIN_DEMO_BEGAN"
"""Environment variable: when `make demo` began, in seconds since 1970."""
COMPILE_MINUTES = 2.0
"""Minutes of the training time for preparing the corpus, compiling and measuring the speed: AMD Milan took 2.0."""
AFTER_TRAINING_SEC = 15.0
"""Seconds for loading the model again, compressing the text, and writing."""
EVALUATED_TOKENS = 150_000
"""Tokens of the held-out text that are evaluated after the training."""


@dataclass(frozen=True)
class Size:
    """A model, and the amount of computing from which on it is the best choice."""

    parameters: str
    flops_per_token: float
    """Forward and backward."""
    from_flops: float
    """FLOPs of the whole training from which on this model ends better than the next smaller one."""
    overrides: Sequence[str]
    """Overrides of the quickstart config: model and learning rate."""


VOCABULARY = (
    *("prepare.tokenizer.vocab_size=4096", "prepare.output=data/stdlib-4096"),
    *("data.train=data/stdlib-4096/train", "data.val=data/stdlib-4096/val"),
)
"""Half of quickstart's: the output layer takes half the time, and the text only 9 % more tokens."""
SIZES = (
    Size(
        "1.2M",
        8.2e6,
        0,
        ("model.d_model=128", "model.num_layers=3", "model.attention.num_heads=2", "optimizer.lr=5e-3"),
    ),
    Size(
        "2.6M",
        17.7e6,
        35e12,
        ("model.d_model=192", "model.num_layers=4", "model.attention.num_heads=3", "optimizer.lr=4e-3"),
    ),
    Size("4.3M", 28.7e6, 70e12, ("optimizer.lr=3e-3",)),
)
TRAINER = (
    *("trainer.micro_batch_size=8", "trainer.eval_every_steps=250", "trainer.save_every_steps=250"),
    *("trainer.max_steps=null", "trainer.max_epochs=3"),
)
TOKENS_PER_STEP = 8 * 256
"""Batches of 8 × 256 tokens, not 16: on AMD Milan 1,000 steps of the smallest model gave 1.449 bits a byte, and 500
steps on as many tokens in twice the batch 1.534."""
TOO_SLOW = 0.6
"""Share of a size's from_flops below which it is given up for a smaller one, which costs another compiling."""


def main() -> int:
    """Prepare, train, evaluate, generate; print what came of it. The exit code: 1 if the model does not beat gzip."""
    began = float(os.environ.get(BEGAN) or time.time())
    try:
        loaded, run = train_what_fits(began)
        # The whole of the held-out text, where the evaluations on the way take a sample.
        scores = evaluate(run["run"])
        sample = generate(run["run"], prompts=[PROMPT], max_new_tokens=160, temperature=0.7, top_p=0.95)[0]
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    assert isinstance(loaded.config.data, TokensConfig)
    text = held_out_text(Path(str(loaded.config.data.val)))
    gzip_bits = 8 * len(gzip.compress(text, 9)) / len(text)
    xz_bits = 8 * len(lzma.compress(text, preset=9)) / len(text)
    print(f"\nA model of {run['parameters']['total']:,} parameters wrote this after {PROMPT!r}:\n")
    print("\n".join(f"    {line}" for line in visible(PROMPT + sample["completion"]).splitlines()))
    print(f"\nHeld-out text: {counted(len(text), 'byte')} of files that it never saw\n")
    print(f"    loss        {scores['loss']:.4f} nats a token")
    print(f"    perplexity  {scores['perplexity']:.2f}")
    for name, bits in (("the model", scores["bits_per_byte"]), ("gzip -9", gzip_bits), ("xz -9", xz_bits)):
        print(f"    {name:<11} {bits:.3f} bits a byte")
    print(f"\nrun    {run['run']}\nmodel  {run['model']}\ntime   {(time.time() - began) / 60:.1f} minutes")
    print("\nThe same once more: .venv/bin/llmtrain train " + f"{run['run']}/config.yaml output.run_id=again")
    print("More text:          .venv/bin/llmtrain generate --prompt 'import '")
    return 0 if scores["bits_per_byte"] < gzip_bits else 1


def train_what_fits(began: float) -> tuple[LoadedConfig, dict[str, Any]]:
    """Train the best size for the rest of the time; return its config and the summary of the run.

    `began`: when the demo did, in seconds since 1970.
    """
    candidate = choose(time.time() - began)
    while True:
        loaded = load_config("quickstart", candidate.overrides)
        try:
            return loaded, train(loaded, check_speed=candidate.check_speed)
        except TooSlowError as slow:
            candidate = choose(time.time() - began, slow=slow)


class TooSlowError(ConfigError):
    """Report that steps are too slow for a size."""

    def __init__(self, size: Size, *, flops: float, speed: float) -> None:
        super().__init__(f"only {flops / 1e12:.1f} TFLOP fit, too few for {size.parameters} parameters")
        self.size, self.speed = size, speed


@dataclass(frozen=True)
class Candidate:
    """A size, and the time that its training may take."""

    size: Size
    minutes: float

    @property
    def overrides(self) -> list[str]:
        """Overrides of the quickstart config."""
        return [*VOCABULARY, *self.size.overrides, *TRAINER, f"trainer.max_minutes={self.minutes:.2f}"]

    def check_speed(self, num_steps: int, step_sec: float) -> None:
        """Raise TooSlowError if `num_steps` of `step_sec` are so few that a smaller size ends better."""
        flops_per_step = TOKENS_PER_STEP * self.size.flops_per_token
        if num_steps * flops_per_step < TOO_SLOW * self.size.from_flops:
            raise TooSlowError(self.size, flops=num_steps * flops_per_step, speed=flops_per_step / step_sec)


def choose(spent_sec: float, *, slow: TooSlowError | None = None) -> Candidate:
    """Return what fits into what is left of the time on this machine, and print why.

    `slow`: what was chosen before and turned out to be too slow; a smaller size is taken.
    """
    left = max(60 * MIN_TRAINING_MINUTES, 60 * MINUTES - spent_sec)
    if slow is not None:
        size, minutes = fit(slow.speed, seconds=left, sizes=SIZES[: SIZES.index(slow.size)])
        why = f"steps run at {slow.speed / 1e9:.0f} GFLOP/s only, is the machine busy? {slow}"
    elif torch.cuda.is_available() or torch.backends.mps.is_available():
        size, minutes, why = SIZES[-1], left / 60 - 1.0, "a GPU is here"
    else:
        precision = precision_of_cpu()
        flops = products_per_second(precision)
        size, minutes = fit(flops * SHARE_OF_CPU, seconds=left)
        why = f"matrix products in {precision} run at {flops / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads"
    told = f"{why}: training {size.parameters} parameters for {minutes:.1f} minutes, set-up and compiling included"
    print("\n".join(wrapped(told, known_width(1), indent=2)))
    return Candidate(size, minutes)


def fit(speed: float, *, seconds: float, sizes: Sequence[Size] = SIZES) -> tuple[Size, float]:
    """Return the best of `sizes` for `seconds` at `speed` FLOP/s, and the minutes that its training may take."""
    for size in reversed(sizes):
        evaluation = EVALUATED_TOKENS * size.flops_per_token / 3 / speed
        training = seconds - evaluation - AFTER_TRAINING_SEC
        if speed * (training - 60 * COMPILE_MINUTES) >= size.from_flops:
            break
    return size, max(1.0, training / 60)


def held_out_text(shards: Path) -> bytes:
    """The documents of the validation split, one after the other."""
    folder = find_manifest(shards)
    assert folder is not None, "the evaluation has just read them"
    return "".join(iter_split_texts(folder, "val")).encode()


if __name__ == "__main__":
    sys.exit(main())
