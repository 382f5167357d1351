"""launch k8s: starts a run on a Kubernetes cluster, follows it, and ends it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, printable
from llmtrain.errors import ConfigError
from llmtrain.reports.blocks import Lines, Table

if TYPE_CHECKING:
    from llmtrain.launching.kubernetes.launch import ClusterRun

SUBMIT = "submit"


class _SubmitsByDefault(TyperGroup):
    """`launch k8s CONFIG` is `launch k8s submit CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "-h", "--help"):
            args = [SUBMIT, *args]
        return super().parse_args(ctx, args)


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the group `launch`."""
    group = typer.Typer(
        cls=_SubmitsByDefault,
        help="Start a run on a Kubernetes cluster: launch k8s CONFIG [key=value …].",
        rich_markup_mode=None,
    )
    commands = (submit, status, logs, stop, delete, render)
    for command in commands:
        group.command(command.__name__)(command)
    app.add_typer(group, name="k8s")


Nodes = Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="Number of pods; kubernetes.nodes.")]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus-per-node", metavar="G", min=0, help="GPUs of each pod; kubernetes.gpus_per_node."),
]
Image = Annotated[str | None, typer.Option("--image", metavar="IMAGE", help="Image of the pods; kubernetes.image.")]
Kind = Annotated[
    str | None, typer.Option("--kind", metavar="KIND", help="job, jobset or statefulset; kubernetes.kind.")
]
Queue = Annotated[str | None, typer.Option("--queue", metavar="NAME", help="Local queue of Kueue; kubernetes.queue.")]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", metavar="NAME", help="Namespace; kubectl's current one when not given."),
]
Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name of the run; output.run_id or run.name when not given."),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The same as the word KEY=VALUE; repeatable.")
]
Env = Annotated[
    list[str] | None, typer.Option("--env", metavar="K=V", help="Environment variable of the pods; repeatable.")
]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="The run.")]
Patience = Annotated[
    float,
    typer.Option("--patience", metavar="SEC", min=0, help="With --follow: how long a pod may wait for a node."),
]


def submit(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    image: Image = None,
    namespace: Namespace = None,
    kind: Kind = None,
    queue: Queue = None,
    name: Name = None,
    sets: Sets = None,
    env: Env = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the manifests; submit nothing.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the log until the run ends; end with its exit code.")
    ] = False,
    patience: Patience = 300,
    json: Json = False,
) -> Outcome:
    """Start a run, or continue one that has failed or was stopped.

    All other settings of the pods are keys of the config's section `kubernetes`.
    """
    flags = _flags(nodes=nodes, gpus_per_node=gpus_per_node, image=image, namespace=namespace, kind=kind, queue=queue)
    ref, words = read_words(word, [*(overrides or []), *(sets or []), *flags], config)
    run = _run(ref, words, name=name, env=env)
    from llmtrain.verbs.launch_k8s import follow_run, manifests
    from llmtrain.verbs.launch_k8s import submit as submit_run

    if dry_run:
        text = manifests(run)
        return Outcome({"run": run.name, "manifests": text}, text.rstrip("\n"))
    done = submit_run(run)
    submitted = Lines(f"the run {run.name} is submitted: llmtrain launch k8s status {run.name}", done["applied"])
    if not follow:
        return Outcome(done, [submitted])
    _say(submitted)
    return _state(follow_run(run.name, namespace=run.settings.namespace, say=_say, patience_sec=patience), ends=True)


def render(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    nodes: Nodes = None,
    gpus_per_node: Gpus = None,
    image: Image = None,
    namespace: Namespace = None,
    kind: Kind = None,
    queue: Queue = None,
    name: Name = None,
    sets: Sets = None,
    env: Env = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="File to write; stdout when not given.")
    ] = None,
    json: Json = False,
) -> Outcome:
    """Write the manifests of a run, checked, for other tools to apply."""
    flags = _flags(nodes=nodes, gpus_per_node=gpus_per_node, image=image, namespace=namespace, kind=kind, queue=queue)
    ref, words = read_words(word, [*(overrides or []), *(sets or []), *flags], config)
    run = _run(ref, words, name=name, env=env)
    from llmtrain.verbs.launch_k8s import manifests

    text = manifests(run)
    if output is None:
        return Outcome({"run": run.name, "manifests": text}, text.rstrip("\n"))
    try:
        Path(output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error.strerror}): name another --output") from None
    return Outcome({"run": run.name, "file": output}, output)


def status(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The run; all runs when not given.")] = None,
    namespace: Namespace = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print the log until the run ends; end with its exit code.")
    ] = False,
    patience: Patience = 300,
    json: Json = False,
) -> Outcome:
    """Show a run: its pods with their ranks, step and loss, and what is wrong."""
    from llmtrain.verbs.launch_k8s import follow_run, list_cluster_runs
    from llmtrain.verbs.launch_k8s import status as status_of

    if name is None:
        found = list_cluster_runs(namespace=namespace)
        runs = Table("", ("", ""), [(run["run"], run["kind"]) for run in found])
        return Outcome(found, [runs if found else Lines("there are no runs in this namespace", ())])
    if follow:
        return _state(follow_run(name, namespace=namespace, say=_say, patience_sec=patience), ends=True)
    return _state(status_of(name, namespace=namespace), ends=False)


def logs(
    name: RunName,
    rank: Annotated[int, typer.Option("--rank", metavar="I", min=0, help="Number of the pod.")] = 0,
    tail: Annotated[int | None, typer.Option("--tail", metavar="N", min=1, help="Only the last N lines.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they come.")] = False,
    namespace: Namespace = None,
    json: Json = False,
) -> Outcome:
    """Print the log of a run's pod."""
    from llmtrain.verbs.launch_k8s import logs as logs_of

    done = logs_of(name, namespace=namespace, index=rank, tail=tail, follows=follow)
    return Outcome(done, done.get("log", "").rstrip("\n"))


def stop(name: RunName, namespace: Namespace = None, json: Json = False) -> Outcome:
    """Stop a run: its pods save a checkpoint and end; starting it again continues it."""
    from llmtrain.verbs.launch_k8s import stop as stop_run

    done = stop_run(name, namespace=namespace)
    codes = [f"{pod} ended with {_code(code)}" for pod, code in done["exit_codes"].items()]
    return Outcome(done, [Lines(f"the run {name} is stopped; launch it again to continue it", codes)])


def delete(name: RunName, namespace: Namespace = None, json: Json = False) -> Outcome:
    """Stop a run and delete its objects from the cluster; the volumes stay, with its checkpoints."""
    from llmtrain.verbs.launch_k8s import delete as delete_run

    done = delete_run(name, namespace=namespace)
    return Outcome(done, [Lines(f"the run {name} is deleted, but for its volumes", done["deleted"])])


def _run(ref: str | None, words: Sequence[str], *, name: str | None, env: Sequence[str] | None) -> ClusterRun:
    from llmtrain.config.loading.load import load_config
    from llmtrain.verbs.launch_k8s import cluster_run

    assert ref is not None
    variables = {}
    for pair in env or ():
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ConfigError(f"--env {pair}: expected K=V, such as NCCL_DEBUG=INFO")
        variables[key] = value
    return cluster_run(load_config(ref, words), words, name=name, env=variables)


def _flags(**values: str | int | None) -> list[str]:
    return [f"kubernetes.{key}={value}" for key, value in values.items() if value is not None]


def _say(message: str | Lines) -> None:
    lines = Lines(message, ()) if isinstance(message, str) else message
    print(printable([lines], stream=2), file=sys.stderr, flush=True)


def _code(code: int | None) -> str:
    return "no exit code that was seen" if code is None else f"exit code {code}"


def _state(found: Mapping[str, Any], *, ends: bool) -> Outcome:
    """Return a run's state as text. With `ends`, the command exits with the run's own exit code."""
    head = f"{found['run']}  {found['kind']}  {found['state']}"
    if found["step"] is not None:
        head += f"  step {found['step']}  loss {found['loss']:g}"
    if found["exit_code"] is not None:
        head += f"  exit code {found['exit_code']}"
    lines = [found["cause"]] if found["cause"] else []
    for pod in found["pods"]:
        ended = "" if pod["exit_code"] is None else f"  exit code {pod['exit_code']}"
        lines.append(f"{pod['ranks']}  {pod['name']}  {pod['phase']}{ended}")
        lines += [f"  {pod['cause']}"] if pod["cause"] else []
    return Outcome(found, [Lines(head, lines)], exit_code=(found["exit_code"] or 0) if ends else 0)
