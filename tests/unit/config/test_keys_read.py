"""Every key that a config accepts is read by the program: a key without effect would mislead users."""

from __future__ import annotations

import ast
import inspect
from collections import defaultdict
from pathlib import Path

import llmtrain
from llmtrain.config.loading.walk import sections_in, walk
from llmtrain.config.sections.base import Section
from llmtrain.config.sections.schema import Config

PACKAGE = Path(llmtrain.__file__).parent
# Printing a key, as `validate` does, is not using it.
NOT_COUNTED = (PACKAGE / "config", PACKAGE / "cli")
# Which variant is meant is decided while the config is loaded, and which schema before there was another.
READ_BY_LOADING = {"schema_version", "model.name", "model.preset", "data.name", "prepare.steps.name"}
SECTIONS = {key.owner.__name__: key.owner for key in walk(Config)}


class Reads(ast.NodeVisitor):
    """Which (section, key) a file reads, with types followed through annotations, assignments and attributes."""

    def __init__(self, attributes: dict[str, set[str]]) -> None:
        self.names: dict[str, set[str]] = defaultdict(set)
        self.attributes = attributes
        self.found: set[tuple[str, str]] = set()

    def types_of(self, node: ast.AST) -> set[str]:
        if isinstance(node, ast.Name):
            return self.names[node.id]
        if not isinstance(node, ast.Attribute):
            return set()
        types = {below for owner in self.types_of(node.value) for below in types_of_key(owner, node.attr)}
        return types or self.attributes.get(node.attr, set())

    def visit_arg(self, node: ast.arg) -> None:
        self.names[node.arg] |= named_in(node.annotation)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.names[node.target.id] |= named_in(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id == "isinstance" and isinstance(node.args[0], ast.Name):
            self.names[node.args[0].id] |= named_in(node.args[1])
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found |= {(owner, node.attr) for owner in self.types_of(node.value)}
        self.generic_visit(node)

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its_value in zip(target.elts, value.elts, strict=False):
                self.bind(one, its_value)
        elif isinstance(target, ast.Name):
            self.names[target.id] |= self.types_of(value)


def named_in(annotation: ast.AST | None) -> set[str]:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    if "DataConfig" in names:
        names |= {"TokensConfig", "SyntheticConfig", "CorpusConfig", "HuggingFaceDataConfig", "OwnDataConfig"}
    if "TextData" in names:
        names |= {"CorpusConfig", "HuggingFaceDataConfig"}
    if "ReadyData" in names:
        names |= {"TokensConfig", "SyntheticConfig", "OwnDataConfig"}
    return names & SECTIONS.keys()


def types_of_key(owner: str, key: str) -> set[str]:
    field = SECTIONS[owner].model_fields.get(key) if owner in SECTIONS else None
    return {section.__name__ for section in sections_in(field.annotation)} if field else set()


def keys_through_properties(owner: type[Section], name: str) -> set[str]:
    """The keys that a property of a section reads, directly or through another property."""
    member = inspect.getattr_static(owner, name, None)
    if not isinstance(member, property):
        return set()
    assert member.fget
    tree = ast.parse(inspect.cleandoc(inspect.getsource(member.fget)))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return read | {key for below in read if below != name for key in keys_through_properties(owner, below)}


def keys_read() -> set[tuple[str, str]]:
    files = [
        file for file in sorted(PACKAGE.rglob("*.py")) if not any(file.is_relative_to(part) for part in NOT_COUNTED)
    ]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    attributes: dict[str, set[str]] = defaultdict(set)
    attributes["config"].add("Config")
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        attributes[item.target.id] |= named_in(item.annotation)
    found: set[tuple[str, str]] = set()
    for tree in trees:
        reads = Reads(attributes)
        reads.visit(tree)  # twice, since a name may be bound below its use in the text
        reads.visit(tree)
        found |= reads.found
    for owner, name in list(found):
        found |= {(owner, key) for key in keys_through_properties(SECTIONS[owner], name)}
        for key, field in SECTIONS[owner].model_fields.items():
            for below in sections_in(field.annotation):  # a property may read keys of a section inside its own
                if (owner, key) in found:
                    found |= {
                        (below.__name__, inner)
                        for inner in keys_through_properties(SECTIONS[owner], name)
                        if inner in below.model_fields
                    }
    return found


def test_every_key_of_the_schema_is_read_outside_the_config() -> None:
    found = keys_read()
    unread = [
        key.dotted
        for key in walk(Config)
        if (key.owner.__name__, key.path[-1]) not in found and key.dotted not in READ_BY_LOADING
    ]
    assert unread == [], "accepted but never read: use these keys, or take them out of the schema"


def test_the_search_tells_read_from_unread_and_keeps_sections_apart() -> None:
    reads = Reads({"config": {"Config"}})
    source = """
def build(attention: AttentionConfig, job):
    trainer, data = job.config.trainer, job.config.data
    for source in data.train:
        source.weight
    return attention.dropout, trainer.max_steps
"""
    tree = ast.parse(source)
    reads.visit(tree)
    reads.visit(tree)
    assert {("AttentionConfig", "dropout"), ("TrainerConfig", "max_steps"), ("MixedSource", "weight")} <= reads.found
    assert ("DecoderConfig", "dropout") not in reads.found
    assert keys_through_properties(SECTIONS["AttentionConfig"], "kv_heads") == {"num_kv_heads", "num_heads", "variant"}
