"""Memory of `prepare` over time, on generated text of any size.

    python -m benchmarks.prepare_memory [--gb 5] [--curve curve.json]

The text is JSONL of random words, in files of 100 MB, and the tokenizer is one that is trained before on a part of it.
What is measured is the resident memory of the one process that prepares, files that it maps included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.machine import print_machine

FILE_BYTES = 100_000_000
WANTED_GB = 2.0
_EVERY_SECONDS = 0.5


class Curve(NamedTuple):
    """Memory of a preparation."""

    seconds: list[float]
    gigabytes: list[float]
    """Resident memory at each of these times."""
    documents: int
    tokens: int

    def peak(self, begin: float = 0.0, end: float = 1.0) -> float:
        """Return the largest value in a part of the time, in GB: (0.5, 1) is the second half."""
        count = len(self.gigabytes)
        return max(self.gigabytes[int(begin * count) : max(int(end * count), int(begin * count) + 1)])


def write_text(folder: Path, num_bytes: int) -> None:
    """Write about `num_bytes` of JSONL: documents of 100 to 1,000 words of which few are frequent, none twice."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(letters[np.minimum(rng.geometric(0.12, size), 22) - 1]) for size in rng.integers(2, 10, 40_000)]
    vocabulary = np.array(words, dtype=object)
    written, number = 0, 0
    while written < num_bytes:
        size = 0
        with (folder / f"text_{number:04}.jsonl").open("w") as file:
            while size < min(FILE_BYTES, num_bytes - written):
                ranks = np.minimum(rng.zipf(1.3, int(rng.integers(100, 1000))), len(vocabulary)) - 1
                size += file.write(json.dumps({"text": " ".join(vocabulary[ranks])}) + "\n")
        written += size
        number += 1


def prepare_and_watch(text: Path, output: Path, *, tokenizer: Path, num_workers: int) -> Curve:
    """Prepare the text in a process of its own, and return its memory over time."""
    config = output.with_suffix(".yaml")
    config.write_text(
        f"data: {{name: tokens, train: '{output}/train'}}\n"
        f"prepare: {{input: '{text}', output: '{output}', num_workers: {num_workers}, "
        f"tokenizer: {{kind: hf, path: '{tokenizer}'}}}}\n"
    )
    command = [sys.executable, "-m", "llmtrain", "prepare", str(config), "--json"]
    began, seconds, gigabytes = time.perf_counter(), [0.0], [0.0]
    with (
        tempfile.TemporaryFile() as printed,
        subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL) as process,
    ):
        while process.poll() is None:
            seconds.append(time.perf_counter() - began)
            gigabytes.append(resident_gb(process.pid))
            time.sleep(_EVERY_SECONDS)
        printed.seek(0)
        said = printed.read()
    if process.returncode:
        raise SystemExit(f"prepare ended with exit code {process.returncode}: {said.decode()[-500:]}")
    result = json.loads(said)
    return Curve(seconds, gigabytes, documents=result["documents"], tokens=result["tokens"])


def resident_gb(pid: int) -> float:
    """Return the resident memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmRSS")), 0.0)


def measure(folder: Path, num_bytes: int, *, num_workers: int = 2) -> Curve:
    """Generate text in `folder` and prepare it."""
    from llmtrain.data.tokenizers import train_bpe

    text, tokenizer = folder / "text", folder / "tokenizer"
    text.mkdir()
    write_text(text, num_bytes)
    with (text / "text_0000.jsonl").open() as file:
        sample = [json.loads(line)["text"] for line, _ in zip(file, range(2000), strict=False)]
    train_bpe(sample, vocab_size=8192).save(tokenizer)
    return prepare_and_watch(text, folder / "shards", tokenizer=tokenizer, num_workers=num_workers)


def main() -> None:
    """Measure and print the curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=5.0)
    parser.add_argument("--curve", type=Path, help="JSON file for all points")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        curve = measure(Path(temporary), int(arguments.gb * 1e9))
    print(f"{arguments.gb:g} GB, {curve.documents:,} documents, {curve.tokens:,} tokens, {curve.seconds[-1]:.0f} s")
    for tenth in range(10):
        value = curve.peak(tenth / 10, (tenth + 1) / 10)
        print(f"{10 * tenth:3} to {10 * tenth + 10:3} % of the time  {value:6.2f} GB  {'▇' * round(20 * value)}")
    print(f"peak {curve.peak():.2f} GB (wanted: {WANTED_GB:g} at most)")
    if arguments.curve:
        arguments.curve.write_text(json.dumps(curve._asdict()))
    print_machine()


if __name__ == "__main__":
    main()
