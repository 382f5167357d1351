"""launch ssh: trains and evaluates on machines that are reached by SSH, and fetches the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, gigabytes
from llmtrain.cli.workers import MaxRestarts, NumProcesses, outcome_of
from llmtrain.reports.blocks import Lines, Table, Values
from llmtrain.screen import counted

if TYPE_CHECKING:
    from llmtrain.config.loading.load import LoadedConfig
    from llmtrain.config.sections.schema import Config
    from llmtrain.launching.ssh.remote import Remote

DEFAULT = "run"

Host = Annotated[
    list[str] | None,
    typer.Option(
        "--host",
        metavar="[USER@]HOST[:PORT]",
        help="Machine, or a name of the SSH config; several train one job. remote.host or REMOTE_HOST when not given.",
    ),
]
Folder = Annotated[
    str | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="Folder of the project there; '~' is the home there. remote.dir or REMOTE_DIR when not given.",
    ),
]
EnvFile = Annotated[
    str | None,
    typer.Option("--env-file", metavar="FILE", help="Lines NAME=VALUE, such as HF_TOKEN, for the processes there."),
]
Python = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="A Python there that has all packages, instead of one by uv."),
]
SshConfig = Annotated[
    str | None, typer.Option("--ssh-config", metavar="FILE", help="File to read in place of ~/.ssh/config.")
]
AboutMachines = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="A config whose `remote` and `output.root_dir` are meant.")
]
RendezvousOption = Annotated[
    str | None,
    typer.Option(
        "--rendezvous", metavar="HOST:PORT", help="Where several machines meet; a free port of the first by itself."
    ),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="RUN", help="Continue a run there: its id, folder or checkpoint; latest; auto."),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return when the training has started.")]
OfEval = Annotated[bool, typer.Option("--eval", help="The evaluation, instead of the training.")]
Delete = Annotated[
    bool,
    typer.Option("--delete", help="Move files there that are not here to .llmtrain/replaced."),
]


class _DefaultGroup(TyperGroup):
    """A command group in which CONFIG instead of a sub-command means the sub-command DEFAULT."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if (
            args
            and args[0] not in (*self.commands, "--help", "-h")
            and (args[0].startswith("-") or _is_config(args[0]))
        ):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


def _is_config(word: str) -> bool:
    """Return whether a word is a file or a shipped config, and not a mistyped sub-command."""
    from llmtrain.config.loading.load import shipped_configs

    return any(sign in word for sign in "./=") or word in shipped_configs()


def add_to(launch: typer.Typer) -> None:
    """Add the group of this file to `launch`."""
    app = typer.Typer(
        cls=_DefaultGroup,
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Train on machines that are reached by SSH. `launch ssh CONFIG` is push, init and train.",
    )
    app.command(DEFAULT)(run)
    for command in (push, init, train, status, logs, attach, stop, fetch):
        app.command(command.__name__)(command)
    app.command("eval", context_settings={"ignore_unknown_options": True})(evaluate)
    launch.add_typer(app, name="ssh")


def run(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    host: Host = None,
    dir: Folder = None,
    nproc: NumProcesses = None,
    rendezvous: RendezvousOption = None,
    max_restarts: MaxRestarts = 0,
    detach: Detach = False,
    env_file: EnvFile = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Push, init and train, one after the other."""
    from llmtrain.verbs import launch_ssh as verbs

    loaded, values = _loaded(word, overrides, config)
    about = loaded.config if loaded else None
    remote = _remote(about, host=host, dir=dir, env_file=env_file, python=python, ssh_config=ssh_config)
    verbs.push(remote, about)
    verbs.initialize(remote, about)
    words = [*values, *_train_options(max_restarts, json)]
    started = verbs.train(remote, loaded, words, nproc=nproc, rendezvous=rendezvous)
    return _started(started) if detach else _followed(remote, "train", json)


def push(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    delete: Delete = False,
    env_file: EnvFile = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Copy this folder there, but runs, caches, environments and secrets.

    Only what changed is sent. Nothing there is deleted.
    """
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, env_file=env_file, ssh_config=ssh_config)
    done = verbs.push(remote, about, delete=delete)
    sent = [(f"{one['host']}:{one['folder']}", f"{counted(one['files'], 'file')} sent") for one in done]
    return Outcome(done, [Values(sent)])


def init(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    env_file: EnvFile = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Make the environment there by uv, and check GPU and disk."""
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, env_file=env_file, python=python, ssh_config=ssh_config)
    done = verbs.initialize(remote, about)
    return Outcome(done, list(map(_machine, done)))


def train(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    resume: Resume = None,
    host: Host = None,
    dir: Folder = None,
    nproc: NumProcesses = None,
    rendezvous: RendezvousOption = None,
    max_restarts: MaxRestarts = 0,
    detach: Detach = False,
    env_file: EnvFile = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Train there, in tmux, and show the log.

    A lost connection stops nothing and is made again; Ctrl-C stops the training, which saves. With several hosts it is
    one job with --nproc processes on each.
    """
    from llmtrain.verbs import launch_ssh as verbs

    loaded, values = _loaded(word, overrides, config, required=resume is None)
    remote = _remote(
        loaded.config if loaded else None, host=host, dir=dir, env_file=env_file, python=python, ssh_config=ssh_config
    )
    words = [*values, *_train_options(max_restarts, json)]
    started = verbs.train(remote, loaded, words, resume=resume, nproc=nproc, rendezvous=rendezvous)
    return _started(started) if detach else _followed(remote, "train", json)


def evaluate(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL KEY=VALUE OPTION", help="As `llmtrain eval` takes them, there.")
    ] = None,
    config: ConfigOption = None,
    host: Host = None,
    dir: Folder = None,
    env_file: EnvFile = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Evaluate a model there, on the first host, and show the result."""
    from llmtrain.verbs import launch_ssh as verbs

    loaded, _ = _loaded(None, None, config, required=False)
    remote = _remote(
        loaded.config if loaded else None, host=host, dir=dir, env_file=env_file, python=python, ssh_config=ssh_config
    )
    verbs.evaluate(remote, loaded, [*(words or []), *(["--json"] if json else [])])
    return _followed(remote, "eval", json)


def status(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Show the job, its step and loss, and the machines."""
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, python=python, ssh_config=ssh_config)
    found = verbs.status(remote, about)
    return Outcome(found, [Table("", STATUS, [_status_row(one) for one in found])])


def logs(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends, as it ended.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", metavar="N", min=1, help="Begin N lines before the end.")
    ] = 100,
    of_eval: OfEval = False,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Show the job's log, on stderr.

    With --follow a lost connection is made again, and no line is missed or shown twice.
    """
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, ssh_config=ssh_config)
    kind = "eval" if of_eval else "train"
    if follow:
        code, _ = verbs.follow(remote, kind, begin=-lines)
        return Outcome({"exit_code": code}, "", code)
    verbs.show_log(remote, kind, begin=-lines)
    return Outcome({}, "")


def attach(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    of_eval: OfEval = False,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Open the job's tmux window of the first host; Ctrl-B D leaves it."""
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, ssh_config=ssh_config)
    code = verbs.attach(remote, "eval" if of_eval else "train")
    return Outcome({"exit_code": code}, "", code)


def stop(
    word: AboutMachines = None,
    host: Host = None,
    dir: Folder = None,
    of_eval: OfEval = False,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Stop the job, and wait until it has saved."""
    from llmtrain.verbs import launch_ssh as verbs

    about = _config(word)
    remote = _remote(about, host=host, dir=dir, ssh_config=ssh_config)
    code = verbs.stop(remote, "eval" if of_eval else "train")
    told = {0: "it had finished", 75: "it has saved; continue it with --resume latest"}
    return Outcome({"exit_code": code}, told.get(code, f"it ended with exit code {code}"), 0 if code in told else code)


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG] RUN", help="Runs there, by id, or latest; the job's run when none is named."),
    ] = None,
    config: ConfigOption = None,
    host: Host = None,
    dir: Folder = None,
    python: Python = None,
    ssh_config: SshConfig = None,
    json: Json = False,
) -> Outcome:
    """Copy runs from the first host to the same place here.

    A copy that breaks goes on where it was.
    """
    from llmtrain.verbs import launch_ssh as verbs

    names = list(names or [])
    if config is None and names and names[0].endswith((".yaml", ".yml", ".json")):
        config = names.pop(0)
    about = _config(config)
    remote = _remote(about, host=host, dir=dir, python=python, ssh_config=ssh_config)
    done = verbs.fetch(remote, about, names)
    return Outcome(done, "\n".join(one["folder"] for one in done))


STATUS = ("host", "state", "run", "step", "loss", "tokens/s", "GPUs", "free")


def _loaded(
    word: str | None, overrides: Sequence[str] | None, option: str | None, *, required: bool = True
) -> tuple[LoadedConfig | None, list[str]]:
    """Load CONFIG with its overrides, if there is one."""
    from llmtrain.config.loading.load import load_config

    ref, values = read_words(word, overrides, option, required=required)
    return (load_config(ref, values) if ref is not None else None), values


def _config(word: str | None) -> Config | None:
    """Load the CONFIG that names the machines, if there is one."""
    loaded, _ = _loaded(word, None, None, required=False)
    return loaded.config if loaded else None


def _remote(config: Config | None, **given: Any) -> Remote:
    """Return the machines from the flags and the config, and set up logging."""
    from llmtrain.config.sections.running import LoggingConfig
    from llmtrain.launching.ssh.remote import remote_of
    from llmtrain.tracking.logs import setup_logging

    setup_logging(LoggingConfig(), run_folder=None, rank=0)
    return remote_of(config, given)


def _train_options(max_restarts: int, json: bool) -> list[str]:
    return [*([f"--max-restarts={max_restarts}"] if max_restarts else []), *(["--json"] if json else [])]


def _started(started: dict[str, Any]) -> Outcome:
    text = f"{started['run']} trains on {started['host']}; follow it: llmtrain launch ssh logs --follow"
    return Outcome(started, [Lines(text, ())])


def _followed(remote: Remote, kind: str, as_json: bool) -> Outcome:
    """Show the job's log to its end, and return what it printed."""
    from llmtrain.verbs import launch_ssh as verbs

    code, output = verbs.follow(remote, kind)
    return outcome_of(code, output, as_json=as_json)


def _machine(found: dict[str, Any]) -> Lines:
    """Return what `init` found on a machine, and each problem with its fix."""
    gpus = ", ".join(f"{gpu['name']} {gigabytes(gpu['memory_bytes'])}" for gpu in found["gpus"]) or "no GPU"
    runs = found["runs"]
    machine = f"{found['host']}: {gpus}; {found['cores']} cores; {gigabytes(runs['free_bytes'])} free at {runs['path']}"
    return Lines(machine, [f"! {finding['what']}: {finding['fix']}" for finding in found["findings"]])


def _status_row(found: dict[str, Any]) -> list[str]:
    """Return the row of a machine."""
    run = found.get("run") or {}
    state = found.get("state", "no job")
    if state == "ended":
        state = {0: "finished", 75: "stopped"}.get(found["exit"], f"failed ({found['exit']})")
    values = (run.get("steps"), run.get("loss"), run.get("tokens_per_sec"))
    steps, loss, speed = ("" if value is None else f"{value:,.6g}" for value in values)
    gpus, free = str(len(found["gpu"])), gigabytes(found["free"]) if "free" in found else ""
    return [found["host"], state, found.get("name", ""), steps, loss, speed, gpus, free]
