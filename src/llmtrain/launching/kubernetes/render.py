"""Renders all documents of a run, as plain dicts and as YAML that kubectl reads."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import StringIO

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

from llmtrain.launching.kubernetes.launch import ClusterRun, Document
from llmtrain.launching.kubernetes.surroundings import surroundings
from llmtrain.launching.kubernetes.workloads import workload

PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./()=$-]*(:[A-Za-z0-9_./-]+)*")
YAML_1_1 = re.compile(r"(y|yes|n|no|true|false|on|off|null)", re.IGNORECASE)
"""kubectl reads YAML 1.1, in which these words are not text."""
_NO_TEXT = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\uffff"
BLOCK = re.compile(rf"[^\s{_NO_TEXT}][^\t{_NO_TEXT}]*[^\s{_NO_TEXT}]\n")
"""Text that a YAML block keeps as it is: no control characters, no blank at its start, one line break at its end."""


class _Representer(SafeRepresenter):
    """Writes texts of several lines as blocks, and quotes what YAML 1.1 might not read as text."""

    def represent_str(self, data: str) -> ScalarNode:
        style = None if PLAIN.fullmatch(data) and not YAML_1_1.fullmatch(data) else '"'
        if "\n" in data and BLOCK.fullmatch(data):
            style = "|"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def ignore_aliases(self, data: object) -> bool:
        return True


_Representer.add_representer(str, _Representer.represent_str)


def render(run: ClusterRun) -> list[Document]:
    """Return all objects of the run, in the order of their creation, with the namespace if the run has one."""
    documents = [*surroundings(run), workload(run)]
    if run.settings.namespace is None:
        return documents
    return [
        document
        if document["kind"] == "Namespace"
        else {
            **document,
            "metadata": {"name": document["metadata"]["name"], "namespace": run.settings.namespace}
            | document["metadata"],
        }
        for document in documents
    ]


def to_yaml(documents: Iterable[Document]) -> str:
    """Return the documents as YAML that kubectl and this program read in the same way."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10**6
    parts = []
    for document in documents:
        stream = StringIO()
        yaml.dump(document, stream)
        parts.append(stream.getvalue())
    return "---\n".join(parts)
