"""Check whether the shards that a config names exist, and are those that it would make now."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain._version import __version__
from llmtrain.config.sections.data import PrepareConfig, TokensConfig
from llmtrain.config.sections.quality import ExactDuplicatesStep, LengthStep, QualityStep
from llmtrain.config.sections.sources import used_paths
from llmtrain.data.manifest import InputRecord, Manifest, StepRecord, find_manifest
from llmtrain.data.prepare.adapters import load_adapter
from llmtrain.data.prepare.inputs import CorpusInput, find_inputs, inputs_are_here
from llmtrain.data.prepare.parallel import LocalExecutor
from llmtrain.data.prepare.quality.records import identities
from llmtrain.data.prepare.selection import Corpus, fingerprint
from llmtrain.data.prepare.vocabulary import vocabulary_options
from llmtrain.data.tokenizers import folder_fingerprint, load_tokenizer
from llmtrain.errors import ConfigError
from llmtrain.screen import counted
from llmtrain.storage.address import is_remote


@dataclass(frozen=True)
class NamedSource:
    """Shards that the data section names."""

    key: str
    path: str
    """Path of the shards; a glob is cut off before its first wildcard."""

    def __str__(self) -> str:
        return f"{self.key}: {self.path}"

    def is_missing(self) -> bool:
        """Return whether no manifest covers it, and there are no shards of another tool either.

        The reader judges those, and addresses.
        """
        if is_remote(self.path):
            return False
        if find_manifest(self.path) is not None or (self.path.endswith(".parquet") and os.path.isfile(self.path)):
            return False
        return next(Path(self.path).rglob("*.parquet"), None) is None

    def is_inside(self, folder: Path) -> bool:
        """Return whether `prepare`, writing into `folder`, would make this file."""
        return not is_remote(self.path) and Path(os.path.realpath(self.path)).is_relative_to(folder)


def named_sources(data: TokensConfig) -> list[NamedSource]:
    """Every source of the data section that is used."""
    sources = []
    val = [data.val] if isinstance(data.val, str) else data.val or []
    for key, paths in (("data.train", used_paths(data.train, data.mixture)), ("data.val", val)):
        for path in map(os.path.expanduser, paths):
            while not is_remote(path) and glob.has_magic(path) and not os.path.exists(path):
                path = os.path.dirname(path)
            sources.append(NamedSource(key, path))
    return sources


def check_would_be_made(sources: Sequence[NamedSource], *, options: PrepareConfig, output: Path) -> None:
    """Raise ConfigError when shards are missing, or will hold nothing, that `prepare` would not make in `output`."""
    for source in sources:
        if not source.is_inside(output):
            if source.is_missing():
                wanted = os.path.join(options.output, source.key.removeprefix("data."))
                raise ConfigError(
                    f"{source}: no token shards there, and prepare.output is another folder ({options.output}): "
                    f"{source.key} should be {wanted}"
                )
        elif source.key == "data.val" and options.val_fraction == 0:
            raise ConfigError(f"{source}: holds nothing when prepare.val_fraction is 0: remove one of them")


def recorded_options(options: PrepareConfig) -> dict[str, Any]:
    """Return the options that decide what the shards hold, with their defaults, as the manifest keeps them.

    Without `output` and `num_workers`, which do not, and `input`, which is recorded file by file.
    """
    recorded = options.model_dump(mode="json", exclude={"input", "output", "num_workers"})
    if (source := load_adapter(options.adapter).source_sha256) is not None:
        recorded["adapter_sha256"] = source
    recorded["tokenizer"] |= vocabulary_options(options.tokenizer)
    return recorded


def making_of(corpus: Corpus, options: PrepareConfig) -> dict[str, Any]:
    """All that decides what the shards will be; a preparation that was cut off may go on when this is the same."""
    digest = hashlib.sha256()
    for array in (corpus.version_hashes, corpus.fates, corpus.dropped_by, corpus.subset):
        digest.update(array.tobytes())
    path = options.tokenizer.path
    return {
        "tool_version": __version__,
        "options": recorded_options(options),
        "steps": [record.model_dump(mode="json") for record in identities(options.steps)],
        "inputs": [record.model_dump(mode="json") for record in corpus.inputs],
        "subsets": corpus.subsets,
        "documents": digest.hexdigest(),
        "tokenizer": folder_fingerprint(path) if path else None,
    }


def differences(manifest: Manifest, *, folder: Path, options: PrepareConfig, num_workers: int) -> list[str]:
    """Return the differences between the shards in `folder` and those that `options` ask for; empty if there are none.

    The inputs' content is hashed. Inputs that are not on this machine, as where only the shards were copied, are not
    compared.
    """
    now = recorded_options(options)
    found = [
        f"prepare.{name} was {was}, and is {now_is}"
        for name, was, now_is in _changed(options_as_today(manifest.options), now)
        if name != "shard_size"  # says where files end, not what is read
        and (name != "on_error" or manifest.counts.errors)
    ]
    if not any(difference.startswith("prepare.steps ") for difference in found):
        found += _changed_steps(manifest.steps, identities(options.steps))
    if options.tokenizer.path is not None and manifest.tokenizer.source_sha256 is not None:
        source = folder_fingerprint(options.tokenizer.path)
        if source is not None and source != manifest.tokenizer.source_sha256:
            found.append(f"the tokenizer in {options.tokenizer.path} has changed")
    if load_tokenizer(folder / manifest.tokenizer.path).sha256 != manifest.tokenizer.sha256:
        found.append(f"the tokenizer in {folder / manifest.tokenizer.path} was changed afterwards")
    if not found and inputs_are_here(options):
        inputs = find_inputs(options)
        found = _changed_inputs(manifest.inputs, inputs, fingerprint(inputs, executor=LocalExecutor(num_workers)))
    return found


def refuse_differences(manifest: Manifest, *, folder: Path, options: PrepareConfig, num_workers: int) -> None:
    """Raise ConfigError when the shards in `folder` are not what `options` ask for."""
    found = differences(manifest, folder=folder, options=options, num_workers=num_workers)
    if found:
        raise ConfigError(
            f"{folder}: the shards there were made otherwise: {'; '.join(found)}. Make them again with "
            "`llmtrain prepare CONFIG`, which replaces them, or name another prepare.output (and data.train, data.val)"
        )


def _changed(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    changed: list[tuple[str, Any, Any]] = []
    for name in sorted(was.keys() | now.keys()):
        old, new = was.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += _changed(old, new, f"{prefix}{name}.")
        elif old != new:
            changed.append((prefix + name, old, new))
    return changed


def options_as_today(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded options by the keys of today, where an earlier version made the shards."""
    options = dict(recorded)
    if "steps" not in options and {"min_length", "deduplicate"} <= options.keys():
        least, deduplicate = options.pop("min_length"), options.pop("deduplicate")
        steps: list[QualityStep] = [LengthStep(min_chars=least)] if least > 1 else []
        steps += [ExactDuplicatesStep()] if deduplicate else []
        options["steps"] = [step.model_dump(mode="json") for step in steps]
    return options


def _changed_steps(was: Sequence[StepRecord], now: Sequence[StepRecord]) -> list[str]:
    """Return what has changed of steps whose options are the same; nothing is known of shards of earlier versions."""
    found = []
    for at, (old, new) in enumerate(zip(was, now, strict=False)):
        if old.differs(new):
            same = old.version == new.version
            changed = "has another function" if same else f"was version {old.version}, and is {new.version}"
            found.append(f"prepare.steps[{at}] ({new.name}) {changed}")
    return found


def _changed_inputs(
    was: tuple[InputRecord, ...], inputs: Sequence[CorpusInput], now: tuple[InputRecord | None, ...]
) -> list[str]:
    if len(was) != len(now):
        return [f"prepare.input was {len(was)} inputs, and is {len(now)}"]
    found = []
    for old, source, new in zip(was, inputs, now, strict=True):
        if new is None:
            if old.path != source.path:
                found.append(f"prepare.input was {old.path}, and is {source.path}")
        elif old.sha256 != new.sha256:
            found.append(
                f"the files of the input {new.path} have changed: {counted(old.files, 'file')} of "
                f"{counted(old.bytes, 'byte')} then, "
                f"{new.files} of {new.bytes:,} now"
            )
        elif old.name != new.name:
            found.append(f"the input {old.name} is called {new.name} now")
    return found
