"""generate: generates text with a model."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from llmtrain.cli.importing import large_imports
from llmtrain.cli.options import Chat, Device, Json, Model, RootDir, TrustRemoteCode, local
from llmtrain.cli.output import Outcome, stdout_is_read
from llmtrain.screen import counted, visible

Prompts = Annotated[
    list[str] | None,
    typer.Option("--prompt", metavar="TEXT", help="Prompt; may be repeated. - or none reads one from stdin."),
]
PromptsFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        callback=local,
        help="File with a prompt a line; of rows (.jsonl, .json, .csv, .parquet) the field prompt or text.",
    ),
]
Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Continue each line of stdin at once; an empty line ends.")
]
Output = Annotated[
    str | None, typer.Option("--output", metavar="FILE", callback=local, help="Write the results to FILE, as JSONL.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest text, in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token each time.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", min=1, help="Sample from the K likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="P", min=0.0, max=1.0, help="Sample from the likeliest tokens of total probability P."
    ),
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="R", help="Over 1, tokens that occurred before become less likely."),
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; may be repeated.")
]
StopToken = Annotated[
    list[str] | None,
    typer.Option("--stop-token", metavar="TOKEN", help="End at this token, such as <|im_end|>; may be repeated."),
]
Heal = Annotated[
    bool, typer.Option("--heal/--no-heal", help="Choose the last token of the prompt again, keeping its text.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The same seed gives the same text.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", metavar="N", min=1, help="Prompts at a time; the texts do not depend on it.")
]


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("generate")(generate)


def generate(
    model: Model = "latest",
    prompt: Prompts = None,
    prompts: PromptsFile = None,
    interactive: Interactive = False,
    output: Output = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Stop = None,
    stop_token: StopToken = None,
    heal: Heal = True,
    chat: Chat = None,
    seed: Seed = 1337,
    batch_size: BatchSize = 16,
    device: Device = "auto",
    root_dir: RootDir = "runs",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> Outcome:
    """Generate text with a model."""
    from llmtrain.errors import ConfigError

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
        "trust_remote_code": trust_remote_code,
    }
    if interactive:
        if prompt or prompts or output:
            raise ConfigError("--interactive reads its prompts from stdin: remove --prompt, --prompts and --output")
        return _converse(model, settings)
    texts = [_read_stdin() if text == "-" else text for text in prompt or ([] if prompts else ["-"])]
    with large_imports():
        from llmtrain.verbs.generate import generate as generate_texts

    results = generate_texts(model, prompts=texts, prompts_file=prompts, output=output, **settings)
    if output:
        return Outcome(results, f"{output}: {counted(len(results), 'text')}")
    return Outcome(results, "\n\n".join(_written(result) for result in results))


def _written(result: dict[str, Any]) -> str:
    """Return the prompt and its continuation; for a turn, the answer is put below the question."""
    between = "\n\n" if "rendered" in result else ""
    return f"{result['prompt']}{between}{result['completion']}"


def _converse(model: str, settings: dict[str, Any]) -> Outcome:
    with large_imports():
        from llmtrain.verbs.generate import converse

    try:
        results = converse(model, lines=_typed_lines(), say=_say, **settings)
    except BrokenPipeError:
        results = []
    return Outcome(results, "")


def _say(piece: str) -> None:
    print(visible(piece), end="")
    if not stdout_is_read():
        raise BrokenPipeError


def _typed_lines() -> Iterator[str]:
    """Yield lines from a terminal, with line editing, or from a pipe, up to an empty line or the end."""
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    if asks:
        print("type a prompt a line; Ctrl-C stops a text, an empty line or Ctrl-D ends", file=sys.stderr)
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
    from llmtrain.errors import ConfigError

    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"stdin is not text in UTF-8 (byte {error.start})") from None
