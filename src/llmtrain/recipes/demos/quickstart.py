"""`make demo`: the quickstart config from raw text to a model that writes, and how it compares with gzip and xz."""

from __future__ import annotations

import gzip
import lzma
import sys
import time
from pathlib import Path

from llmtrain.config.data import TokensConfig
from llmtrain.config.errors import ConfigError, RunError
from llmtrain.config.load import load_config
from llmtrain.data.manifest import find_manifest
from llmtrain.data.prepare.texts import iter_split_texts
from llmtrain.recipes.evaluate import evaluate
from llmtrain.recipes.generate import generate
from llmtrain.recipes.train import train

PROMPT = 'def read_config(path):\n    """'


def main() -> int:
    """Prepare, train, evaluate, generate; print what came of it. The exit code: 1 if the model does not beat gzip."""
    began = time.monotonic()
    try:
        loaded = load_config("quickstart")
        run = train(loaded, resume=None)
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
    print("\n".join(f"    {line}" for line in (PROMPT + sample["completion"]).splitlines()))
    print(f"\nHeld-out text: {len(text):,} bytes of files that it never saw\n")
    print(f"    loss        {scores['loss']:.4f} nats a token")
    print(f"    perplexity  {scores['perplexity']:.2f}")
    for name, bits in (("the model", scores["bits_per_byte"]), ("gzip -9", gzip_bits), ("xz -9", xz_bits)):
        print(f"    {name:<11} {bits:.3f} bits a byte")
    print(f"\nrun    {run['run']}\nmodel  {run['model']}\ntime   {(time.monotonic() - began) / 60:.1f} minutes")
    print("\nMore text: .venv/bin/llmtrain generate --prompt 'import '")
    return 0 if scores["bits_per_byte"] < gzip_bits else 1


def held_out_text(shards: Path) -> bytes:
    """The documents of the validation split, one after the other."""
    folder = find_manifest(shards)
    assert folder is not None, "the evaluation has just read them"
    return "".join(iter_split_texts(folder, "val")).encode()


if __name__ == "__main__":
    sys.exit(main())
