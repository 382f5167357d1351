"""Greedy answers for an evaluation, ours beside transformers' `generate` at the same batch size; metrics of answers.

    python -m benchmarks.generating [--rounds 3] [--prompts 128] [--rows 100000]

Prompts of 16 to 256 tokens are answered by up to 256 tokens, which is what `eval` allows where nothing else is said; a
64th of the vocabulary ends an answer, so that rows end at different times, as they do in an evaluation. Ours sorts
prompts by length and lets go of rows that have ended, or fills their places; theirs takes the prompts as they come, in
batches padded on the left, in inference mode, with its default cache and attention. All have the same weights. The
contestants take turns; processor time stands beside wall time: on a machine that others use it is the steadier of the
two.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from benchmarks.machine import print_machine
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.config.sections.model import DecoderConfig
from llmtrain.evaluation.scores import row_statistics
from llmtrain.generation.decoding import generate
from llmtrain.generation.sampling import Decoding, Sampling
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import write_model_folder
from llmtrain.models.huggingface.model import HuggingFaceModel

VOCAB_SIZE = 8192
BATCH_SIZE = 16
NEW_TOKENS = EvaluationConfig().max_new_tokens
STOP_IDS = tuple(range(7, VOCAB_SIZE, 64))
WANTED = {"native decoder": 2.0, "transformers model": 1.2}
WANTED_SECONDS = 60.0
Answers = list[list[int]]


def theirs(network: torch.nn.Module, prompts: list[list[int]]) -> Answers:
    """transformers' `generate`, batch by batch."""
    answers: Answers = []
    for begin in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[begin : begin + BATCH_SIZE]
        longest = max(map(len, batch))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        with torch.inference_mode():
            found = network.generate(  # type: ignore[operator]
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=list(STOP_IDS),
                pad_token_id=0,
            )
        for row in found[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in STOP_IDS), len(row))
            answers.append(row[:end])
    return answers


def ours(model: Decoder | HuggingFaceModel, prompts: list[list[int]]) -> Answers:
    """Write as `llmtrain eval` does."""
    return generate(
        model,
        prompts,
        Decoding(max_new_tokens=NEW_TOKENS, sampling=Sampling(temperature=0.0), batch_size=BATCH_SIZE),
        stop_ids=STOP_IDS,
    )


def timed(work: Callable[[], Answers]) -> tuple[float, float, Answers]:
    """Wall seconds, processor seconds, and the answers."""
    began, busy = time.perf_counter(), time.process_time()
    answers = work()
    return time.perf_counter() - began, time.process_time() - busy, answers


def measure_generation(num_prompts: int, rounds: int) -> None:
    """Print seconds and ratios of both pairs."""
    drawn = random.Random(0)
    prompts = [
        [drawn.randrange(1, VOCAB_SIZE) for _ in range(round(16 * 16 ** drawn.random()))] for _ in range(num_prompts)
    ]
    torch.manual_seed(0)
    config = DecoderConfig.model_validate(
        {
            "max_seq_len": 512,
            "d_model": 384,
            "num_layers": 6,
            "attention": {"num_heads": 6},
            "ffn": {"d_ff": 1024},
            "init_std": 0.1,  # otherwise a model that was trained on nothing repeats one token
        }
    )
    decoder = Decoder(config, VOCAB_SIZE).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_model_folder(
            Path(folder) / "model",
            config=config,
            vocab_size=VOCAB_SIZE,
            state_dict=decoder.state_dict(),
            tokenizer_folder=None,
            eos_id=0,
        )
        network = AutoModelForCausalLM.from_pretrained(Path(folder) / "model").eval()
    wrapped = HuggingFaceModel(network).eval()
    contestants: dict[str, Callable[[], Answers]] = {
        "transformers' generate": lambda: theirs(network, prompts),
        "native decoder": lambda: ours(decoder, prompts),
        "transformers model": lambda: ours(wrapped, prompts),
    }
    walls: dict[str, list[float]] = {name: [] for name in contestants}
    busys: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, Answers] = {}
    theirs(network, prompts[:2])  # to warm up
    ours(decoder, prompts[:2])
    for _ in range(rounds):
        for name, work in contestants.items():
            wall, busy, answers[name] = timed(work)
            walls[name].append(wall)
            busys[name].append(busy)
    tokens = sum(map(len, answers["native decoder"]))
    print(f"{num_prompts} prompts, {sum(map(len, prompts)):,} tokens; {tokens:,} tokens of answers; batch {BATCH_SIZE}")
    base = "transformers' generate"
    for name in contestants:
        wall, busy = statistics.median(walls[name]), statistics.median(busys[name])
        ratios = [theirs_s / ours_s for theirs_s, ours_s in zip(busys[base], busys[name], strict=True)]
        same = sum(one == other for one, other in zip(answers[name], answers[base], strict=True))
        wanted = f", wanted {WANTED[name]}" if name in WANTED else ""
        print(
            f"  {name:<24} {wall:6.2f} s, {busy:6.2f} s of processor: {statistics.median(ratios):.2f} times{wanted}; "
            f"{same} of {num_prompts} answers the same"
        )


def measure_metrics(num_rows: int) -> None:
    """Print the seconds that all metrics of many rows take."""
    drawn = random.Random(1)
    words = [f"w{number}" for number in range(2000)]

    def text() -> str:
        return " ".join(drawn.choices(words, k=drawn.randint(10, 50)))

    pairs = []
    for _ in range(num_rows):
        expected = text()
        kept = [word if drawn.random() < 0.6 else drawn.choice(words) for word in expected.split()]
        pairs.append((" ".join(kept), expected))
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    own = time.process_time()
    row_statistics(pairs, EvaluationConfig().metrics)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = time.process_time() - own + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"all metrics of {num_rows:,} rows, mean 30 words: {seconds:.1f} s, {busy:.1f} s of processor over "
        f"{len(os.sched_getaffinity(0))} cores, wanted {WANTED_SECONDS:.0f}"
    )


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--rows", type=int, default=100_000)
    given = parser.parse_args()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    measure_generation(given.prompts, given.rounds)
    measure_metrics(given.rows)
    print_machine()


if __name__ == "__main__":
    main()
