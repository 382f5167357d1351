"""Writes the kustomize base and overlays from what `launch k8s render` renders.

    python -m deploy.kubernetes.generate        # after a change to what is rendered

An overlay is a file `words`: what stands behind `launch k8s CONFIG`. The base has the objects that all overlays share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from llmtrain.config.loading.load import load_config
from llmtrain.launching.kubernetes.launch import ClusterRun, Document
from llmtrain.launching.kubernetes.render import render, to_yaml
from llmtrain.verbs.launch_k8s import cluster_run

FOLDER: Final = Path(__file__).parent
CONFIG: Final = "quickstart"
KUSTOMIZATION: Final = "kustomization.yaml"


def run_of(overlay: str) -> ClusterRun:
    """Return the run that an overlay describes."""
    words = (FOLDER / "overlays" / overlay / "words").read_text(encoding="utf-8").split()
    return cluster_run(load_config(CONFIG, words), words, name=None, env={})


def files() -> dict[str, str]:
    """Return the text of each file below this folder, by its path."""
    runs = {folder.parent.name: run_of(folder.parent.name) for folder in sorted(FOLDER.glob("overlays/*/words"))}
    rendered = {overlay: _by_file(run) for overlay, run in runs.items()}
    first, *others = rendered.values()
    shared = {file: one for file, one in first.items() if all(other.get(file) == one for other in others)}
    texts = {f"base/{file}": to_yaml([document]) for file, document in shared.items()}
    texts[f"base/{KUSTOMIZATION}"] = _kustomization(list(shared), namespace=None)
    for overlay, documents in rendered.items():
        own = {file: document for file, document in documents.items() if file not in shared}
        texts |= {f"overlays/{overlay}/{file}": to_yaml([document]) for file, document in own.items()}
        resources = ["../../base", *own]
        texts[f"overlays/{overlay}/{KUSTOMIZATION}"] = _kustomization(
            resources, namespace=runs[overlay].settings.namespace
        )
    return texts


def _by_file(run: ClusterRun) -> dict[str, Document]:
    """Return the documents by the name of their file, without the namespace, which the kustomization sets."""
    documents = {}
    for document in render(run):
        metadata = {key: value for key, value in document["metadata"].items() if key != "namespace"}
        documents[f"{document['kind'].lower()}-{metadata['name']}.yaml"] = {**document, "metadata": metadata}
    return documents


def _kustomization(resources: list[str], *, namespace: str | None) -> str:
    document: Document = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return to_yaml([{**document, **({"namespace": namespace} if namespace else {}), "resources": resources}])


if __name__ == "__main__":
    for name, text in files().items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")
