"""export, merge, publish: writes a model for other programs, checks it, and publishes it."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtrain.cli.options import Device, Json, Model, RootDir, TrustRemoteCode, local
from llmtrain.cli.output import Outcome, named_values
from llmtrain.reports.blocks import Values

ROWS = (
    ("output", "output"),
    ("stored as", "dtype"),
    ("compared on", "compared_on"),
    ("tokens compared", "tokens"),
    ("largest difference of logits", "max_logit_difference"),
    ("written, against its rounding in memory", "max_difference_as_written"),
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

Format = Annotated[str, typer.Option("--format", metavar="NAME", help="hf, safetensors, torch-export or onnx.")]
To = Annotated[str | None, typer.Option("--to", metavar="FOLDER", callback=local, help="Folder for the result.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; the model's own when not given."),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="PATH", help="Rows or shards for the comparison; the run's own when not given."),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        "--tolerance",
        metavar="X",
        min=0.0,
        help="Largest difference of logits that passes, as a share of the largest logit.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an earlier result of llmtrain.")]

Destination = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="PLACE",
        callback=local,
        help="A folder, hub:USER/NAME, or hub (named by HF_REPO_ID); artifacts/models/<run_id> when not given.",
    ),
]
Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="Who sees a new repository on the Hub; you alone when not given."),
]
License = Annotated[
    str | None,
    typer.Option("--license", metavar="ID", help="mit, apache-2.0, …; publish.license of the config when not given."),
]
RequireImprovement = Annotated[
    str | None,
    typer.Option(
        "--require-improvement",
        metavar="METRIC",
        help="Publish only if the comparison with the baseline shows that METRIC is better.",
    ),
]
BaseModelId = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ID", help="Hub id of the base model, where the base is a local folder."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the program."""
    app.command("export")(export)
    app.command("merge")(merge)
    app.command("publish")(publish)


def export(
    model: Model = "latest",
    format: Format = "hf",
    to: To = None,
    dtype: Dtype = None,
    data: Data = None,
    tolerance: Tolerance = None,
    device: Device = "auto",
    root_dir: RootDir = "runs",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Write a model for transformers, or as a graph.

    Plain safetensors are possible too. The result is loaded and compared with the model before it is kept.
    """
    from llmtrain.publishing.exported import Request
    from llmtrain.verbs.export import export as export_model

    result = export_model(
        model,
        Request(
            to=to,
            dtype=dtype,
            data=data or [],
            tolerance=tolerance,
            device=device,
            root_dir=root_dir,
            trust_remote_code=trust_remote_code,
            force=force,
        ),
        format=format,
    )
    return Outcome(result, [named_values(result, ROWS)])


def merge(
    model: Model = "latest",
    to: To = None,
    dtype: Dtype = None,
    data: Data = None,
    tolerance: Tolerance = None,
    device: Device = "auto",
    root_dir: RootDir = "runs",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Merge a LoRA adapter into its base model.

    The result is loaded and compared with base and adapter before it is kept.
    """
    from llmtrain.publishing.exported import Request
    from llmtrain.verbs.merge import merge as merge_adapter

    result = merge_adapter(
        model,
        Request(
            to=to,
            dtype=dtype,
            data=data or [],
            tolerance=tolerance,
            device=device,
            root_dir=root_dir,
            trust_remote_code=trust_remote_code,
            force=force,
        ),
    )
    return Outcome(result, [named_values(result, ROWS)])


def publish(
    model: Model = "latest",
    to: Destination = None,
    private: Private = None,
    license: License = None,
    require_improvement: RequireImprovement = None,
    base_model: BaseModelId = None,
    root_dir: RootDir = "runs",
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    json: Json = False,
) -> Outcome:
    """Publish a model with a model card.

    The card says on what and how the model was trained, how good it is and how to load it.
    """
    from llmtrain.verbs.publish import publish as publish_model

    named = {
        "to": to,
        "private": private,
        "license": license,
        "require_improvement": require_improvement,
        "base_model": base_model,
    }
    given = {key: value for key, value in named.items() if value is not None}
    result = publish_model(model, given=given, root_dir=root_dir, force=force, trust_remote_code=trust_remote_code)
    files = ("files", ", ".join(result["files"]))
    return Outcome(result, [Values([*named_values(result, PUBLISHED).rows, files])])
