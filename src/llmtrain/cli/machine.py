"""plan, doctor: what a run would need, and what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, columns


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("plan")(plan)
    app.command("doctor")(doctor)


def plan(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="What to plan for: this, cpu, or a GPU such as h100.")
    ] = "this",
    nproc: Annotated[
        int | None, typer.Option("--nproc", metavar="N", min=1, help="Processes, one a device.", show_default=False)
    ] = None,
    json: Json = False,
) -> Outcome:
    """Work out parameters, FLOPs, steps, tokens, memory and time of a run; needs no GPU."""
    from llmtrain.config.load import load_config

    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    from llmtrain.recipes.plan import plan as recipe

    document = {"config": loaded.source, **recipe(loaded.config, device=device, num_ranks=nproc)}
    return Outcome(document, _plan_text(document))


def doctor(
    root_dir: Annotated[str, typer.Option("--root-dir", metavar="DIR", help="Folder of all runs.")] = "runs",
    json: Json = False,
) -> Outcome:
    """Say what this machine has for training, and what is in the way of it."""
    from llmtrain.config.errors import RunError

    try:
        from llmtrain.recipes.doctor import doctor as recipe
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed: pip install -r requirements.txt") from None
    document = recipe(root_dir)
    return Outcome(document, _doctor_text(document), exit_code=0 if document["can_train"] else 1)


def _doctor_text(document: Mapping[str, Any]) -> str:
    runs, versions, secrets = document["runs"], document["versions"], document["secrets"]
    gpus = [
        f"{gpu['name']}, {_size(gpu['memory_bytes'])}, capability {'.'.join(map(str, gpu['capability']))}, "
        f"{'bf16' if gpu['bf16'] else 'no bf16'}"
        for gpu in document["gpus"]
    ]
    rows = [
        ("system", document["system"] + (" (WSL)" if document["is_wsl"] else "")),
        ("processor", f"{document['cpu']}, {document['cores']} cores, {document['threads']} threads in use"),
        ("bf16 on it", "native" if document["bf16_on_cpu"] else "no"),
        ("memory", _size(document["memory_bytes"])),
        *(("GPU", gpu) for gpu in gpus or ["none" if not document["mps"] else "mps"]),
        (
            "torch.compile",
            "off: " + document["missing_for_compile"] if document["missing_for_compile"] else "has its compiler",
        ),
        ("runs", f"{runs['path']}, {_size(runs['free_bytes'])} free, {_lacks(runs)}"),
        ("Hugging Face cache", f"{document['cache']}, {_size(document['cache_free_bytes'])} free"),
        ("tokens", ", ".join(f"{name} {'set' if there else 'not set'}" for name, there in secrets.items())),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)),
        ("not installed", ", ".join(name for name, number in versions.items() if not number) or "nothing"),
        *((name, value) for name, value in document["environment"].items()),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    for finding in document["findings"]:
        mark = "✗" if finding["severity"] == "fatal" else "!"
        lines += ["", f"{mark} {finding['what']}", f"  → {finding['fix']}"]
    return "\n".join([*lines, "", "It can train." if document["can_train"] else "It cannot train."])


def _lacks(runs: Mapping[str, Any]) -> str:
    if not runs["writable"]:
        return "cannot be written"
    return f"lacks {', '.join(runs['lacks'])}" if runs["lacks"] else "renames, links and fsync of folders work"


def _plan_text(document: Mapping[str, Any]) -> str:
    parameters, run, layout, memory = (document[key] for key in ("parameters", "run", "layout", "memory"))
    of_parts = {name: n for name, n in parameters.items() if name not in ("total", "trainable", "non_embedding")}
    lines = [f"{document['config']}: {layout['precision']}, {'compiled' if layout['compile'] else 'not compiled'}"]
    lines += ["", "parameters"]
    rows = [[_words(name), f"{n:,}", f"{n / parameters['total']:.1%}"] for name, n in of_parts.items()]
    rows += [[_words(name), f"{parameters[name]:,}", ""] for name in ("total", "trainable", "non_embedding")]
    lines += columns(["", "", ""], rows, with_head=False)
    lines += ["", "run"]
    epochs = None if run["epochs"] is None else f"{run['epochs']:.3g}"
    figures = [
        ("steps", _count(run["steps"])),
        ("tokens a step", _count(run["tokens_per_step"])),
        ("tokens", _count(run["tokens"])),
        *([("supervised", f"{run['supervised_share']:.1%}")] if run["supervised_share"] is not None else []),
        ("epochs", epochs or "not known"),
        ("FLOPs a token", f"{document['flops_per_token']:.4g}"),
        ("FLOPs", "not known" if document["flops"] is None else f"{document['flops']:.4g}"),
    ]
    lines += columns(["", ""], [list(row) for row in figures], with_head=False)
    lines += ["", f"peak memory of {'each process' if layout['ranks'] > 1 else 'the process'}"]
    rows = [[_words(part), _size(size)] for part, size in memory["parts"].items() if size]
    lines += columns(["", ""], [*rows, ["all", _size(memory["peak_bytes"])]], with_head=False)
    share = " that each has" if layout["ranks"] > 1 else ""
    fits = "fits into" if memory["fits"] else "does NOT fit into"
    lines.append(f"  {fits} the {_size(memory['device_bytes'])} of {document['time']['device']}{share}")
    lines += ["", "layout"]
    lines.append(
        f"  {layout['ranks']} {'process' if layout['ranks'] == 1 else 'processes'} ({layout['strategy']}) × "
        f"{layout['grad_accum_steps']} micro-batches of {layout['micro_batch_size']} × {layout['seq_len']} tokens "
        f"= {layout['batch_size']} sequences a step"
    )
    if layout["because"] and layout["ranks"] > 1:
        lines.append(f"  {layout['strategy']}: {layout['because']}")
    if layout["tensor_parallel"] > 1:
        lines.append(f"  {layout['tensor_parallel']} processes share each matrix")
    speed, seconds = document["time"]["tokens_per_sec"], document["time"]["seconds"]
    if speed is not None:
        how_long = "" if seconds is None else f"{_duration(seconds)} "
        lines += ["", f"time on {document['time']['device']}", f"  {how_long}at {speed:,.0f} tokens/s"]
    if document["assumed"]:
        lines += ["", "assumed", *(f"  {each}" for each in document["assumed"])]
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e9:.3f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
