"""The processes of a run on several machines: how many each machine starts, and where they meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from secrets import token_hex

from llmtrain.config.sections.schema import Config
from llmtrain.distributed.rendezvous import first_machine
from llmtrain.errors import ConfigError
from llmtrain.launching.ssh.connection import address_of, run_script
from llmtrain.launching.ssh.environment import OWN_PYTHON, check_tools, inspect_machine
from llmtrain.launching.ssh.job import Node, read_file, write_file
from llmtrain.launching.ssh.remote import Remote, RemoteMachine

log = logging.getLogger("llmtrain.ssh")


def group_words(
    nodes: Sequence[Node],
    remote: Remote,
    config: Config | None,
    *,
    nproc: int | None,
    rendezvous: str | None,
    resume: bool,
) -> list[list[str]]:
    """Return the options --nproc, --nnodes, --node-rank and --rendezvous of `llmtrain train` for each node.

    Without `nproc`, a single machine starts one process, and each of several machines starts one for each GPU. Where
    the machines do not share the folder, strategy auto becomes ddp, which alone can save there. Raises ConfigError if
    the machines have different folders or numbers of GPUs.
    """
    if len(nodes) == 1:
        return [[f"--nproc={nproc}"] if nproc else []]
    found = [inspect_machine(node.machine, job=node.job) for node in nodes]
    for node, facts in zip(nodes, found, strict=True):
        check_tools(node.machine, facts)
    folders = {str(facts.get("folder")): node.machine.name for node, facts in zip(nodes, found, strict=True)}
    if len(folders) > 1:
        named = " and ".join(f"{folder} on {name}" for folder, name in folders.items())
        raise ConfigError(f"the project's folder is {named}: give one --dir that has the same path on all hosts")
    shared = check_sharing(nodes, config, resume=resume)
    num_gpus = {node.machine.name: len(facts["gpu"]) for node, facts in zip(nodes, found, strict=True)}
    if nproc is None and len(set(num_gpus.values())) > 1:
        listed = ", ".join(f"{name} has {number}" for name, number in num_gpus.items())
        raise ConfigError(
            f"the hosts have different numbers of GPUs ({listed}): give --nproc, the number of processes on each"
        )
    place = first_machine(config.distributed.rendezvous, option=rendezvous) if config else rendezvous
    if place is None:
        address = address_of(remote.first)
        place = f"{f'[{address}]' if ':' in address else address}:{free_port(remote.first, remote)}"
    each = [f"--nproc={nproc or max(1, *num_gpus.values())}", f"--nnodes={len(nodes)}", f"--rendezvous={place}"]
    if not shared and config is not None and config.distributed.strategy == "auto":
        each.append("distributed.strategy=ddp")
    return [[*each, f"--node-rank={node.number}"] for node in nodes]


def free_port(machine: RemoteMachine, remote: Remote) -> int:
    """Return a free port there. Raises ConfigError if Python does not run there."""
    answer = run_script(machine, "port", remote.python or OWN_PYTHON)
    if answer.exit_code or not answer.stdout.strip().isdigit():
        raise ConfigError(f"{machine}: Python does not run there: make the environment by `llmtrain launch ssh init`")
    return int(answer.stdout)


def check_sharing(nodes: Sequence[Node], config: Config | None, *, resume: bool) -> bool:
    """Return whether the machines share the project's folder. If not, warn; raise ConfigError if the run needs it."""
    token = token_hex(8)
    write_file(nodes[0].machine, "shared", token)
    alone = ", ".join(node.machine.name for node in nodes[1:] if read_file(node.machine, "shared") != token.encode())
    if not alone:
        return True
    sharded = config is not None and config.distributed.strategy in ("fsdp", "fsdp_tp")
    if resume or sharded:
        why = "a run is resumed from its checkpoint" if resume else "each process saves its part of a checkpoint"
        raise ConfigError(f"{alone} does not see the files of {nodes[0].machine}, and {why}: share the folder")
    log.warning(
        "%s does not see the files of %s: only ddp can save, and the run cannot be resumed on all",
        alone,
        nodes[0].machine,
    )
    return False
