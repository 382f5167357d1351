"""`generate`: text that a model writes after a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, TrainerConfig
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.generation import generate as generate_tokens
from llmtrain.models.folder import read_model_folder
from llmtrain.training.runs import find_model


def generate(
    model: str,
    *,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1337,
    device: str = "auto",
    root_dir: str = "runs",
) -> list[dict[str, Any]]:
    """`prompt` and `completion` for each prompt, in their order; the same whatever other prompts stand beside it.

    `temperature` 0 takes the likeliest token. Raises ConfigError for a model that is not there, or has no tokenizer, or
    a prompt that is longer than its context.
    """
    folder = find_model(model, Path(root_dir))
    decoder, _ = read_model_folder(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"{folder} has no tokenizer.json, so it cannot be given text")
    tokenizer = load_tokenizer(folder)
    trainer, distributed = TrainerConfig(precision="32", compile=False), DistributedConfig()
    engine = Engine(resolve(RunConfig(device=device), trainer, distributed), distributed=distributed)
    completions = generate_tokens(
        decoder.to(engine.device).eval(),
        # An end token stands before every document, so it also says that one begins.
        [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    return [
        {"prompt": prompt, "completion": tokenizer.decode(tokens), "tokens": len(tokens)}
        for prompt, tokens in zip(prompts, completions, strict=True)
    ]
