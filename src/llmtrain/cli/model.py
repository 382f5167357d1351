"""eval, generate: what a trained model is asked."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, table

ROWS = (
    ("model", "model"),
    ("data", "data"),
    ("tokens", "tokens"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("bits per byte", "bits_per_byte"),
    ("seconds", "seconds"),
)
RootDir = Annotated[str, typer.Option("--root-dir", metavar="DIR", help="Folder of all runs.")]
Model = Annotated[str, typer.Argument(metavar="[MODEL]", help="A run id, run folder, checkpoint or model folder.")]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("eval")(evaluate)
    app.command("generate")(generate)


def evaluate(
    model: Model = "latest",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="SHARDS", help="Shards to measure on; may be repeated; the run's own when not given."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Batches; all of the data when not given.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", metavar="N", min=1, help="Sequences at a time; the run's own.")
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Measure a model's loss, perplexity and bits per byte."""
    from llmtrain.recipes.evaluate import evaluate as recipe

    result = recipe(model, data=data or [], steps=steps, batch_size=batch_size, root_dir=root_dir)
    return Outcome(result, table(result, ROWS))


def generate(
    model: Model = "latest",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="May be repeated; - or none reads the prompt from stdin."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="At most as many.")] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token each time.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", min=1, help="Sample from the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Sample from the likeliest tokens of mass P."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same text.")] = 1337,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Write text with a model."""
    prompts = [_read_stdin() if text == "-" else text for text in prompt or ["-"]]
    from llmtrain.recipes.generate import generate as recipe

    results = recipe(
        model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        device=device,
        root_dir=root_dir,
    )
    return Outcome(results, "\n\n".join(f"{result['prompt']}{result['completion']}" for result in results))


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("type the prompt; Ctrl-D ends it", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")
