"""Quality steps: speed of each on one core, recall and precision of near-duplicates, memory of their search.

python -m benchmarks.quality                      # speed, recall and precision
python -m benchmarks.quality --search 1000000     # the search among as many documents, a tenth of them duplicates
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from pydantic import TypeAdapter

from llmtrain.config.sections.quality import NearDuplicatesStep, QualityStep
from llmtrain.data.prepare.quality.near_duplicates import NUM_HASHES, NearDuplicates, SignatureFiles
from llmtrain.data.prepare.quality.plan import Plan
from tests.support.planted_duplicates import plant

DOCUMENT_CHARS = 4000
STEPS = (
    {"name": "exact_duplicates"},
    {"name": "near_duplicates"},
    {"name": "length", "min_chars": 100},
    {"name": "language", "keep": ["en"], "min_confidence": 0},
    {"name": "gopher"},
    {"name": "c4"},
    {"name": "mask_pii"},
)


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", type=int, default=0, metavar="DOCUMENTS")
    num_documents = parser.parse_args().search
    if num_documents:
        _search(num_documents)
        return
    _speed()
    _recall()


def _speed() -> None:
    text = "\n".join(topics.values())
    texts = [text[at : at + DOCUMENT_CHARS] for at in range(0, len(text), DOCUMENT_CHARS)]
    size = sum(len(one.encode()) for one in texts)
    print(f"{len(texts)} documents of {DOCUMENT_CHARS} characters; a pass hashes each text too")
    nothing = _seconds(Plan([]), texts)
    print(f"  {'hashing alone':<18}{size / nothing / 1e6:8.1f} MB/s")
    for values in STEPS:
        step: QualityStep = TypeAdapter(QualityStep).validate_python(values)
        seconds = _seconds(Plan([step]), texts) - nothing
        print(f"  {values['name']:<18}{size / max(seconds, 1e-9) / 1e6:8.1f} MB/s")


def _seconds(plan: Plan, texts: Sequence[str]) -> float:
    """Least processor time of three passes, after one that loads models and tables."""
    plan.examine(texts[:4])
    found = []
    for _ in range(3):
        begin = time.process_time()
        plan.examine(texts)
        found.append(time.process_time() - begin)
    return min(found)


def _recall() -> None:
    planted = plant(3000, seed=0)
    similarity = np.array(planted.similarity)
    print(
        f"{len(similarity)} documents, {int((similarity > 0).sum())} of them copies; duplicates: similarity ≥ threshold"
    )
    for threshold in (0.5, 0.7, 0.8, 0.9):
        step = NearDuplicates(NearDuplicatesStep(threshold=threshold), key="")
        files = SignatureFiles(step, None)
        files.add(step.signatures(planted.texts))
        found = np.zeros(len(similarity), np.bool_)
        found[files.duplicates(np.arange(len(similarity)))[0]] = True
        files.close()
        right = similarity >= threshold
        clear = similarity >= threshold + 0.05
        print(
            f"  threshold {threshold}: recall {(found & right).sum() / right.sum():.3f} "
            f"({(found & clear).sum() / clear.sum():.3f} from {threshold + 0.05:.2f} on), precision "
            f"{(found & right).sum() / found.sum():.3f}, least similar that was found {similarity[found].min():.2f}, "
            f"unrelated ones found {int((found & (similarity == 0)).sum())}"
        )


def _search(num_documents: int) -> None:
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = SignatureFiles(NearDuplicates(NearDuplicatesStep(), key=""), Path(folder))
        begin = time.perf_counter()
        for _ in range(0, num_documents, 10_000):
            signatures = draw.integers(0, 1 << 32, (10_000, NUM_HASHES), dtype=np.uint32)
            signatures[9000:] = signatures[:1000]
            signatures[9000:, draw.permutation(NUM_HASHES)[: draw.integers(1, 20)]] ^= 1  # not quite equal
            files.add(signatures)
        before, writing = _anonymous_bytes(), time.perf_counter() - begin
        found, _ = files.duplicates(np.arange(num_documents))
        seconds = time.perf_counter() - begin - writing
    print(
        f"{num_documents:,} documents, {len(found):,} duplicates: written in {writing:.1f} s, found in {seconds:.1f} s"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"memory before the search {before / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB with mapped files")


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
