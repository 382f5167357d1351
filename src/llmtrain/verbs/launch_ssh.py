"""`launch ssh`: the project on other machines, a job there, and its runs back. One function for each sub-command.

push, initialize ─▶ train, evaluate ─▶ follow, status, show_log, attach, stop ─▶ fetch
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmtrain.config.loading.load import LoadedConfig
from llmtrain.config.sections.schema import Config
from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.ssh import copying, environment, group, job
from llmtrain.launching.ssh.connection import attach_terminal
from llmtrain.launching.ssh.job import NEWEST
from llmtrain.launching.ssh.remote import Remote, RemoteMachine
from llmtrain.storage.address import is_remote

Facts = dict[str, Any]


def push(remote: Remote, config: Config | None, *, delete: bool = False) -> list[Facts]:
    """Copy this folder and this program to the machines. `delete`: move files away there that are not here."""
    made = [config.prepare.output] if config and config.prepare else []
    stays_here = [path for path in (_root(config), remote.env_file) if path]

    def copy(machine: RemoteMachine) -> Facts:
        copying.push_program(machine)
        exclude = [*remote.exclude, *copying.patterns_of(stays_here)]
        protect = copying.patterns_of(made)
        sent = copying.push_project(machine, Path.cwd(), exclude=exclude, protect=protect, delete=delete)
        return {"host": machine.name, "folder": machine.folder, "files": sent}

    return [copy(machine) for machine in remote.machines]


def initialize(remote: Remote, config: Config | None) -> list[Facts]:
    """Make the environment on the machines, and ask `doctor` there. Raises RunError where a machine cannot train."""
    wants_gpu = config is not None and config.run.device.startswith("cuda")

    def prepare(machine: RemoteMachine) -> Facts:
        environment.check_tools(machine, environment.inspect_machine(machine, job="train-0"))
        copying.push_program(machine)
        job.put_variables(machine, remote)
        environment.make_environment(machine, remote)
        found = environment.run_llmtrain(machine, remote, "doctor", "--root-dir", _root(config))
        fatal = [finding for finding in found["findings"] if finding["severity"] == "fatal"]
        if fatal:
            raise RunError(f"{machine} cannot train: {fatal[0]['what']}; {fatal[0]['fix']}")
        if wants_gpu and not found["gpus"]:
            raise RunError(f"{machine}: torch sees no GPU there, and run.device is cuda: look at `nvidia-smi` there")
        return {"host": machine.name, **found}

    return [prepare(machine) for machine in remote.machines]  # not at once: they may share the folder


def train(
    remote: Remote,
    loaded: LoadedConfig | None,
    words: Sequence[str],
    *,
    resume: str | None = None,
    nproc: int | None = None,
    rendezvous: str | None = None,
) -> Facts:
    """Start training on the machines, as one job of which the first writes the run. `words`: of `llmtrain train`."""
    config, nodes = loaded.config if loaded else None, job.nodes_of(remote, "train")
    name = job.name_of_run(resume, config)
    begin = [f"--resume={resume}"] if resume else [f"output.run_id={name}"]
    more = group.group_words(nodes, remote, config, nproc=nproc, rendezvous=rendezvous, resume=bool(resume))
    for node, its_own in zip(nodes, more, strict=True):
        job.start(node, ["train", *job.config_there(node, loaded), *words, *begin, *its_own], remote=remote, name=name)
    return {"host": remote.first.name, "run": name, "state": "running"}


def evaluate(remote: Remote, loaded: LoadedConfig | None, words: Sequence[str]) -> Facts:
    """Start an evaluation on the first machine. `words`: of `llmtrain eval`, but its --config."""
    node = job.nodes_of(remote, "eval")[0]
    config = [f"--config={ref}" for ref in job.config_there(node, loaded)]
    job.start(node, ["eval", *words, *config], remote=remote, name=f"on-{remote.first.host}")
    return {"host": remote.first.name, "state": "running"}


def follow(remote: Remote, kind: str, *, begin: int = 0) -> tuple[int, str]:
    """Show the job's log until it ends. Return its exit code, and what it printed."""
    nodes = job.nodes_of(remote, kind)[: None if kind == "train" else 1]
    code = job.follow_all(nodes, begin=begin)
    return code, job.read_file(remote.first, f"{nodes[0].job}/result").decode(errors="replace")


def show_log(remote: Remote, kind: str, *, begin: int = 0) -> None:
    """Show what the job's log has by now."""
    for node in job.nodes_of(remote, kind)[: None if kind == "train" else 1]:
        job.follow(node, job.LogPrinter(node).write, begin=begin, wait_for_end=False)


def status(remote: Remote, config: Config | None) -> list[Facts]:
    """Return what is known of the machines and of the job; of its run what `llmtrain runs` there says."""

    def look(machine: RemoteMachine) -> Facts:
        number = remote.machines.index(machine)
        found = {"host": machine.name, **environment.inspect_machine(machine, job=f"train-{number}")}
        if number == 0 and found.get("name"):
            words = ("runs", "--root-dir", _root(config), "--limit", "1")
            named = () if found["name"] == NEWEST else ("--find", found["name"])
            runs = environment.run_llmtrain(machine, remote, *words, *named)
            found["run"] = runs[0] if isinstance(runs, list) and runs else None
        return found

    with ThreadPoolExecutor(len(remote.machines)) as pool:
        return list(pool.map(look, remote.machines))


def attach(remote: Remote, kind: str) -> int:
    """Show the job's tmux window here, and return the exit code. Raises RunError if no job is running."""
    if environment.inspect_machine(remote.first, job=f"{kind}-0").get("state") != "running":
        raise RunError(f"no job is running on {remote.first}; the last one's log: llmtrain launch ssh logs")
    return attach_terminal(remote.first, "attach", f"{kind}-0")


def stop(remote: Remote, kind: str) -> int:
    """Stop the job, wait until it has saved and ended, and return its exit code."""
    nodes = job.nodes_of(remote, kind)[: None if kind == "train" else 1]
    for node in nodes:
        job.terminate(node)
    return job.follow_all(nodes, begin=-1)


def fetch(remote: Remote, config: Config | None, names: Sequence[str]) -> list[Facts]:
    """Copy runs from the first machine to the same place here; the job's run where none is named."""
    if is_remote(_root(config)):
        raise ConfigError(f"the runs are in {_root(config)}: nothing has to be fetched from {remote.first}")
    names = list(names) or [job.read_file(remote.first, "train-0/name").decode().strip() or NEWEST]
    if NEWEST in names:
        found = environment.run_llmtrain(remote.first, remote, "runs", "--root-dir", _root(config), "--limit", "1")
        if not found:
            raise RunError(f"{remote.first} has no run in {_root(config)} yet")
        names[names.index(NEWEST)] = found[0]["id"]
    folders = [copying.fetch_run(remote.first, name, root=_root(config)) for name in names]
    return [{"run": folder.name, "folder": str(folder)} for folder in folders]


def _root(config: Config | None) -> str:
    return config.output.root_dir if config else "runs"
