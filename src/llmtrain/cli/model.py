"""generate: what a trained model writes."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, drop_stdout

RootDir = Annotated[str, typer.Option("--root-dir", metavar="DIR", help="Folder of all runs.")]
Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A run, checkpoint, model or adapter folder, or owner/name.")
]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("generate")(generate)


def generate(
    model: Model = "latest",
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="May be repeated; - or none reads the prompt from stdin."),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", metavar="FILE", help="A prompt a line; of .jsonl, its field prompt or text."),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Complete each line of stdin as it comes; an empty line ends.")
    ] = False,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Write the results to FILE, as JSONL.")
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
    repetition_penalty: Annotated[
        float,
        typer.Option("--repetition-penalty", metavar="R", help="Over 1, tokens that were there become less likely."),
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
    ] = None,
    stop_token: Annotated[
        list[str] | None,
        typer.Option("--stop-token", metavar="TOKEN", help="End at this token, such as <|im_end|>; may be repeated."),
    ] = None,
    heal: Annotated[
        bool, typer.Option("--heal/--no-heal", help="Choose the prompt's last token anew, with its text kept.")
    ] = True,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Take a prompt as a user's turn; the default is how the model was tuned."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same text.")] = 1337,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts at a time; the texts stay the same.")
    ] = 16,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Write text with a model."""
    from llmtrain.config.errors import ConfigError

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or [],
        "stop_tokens": stop_token or [],
        "heal": heal,
        "chat": chat,
        "batch_size": batch_size,
        "device": device,
        "root_dir": root_dir,
    }
    if interactive:
        if prompt or prompts or output:
            raise ConfigError("--interactive reads its prompts from stdin: leave --prompt, --prompts and --output out")
        return _converse(model, settings)
    texts = [_read_stdin() if text == "-" else text for text in prompt or ([] if prompts else ["-"])]
    from llmtrain.recipes.generate import generate as recipe

    results = recipe(model, prompts=texts, prompts_file=prompts, output=output, **settings)
    if output:
        return Outcome(results, f"{output}: {len(results):,} {'text' if len(results) == 1 else 'texts'}")
    return Outcome(results, "\n\n".join(_written(result) for result in results))


def _written(result: dict[str, Any]) -> str:
    """The prompt and what goes on from it; or an answer under its question."""
    between = "\n\n" if "rendered" in result else ""
    return f"{result['prompt']}{between}{result['completion']}"


def _converse(model: str, settings: dict[str, Any]) -> Outcome:
    from llmtrain.recipes.generate import converse

    try:
        results = converse(model, lines=_typed_lines(), say=_say, **settings)
    except BrokenPipeError:
        drop_stdout()
        results = []
    return Outcome(results, "")


def _say(piece: str) -> None:
    print(piece, end="", flush=True)


def _typed_lines() -> Iterator[str]:
    """What the user types, with the terminal's line editing, or the lines of a pipe; until an empty line or its end."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        print("a prompt a line; Ctrl-C stops a text, an empty line or Ctrl-D ends", file=sys.stderr)
        with contextlib.suppress(ImportError):  # arrow keys, where Python was built with them
            importlib.import_module("readline")
    with _reading_stdin():
        while True:
            try:
                line = input("> " if asks else "")
            except (EOFError, KeyboardInterrupt):
                if asks:
                    print(file=sys.stderr)
                return
            if not line:
                return
            yield line


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("type the prompt; Ctrl-D ends it", file=sys.stderr)
    with _reading_stdin():
        return sys.stdin.read().removesuffix("\n")


@contextlib.contextmanager
def _reading_stdin() -> Iterator[None]:
    from llmtrain.config.errors import ConfigError

    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not text in UTF-8 (byte {error.start})") from None
