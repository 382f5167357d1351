"""The documents of a run: right by the strict schema and by our own check, for every kind and setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError
from llmtrain.launching.kubernetes.check import check
from llmtrain.launching.kubernetes.launch import ClusterRun, host_name, name_of
from llmtrain.launching.kubernetes.pod import command
from llmtrain.launching.kubernetes.render import render, to_yaml
from llmtrain.verbs.launch_k8s import cluster_run

KINDS = ("job", "jobset", "statefulset")
PRIVILEGED = ["kubernetes.pod_security=privileged", "kubernetes.namespace=own"]
OVERLAYS: dict[str, list[str]] = {
    "plain": [],
    "kind": ["run.device=cpu", "kubernetes.storage.access_mode=ReadWriteOnce", "kubernetes.mlflow=true"],
    "gpu": ["kubernetes.gpus_per_node=8", "kubernetes.nodes=4", "kubernetes.spread=required"],
    "rdma": ["kubernetes.gpus_per_node=8", "kubernetes.nodes=2", "kubernetes.rdma=rdma/ib", *PRIVILEGED],
    "host path": ["run.device=cpu", "kubernetes.storage.host_path=/srv", *PRIVILEGED],
    "queue": ["kubernetes.queue=team", "kubernetes.priority_class=low", "kubernetes.namespace=team"],
    "placed": ["kubernetes.node_selector={pool: a}", "kubernetes.tolerations=[x, 'y:NoSchedule', 'z=on:NoExecute']"],
    "offline": ["kubernetes.offline=true", "kubernetes.storage.claims={data: team-data}", "kubernetes.env={A: 'yes'}"],
}


def cluster_run_of(*words: str, name: str | None = None, config: str = "quickstart") -> ClusterRun:
    return cluster_run(load_config(config, words), words, name=name, env={})


def documents_of(*words: str, name: str | None = None) -> list[dict[str, Any]]:
    return render(cluster_run_of(*words, name=name))


def of_kind(documents: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == kind)


def pod_of(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spec = documents[-1]["spec"]
    if documents[-1]["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    pod: dict[str, Any] = spec["template"]["spec"]
    return pod


def validate(document: dict[str, Any]) -> None:
    """By the strict schema of Kubernetes; a JobSet's Job as a Job, since the schema has no JobSet."""
    version = "1.36" if document["apiVersion"].endswith("v1alpha2") and document["kind"] == "PodGroup" else "1.37"
    if document["kind"] == "JobSet":
        template = document["spec"]["replicatedJobs"][0]["template"]
        document = {"apiVersion": "batch/v1", "kind": "Job", **template}
    kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize(("kind", "overlay"), list(product(KINDS, OVERLAYS)))
def test_every_kind_with_every_setting_passes_the_schema_and_the_check(kind: str, overlay: str) -> None:
    documents = documents_of(f"kubernetes.kind={kind}", *OVERLAYS[overlay])
    assert check(documents) == []
    for document in documents:
        validate(document)


@pytest.mark.parametrize("version", ["v1alpha2", "v1beta1"])
def test_pods_are_scheduled_together_only_with_gang_scheduling(version: str) -> None:
    documents = documents_of(f"kubernetes.gang_scheduling={version}", "kubernetes.nodes=4")
    for document in documents:
        validate(document)
    group = of_kind(documents, "PodGroup")
    assert group["spec"]["schedulingPolicy"] == {"gang": {"minCount": 4}}
    assert pod_of(documents)["schedulingGroup"] == {"podGroupName": group["metadata"]["name"]}
    assert "schedulingGroup" not in pod_of(documents_of())
    with pytest.raises(ConfigError, match=r"needs kubernetes\.kind: job"):
        cluster_run_of(f"kubernetes.gang_scheduling={version}", "kubernetes.kind=jobset")


def test_the_pods_of_a_job_get_rank_and_rendezvous_from_its_index() -> None:
    run = cluster_run_of("kubernetes.nodes=4", "kubernetes.gpus_per_node=2", "optimizer.lr=0.001", name="one")
    assert command(run) == [
        *("llmtrain", "train", "/etc/llmtrain/config.yaml", "optimizer.lr=0.001"),
        *("output.root_dir=/runs", "output.run_id=one", "--resume=auto"),
        *("--nproc=2", "--nnodes=4", "--node-rank=$(NODE_RANK)", "--rendezvous=one-0.one:29400"),
    ]
    for kind, path in (
        ("job", "job-completion-index"),
        ("jobset", "job-completion-index"),
        ("statefulset", "pod-index"),
    ):
        container = pod_of(documents_of("kubernetes.nodes=4", f"kubernetes.kind={kind}"))["containers"][0]
        rank = next(variable for variable in container["env"] if variable["name"] == "NODE_RANK")
        assert path in rank["valueFrom"]["fieldRef"]["fieldPath"]
    job_set = cluster_run_of("kubernetes.nodes=2", "kubernetes.kind=jobset", name="one")
    assert "--rendezvous=one-node-0-0.one:29400" in command(job_set)


def test_the_rendezvous_waits_for_startup_minutes() -> None:
    container = pod_of(documents_of("kubernetes.nodes=2", "kubernetes.startup_minutes=30"))["containers"][0]
    assert {"name": "PET_RDZV_CONF", "value": "timeout=1800"} in container["env"]


def test_one_process_needs_no_launcher() -> None:
    assert command(cluster_run_of("run.device=cpu", name="one"))[-1] == "--resume=auto"
    assert command(cluster_run_of("kubernetes.gpus_per_node=8", name="one"))[-1] == "--nproc=8"


def test_a_dollar_in_an_override_is_escaped() -> None:
    assert "run.notes=$$(HOME)" in command(cluster_run_of("run.notes=$(HOME)"))


def test_exit_codes_decide_whether_a_pod_is_retried() -> None:
    spec = of_kind(documents_of("kubernetes.nodes=2"), "Job")["spec"]
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2, 42]), ("Ignore", None), ("Ignore", [75])]
    assert spec["backoffLimit"] == 6  # a hang ends both pods with 76
    assert (spec["completions"], spec["parallelism"], spec["podReplacementPolicy"]) == (2, 2, "Failed")


def test_volumes_outlive_the_run_and_secrets_are_references() -> None:
    documents = documents_of("kubernetes.storage.claims={data: team-data}", name="one")
    claims = [document["metadata"]["name"] for document in documents if document["kind"] == "PersistentVolumeClaim"]
    assert claims == ["llmtrain-runs", "llmtrain-models", "llmtrain-cache"]
    pod = pod_of(documents)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "team-data"}
    assert volumes["secrets"]["secret"]["defaultMode"] == 0o440
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "llmtrain", "optional": True}}]
    assert pod["terminationGracePeriodSeconds"] == 180


def test_the_config_map_has_the_text_of_the_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/here")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"data": {"name": "tokens", "train": "${oc.env:DATA_ROOT}/x"}}))
    run = cluster_run_of(config=str(file))
    assert of_kind(render(run), "ConfigMap")["data"] == {"config.json": file.read_text()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kubernetes.env={HF_TOKEN: abc}"], "kubernetes.env.HF_TOKEN is a secret"),
        (["kubernetes.env={A: hf_abcdefghijklmnopqrst}"], "kubernetes.env.A is a secret"),
        (["run.notes=hf_abcdefghijklmnopqrst"], "an override contains a secret"),
        (["kubernetes.rdma=rdma/ib"], "restricted Pod Security forbids: set kubernetes.pod_security"),
        (["kubernetes.storage.host_path=/srv"], "restricted Pod Security forbids: set kubernetes.pod_security"),
        (["run.device=cpu", "kubernetes.gpus_per_node=8"], "each pod would hold 8 GPUs"),
        (["run.device=cuda", "kubernetes.gpus_per_node=0"], "pods have no GPU"),
        (["distributed.rendezvous.rank=1"], "starts the processes and numbers them itself"),
        (["distributed.rendezvous={master_addr: a, master_port: 1}"], "says a:1, but --rendezvous says"),
        (["kubernetes.tolerations=[a:Never]"], "kubernetes.tolerations"),
        (["kubernetes.memory=lots"], "kubernetes.memory"),
        (["kubernetes.pod_security=privileged"], "name one for these runs alone"),
    ],
)
def test_settings_that_cannot_work_are_one_message(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_run_of(*words)


def test_a_secret_in_the_config_is_found_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: {name: synthetic}\nrun:\n  notes: hf_abcdefghijklmnopqrst\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:3: a secret"):
        cluster_run_of(config=str(file))


@given(st.text(min_size=1, max_size=300), st.sampled_from(KINDS), st.integers(1, 20000))
def test_any_name_becomes_one_with_valid_host_names(wanted: str, kind: str, nodes: int) -> None:
    name = name_of(wanted, kind=kind, nodes=nodes)
    last = host_name(name, kind=kind, index=nodes - 1)
    assert len(last) <= 63
    assert last.isascii()
    assert last == last.lower()
    assert last.replace("-", "").isalnum()
    assert last[0].isalpha()
    assert name_of(name, kind=kind, nodes=nodes) == name


def test_long_names_that_differ_at_their_end_stay_different() -> None:
    one, two = ("x" * 80 + end for end in "ab")
    assert name_of(one, kind="job", nodes=2) != name_of(two, kind="job", nodes=2)


@pytest.mark.parametrize(
    "character", [*map(chr, range(32)), "\x7f", "\x85", "\u2028", "\ufeff", "\ufffe", "\U0001f600"]
)
def test_yaml_keeps_any_character_at_any_place(character: str) -> None:
    for text in (f"{character}ab\n", f"a{character}b\n", f"ab{character}\n", f"ab{character}", f"a\n{character}\nb\n"):
        assert yaml.safe_load(to_yaml([{"text": text}])) == {"text": text}


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.text("abcz", min_size=1, max_size=3),
        st.one_of(
            st.text(max_size=30), st.sampled_from(["on", "no", "y", "0440", "1e3", "1:30", "~", "a: b\n", " a\n"])
        ),
        max_size=4,
    )
)
def test_yaml_1_1_readers_get_the_same_text(data: dict[str, str]) -> None:
    document = {"kind": "ConfigMap", "data": data}
    assert list(yaml.safe_load_all(to_yaml([document, document]))) == [document, document]


@settings(max_examples=20, deadline=None)
@given(st.text(min_size=1, max_size=90), st.sampled_from(KINDS), st.integers(1, 300), st.integers(0, 8))
def test_names_and_sizes_of_any_run_pass_the_check(name: str, kind: str, nodes: int, gpus: int) -> None:
    words = [f"kubernetes.kind={kind}", f"kubernetes.nodes={nodes}", f"kubernetes.gpus_per_node={gpus}"]
    words += ["trainer.grad_accum_steps=1", "trainer.global_batch_size=null"]
    assert check(documents_of(*words, name=name)) == []
