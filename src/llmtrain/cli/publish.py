"""export, merge, publish: a model made into what others load, checked, and put where they find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, table

ROWS = (
    ("output", "output"),
    ("stored as", "dtype"),
    ("compared on", "compared_on"),
    ("tokens compared", "tokens"),
    ("largest difference of logits", "max_logit_difference"),
    ("tolerance", "tolerance"),
    ("KL divergence, nats a token", "mean_kl_nats"),
    ("greedy tokens", "greedy_tokens"),
    ("of these equal", "greedy_tokens_equal"),
)

PUBLISHED = (
    ("published", "to"),
    ("revision", "revision"),
    ("url", "url"),
    ("licence", "license"),
    ("improved", "required_improvement"),
)

Model = Annotated[
    str, typer.Argument(metavar="[MODEL]", help="A run, checkpoint, model or adapter folder, or owner/name.")
]
To = Annotated[str | None, typer.Option("--to", metavar="FOLDER", help="Where it goes.", show_default=False)]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the source's when not given."),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="PATH", help="Rows or shards to compare on; the run's own when not given."),
]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", metavar="X", min=0.0, help="Share of the largest logit that may differ."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what llmtrain made there before.")]
RootDir = Annotated[str, typer.Option("--root-dir", metavar="DIR", help="Folder of all runs.")]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("export")(export)
    app.command("merge")(merge)
    app.command("publish")(publish)


def export(
    model: Model = "latest",
    format: Annotated[
        str, typer.Option("--format", metavar="NAME", help="hf, safetensors, torch-export or onnx.")
    ] = "hf",
    to: To = None,
    dtype: Dtype = None,
    data: Data = None,
    tolerance: Tolerance = None,
    device: Device = "auto",
    root_dir: RootDir = "runs",
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Write a model for transformers, as plain safetensors, or as a graph; loaded and compared before it counts."""
    from llmtrain.recipes.export import export as recipe
    from llmtrain.recipes.publication.exported import Request

    result = recipe(
        model,
        Request(
            to=to,
            dtype=dtype,
            data=data or [],
            tolerance=tolerance,
            device=device,
            root_dir=root_dir,
            force=force,
        ),
        format=format,
    )
    return Outcome(result, _shown(result))


def merge(
    model: Model = "latest",
    to: To = None,
    dtype: Dtype = None,
    data: Data = None,
    tolerance: Tolerance = None,
    device: Device = "auto",
    root_dir: RootDir = "runs",
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Merge a LoRA adapter into its base; the result is loaded again and compared before it counts."""
    from llmtrain.recipes.merge import merge as recipe
    from llmtrain.recipes.publication.exported import Request

    result = recipe(
        model,
        Request(
            to=to,
            dtype=dtype,
            data=data or [],
            tolerance=tolerance,
            device=device,
            root_dir=root_dir,
            force=force,
        ),
    )
    return Outcome(result, _shown(result))


def publish(
    model: Model = "latest",
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="PLACE",
            help="A folder, hub:USER/NAME, or hub (HF_REPO_ID has the name); else artifacts/models/<run_id>.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public",
            help="Who sees a new repository on the Hub; private when not given.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="mit, apache-2.0, …; else publish.license of its config.",
            show_default=False,
        ),
    ] = None,
    require_improvement: Annotated[
        str | None,
        typer.Option(
            "--require-improvement",
            metavar="METRIC",
            help="Refuse unless the comparison with the baseline shows that METRIC is better.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The base's name on the Hub, where it is a folder here.",
            show_default=False,
        ),
    ] = None,
    root_dir: RootDir = "runs",
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Publish a model with a card: what it was trained on, how, how good it is, how to load it."""
    from llmtrain.recipes.publish import publish as recipe

    named = {
        "to": to,
        "private": private,
        "license": license,
        "require_improvement": require_improvement,
        "base_model": base_model,
    }
    given = {key: value for key, value in named.items() if value is not None}
    result = recipe(model, given=given, root_dir=root_dir, force=force)
    return Outcome(result, "\n".join([table(result, PUBLISHED), f"{'files':<11}  {', '.join(result['files'])}"]))


def _shown(result: Mapping[str, Any]) -> str:
    return table(result, ROWS)
