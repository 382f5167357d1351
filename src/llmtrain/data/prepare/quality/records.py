"""Records of what each quality step is and did, as the manifest keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.quality import OwnStep, QualityStep
from llmtrain.data.manifest import DroppedRecord, StepRecord
from llmtrain.data.prepare.quality.own import Own
from llmtrain.data.prepare.quality.plan import STEPS, Plan, key_of

_LIBRARIES = {"near_duplicates": "rensa", "language": "py3langid"}


def identities(steps: Sequence[QualityStep]) -> list[StepRecord]:
    """Return what each step is, without counts. Raises ConfigError for a function that cannot be imported.

    The libraries need not be installed: a run that only reads shards compares these.
    """
    return [
        StepRecord(
            name=options.name,
            version=STEPS[options.name].version,
            library=_installed(options.name),
            function_sha256=Own(options, key=key_of(at)).source_sha256 if isinstance(options, OwnStep) else None,
        )
        for at, options in enumerate(steps)
    ]


def step_records(
    steps: Sequence[QualityStep],
    plan: Plan,
    *,
    hashes: NDArray[np.uint64],
    num_bytes: NDArray[np.int64],
    dropped_by: NDArray[np.uint16],
    sources: NDArray[np.int16],
    source_names: Sequence[str],
) -> tuple[StepRecord, ...]:
    """Count what each step was given, altered and dropped, of documents that have a text.

    hashes, num_bytes: as in `Examined`, of all documents; sources: index of each document's input in `source_names`.
    """
    dropped_at = np.array([len(steps), *(rule.position for rule in plan.rules)])[dropped_by]
    records = []
    for position, identity in enumerate(identities(steps)):
        before, after = plan.versions_before[position : position + 2]
        given = dropped_at >= position
        dropped = {}
        for index, rule in enumerate(plan.rules):
            chosen = dropped_by == index + 1
            if rule.position == position and chosen.any():
                by_source = np.bincount(sources[chosen], minlength=len(source_names)).tolist()
                dropped[rule.name] = DroppedRecord(
                    documents=int(chosen.sum()),
                    bytes=int(num_bytes[before, chosen].sum()),
                    by_source={name: count for name, count in zip(source_names, by_source, strict=True) if count},
                )
        stays = dropped_at > position
        altered = stays & (hashes[before] != hashes[after]).any(axis=1) if after > before else None
        records.append(
            identity.model_copy(
                update={
                    "documents": int(given.sum()),
                    "bytes": int(num_bytes[before, given].sum()),
                    "altered": 0 if altered is None else int(altered.sum()),
                    "bytes_after": int(num_bytes[after, stays].sum()),
                    "dropped": dropped,
                }
            )
        )
    return tuple(records)


def _installed(name: str) -> str | None:
    if (package := _LIBRARIES.get(name)) is None:
        return None
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None
