"""deploy/: the image's rules, and the manifests that are kept in the repository."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.kubernetes.generate import FOLDER, files, run_of
from llmtrain.launching.kubernetes.check import check
from llmtrain.launching.kubernetes.pod_security import violations
from llmtrain.launching.kubernetes.render import render

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
OVERLAYS = ("kind", "gpu", "rdma")


def documents_in(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def built(folder: Path) -> list[dict[str, Any]]:
    """What kustomize makes of a folder."""
    (kustomization,) = documents_in(folder / "kustomization.yaml")
    found = []
    for resource in kustomization["resources"]:
        path = folder / resource
        found += built(path) if path.is_dir() else documents_in(path)
    for document in found:
        if "namespace" in kustomization and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = kustomization["namespace"]
    return found


def order(document: dict[str, Any]) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def test_base_and_overlays_are_what_render_makes() -> None:
    kept = {str(path.relative_to(FOLDER)): path.read_text() for path in FOLDER.glob("*/**/*.yaml")}
    assert kept == files(), "run `make k8s-manifests`"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_a_run_that_a_cluster_accepts(overlay: str) -> None:
    documents = built(FOLDER / "overlays" / overlay)
    assert sorted(documents, key=order) == sorted(render(run_of(overlay)), key=order)
    assert check(documents) == []
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_builds_an_overlay(overlay: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "overlays" / overlay], capture_output=True, text=True)
    if "must be a file" in done.stderr:
        pytest.skip("kubectl builds overlays: this one is older than 1.21")
    assert sorted(yaml.safe_load_all(done.stdout), key=order) == sorted(render(run_of(overlay)), key=order)


def test_mlflow_is_accepted_under_restricted_pod_security() -> None:
    documents = documents_in(FOLDER / "mlflow.yaml")
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)
    assert list(violations(documents[-1]["spec"]["template"]["spec"])) == []


def test_a_run_reaches_mlflow_and_nothing_else_does() -> None:
    claim, service, policy, deployment = documents_in(FOLDER / "mlflow.yaml")
    template = deployment["spec"]["template"]
    labels, (container,) = template["metadata"]["labels"], template["spec"]["containers"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    (port,), (opened,) = service["spec"]["ports"], container["ports"]
    assert port["port"] == opened["containerPort"] == container["readinessProbe"]["tcpSocket"]["port"]
    assert f"--port={port['port']}" in container["command"]
    volumes = {one["name"]: one for one in template["spec"]["volumes"]}
    assert volumes["mlflow"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    assert {"/mlflow", "/tmp"} == mounts
    written = [word.partition("=")[2] for word in container["command"] if "/mlflow" in word]
    assert written == ["sqlite:////mlflow/mlflow.db", "/mlflow/artifacts"]
    documents = render(run_of("kind"))
    pod = documents[-1]["spec"]["template"]
    variables = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
    host = f"{service['metadata']['name']}:{port['port']}"
    assert variables["MLFLOW_TRACKING_URI"] == f"http://{host}"
    assert host in next(word for word in container["command"] if "--allowed-hosts" in word)
    (rule,) = policy["spec"]["ingress"]
    assert rule["from"][0]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert rule["ports"] == [{"protocol": "TCP", "port": port["port"]}]
    (own,) = [one for one in documents if one["kind"] == "NetworkPolicy"]
    assert {"to": [{"podSelector": {"matchLabels": labels}}], "ports": rule["ports"]} in own["spec"]["egress"]
    assert container["image"] == pod["spec"]["containers"][0]["image"]


def test_the_manual_names_every_variable_of_the_pods() -> None:
    rows = (ROOT / "docs" / "cluster.md").read_text().partition("| variable in the pods |")[2].partition("\n\n")[0]
    table = {name for row in rows.splitlines()[1:] for name in re.findall(r"`([A-Z_]+)`", row.split("|")[1])}
    runs = [run_of("kind"), run_of("gpu")]
    runs.append(replace(runs[1], settings=runs[1].settings.model_copy(update={"offline": True})))
    pods = [render(run)[-1]["spec"]["template"]["spec"]["containers"][0]["env"] for run in runs]
    assert table == {one["name"] for env in pods for one in env}


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_keeps_its_promises() -> None:
    text = DOCKERFILE.read_text()
    final = text.rpartition("\nFROM ")[2]
    assert text.count("\nFROM ") == 2
    assert "USER 1000:1000" in final
    assert 'ENTRYPOINT ["tini", "--", "llmtrain"]' in final
    assert "HEALTHCHECK" in final
    assert len(set(re.findall(r"org\.opencontainers\.image\.(\w+)", final))) == 5
    assert not re.search(r"(ARG|ENV) \S*(TOKEN|SECRET|PASSWORD|KEY)", text)


def test_only_what_is_copied_gets_into_the_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert "*" in lines
    assert {name for line in copied for name in line.split()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_the_cpu_image_takes_everything_from_the_lock_but_torch_and_cuda() -> None:
    command = ["awk", "-f", str(ROOT / "deploy" / "without-cuda.awk"), str(ROOT / "requirements.lock")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = re.compile(r"^([a-z0-9._-]+)==", re.MULTILINE)
    left, every = set(names.findall(done.stdout)), set(names.findall((ROOT / "requirements.lock").read_text()))
    gone = every - left
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= gone
    assert all(re.match("torch$|triton$|cuda-|nvidia-", name) for name in gone)
    assert "nvidia-ml-py" in left
    assert done.stdout.count("--hash=") > 500
