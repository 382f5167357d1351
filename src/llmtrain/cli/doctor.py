"""doctor: checks whether this machine can train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from llmtrain.cli.options import Json, RootDir
from llmtrain.cli.output import Outcome, gigabytes
from llmtrain.reports.blocks import Block, Lines, Values


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("doctor")(doctor)


def doctor(
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Check whether this machine can train.

    It lists hardware, software and settings, and each problem with its fix.
    """
    from llmtrain.errors import RunError
    from llmtrain.installing import install_requirements

    try:
        from llmtrain.verbs.doctor import doctor as examine
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: {install_requirements()}") from None
    document = examine(root_dir)
    return Outcome(document, list(_blocks(document)), exit_code=0 if document["can_train"] else 1)


def _blocks(document: Mapping[str, Any]) -> Iterator[Block]:
    runs, versions, secrets = document["runs"], document["versions"], document["secrets"]
    gpus = [
        f"{gpu['name']}, {gigabytes(gpu['memory_bytes'])}, capability {'.'.join(map(str, gpu['capability']))}, "
        f"{'bf16' if gpu['bf16'] else 'no bf16'}"
        for gpu in document["gpus"]
    ]
    rows = [
        ("system", document["system"] + (" (WSL)" if document["is_wsl"] else "")),
        ("processor", f"{document['cpu']}, {document['cores']} cores, {document['threads']} threads in use"),
        ("bf16 on it", "native" if document["bf16_on_cpu"] else "no gain"),
        ("memory", gigabytes(document["memory_bytes"])),
        *(("GPU", gpu) for gpu in gpus or ["none" if not document["mps"] else "mps"]),
        (
            "torch.compile",
            "off: " + document["missing_for_compile"] if document["missing_for_compile"] else "has its compiler",
        ),
        ("runs", f"{runs['path']}, {gigabytes(runs['free_bytes'])} free, {_lacks(runs)}"),
        ("Hugging Face cache", f"{document['cache']}, {gigabytes(document['cache_free_bytes'])} free"),
        ("tokens", ", ".join(f"{name} {'set' if there else 'not set'}" for name, there in secrets.items())),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)),
        ("not installed", ", ".join(name for name, number in versions.items() if not number) or "nothing"),
        *((name, value) for name, value in document["environment"].items()),
    ]
    yield Values(rows)
    for finding in document["findings"]:
        mark = "✗" if finding["severity"] == "fatal" else "!"
        yield Lines(f"{mark} {finding['what']}", [f"→ {finding['fix']}"])
    yield Lines("It can train." if document["can_train"] else "It cannot train.", ())


def _lacks(runs: Mapping[str, Any]) -> str:
    if not runs["writable"]:
        return "cannot be written"
    return f"lacks {', '.join(runs['lacks'])}" if runs["lacks"] else "renames, links and fsync of folders work"
