"""Makes a model's card from its run: config, data, metrics, environment, evaluation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from llmtrain._version import __version__
from llmtrain.config.loading.load import yaml_text
from llmtrain.config.loading.tree import parse_file
from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.publishing import PublishConfig
from llmtrain.data.files.find import DataFile, find_rows
from llmtrain.errors import ConfigError
from llmtrain.models.fetch import base_of_adapter, is_adapter_folder
from llmtrain.models.folder import OWN_MODEL_TYPE
from llmtrain.models.own_model import OWN_CLASS_TYPE
from llmtrain.publishing.exported import Source
from llmtrain.publishing.improvement import Evaluation
from llmtrain.publishing.markdown import Code
from llmtrain.publishing.model_card import Card
from llmtrain.publishing.place import EXPORT_FILE
from llmtrain.publishing.public_text import public
from llmtrain.reports.document import run_document
from llmtrain.runs.json_files import json_object
from llmtrain.screen import counted, visible
from llmtrain.storage.address import is_remote
from llmtrain.storage.versions import commit_in
from llmtrain.tracking.redaction import redact, redact_config

_RESULTS = (
    ("validation loss, nats a token", "val_loss", "{:.4f}"),
    ("bits per byte, validation", "bits_per_byte", "{:.4f}"),
    ("training loss, last", "loss", "{:.4f}"),
    ("steps", "steps", "{:,}"),
    ("tokens trained on", "tokens", "{:,}"),
)
_GENERAL_LIMITS = (
    "It has learned from its data alone, with what is wrong or one-sided there, and can state what is false.",
    "It was measured on what is named above; nothing is known of other uses, other languages, or of what it does with "
    "hostile input.",
)


def make_card(
    source: Source, origin: Source, settings: PublishConfig, evaluation: Evaluation | None
) -> tuple[Card, dict[str, Any]]:
    """Return the card of `source`, and the curves of its run to be drawn. The card of a model of no run has less.

    `origin`: the checkpoint from which `source` was exported or merged, else `source` itself.
    """
    told = run_document(origin.run) if origin.run is not None else {}
    base = _base(origin if source.config is None else source, settings)
    library, loading = _loading(source, base, settings)
    curves = told.get("curves", {})
    card = Card(
        name=origin.name,
        license=settings.license,
        library=library,
        summary=_summary(source, told, base),
        loading=loading,
        tags=settings.tags,
        base_model=base if _is_on_hub(base) else None,
        datasets=sorted({name for row in told.get("data", []) if (name := _hub_dataset(row["source"]))}),
        description=settings.description,
        data=public(list(_data(origin, told))),
        results=_results(told),
        has_curves=any(name in curves for name in ("train/loss", "val/loss")),
        comparison=evaluation.comparison if evaluation is not None else {},
        comparison_about=public(_comparison_about(evaluation)),
        making={name: _published(value) for name, value in [*_making(origin, told), *_made_into(source)]},
        config=_config_text(origin),
        limits=[*([settings.limits] if settings.limits else []), *_contamination(evaluation), *_GENERAL_LIMITS],
    )
    return card, curves


def _published(value: str) -> str:
    return value if isinstance(value, Code) else public(value)


def _base(source: Source, settings: PublishConfig) -> str | None:
    """Return what the model was tuned from: a Hub id, or the name of a folder."""
    if settings.base_model is not None:
        return settings.base_model
    if source.folder.is_dir() and is_adapter_folder(source.folder):
        return base_of_adapter(source.folder)[0]
    model = source.config.model if source.config is not None else None
    if isinstance(model, HuggingFaceConfig):
        return model.path if model.init == "pretrained" else None
    return model.init_from if model is not None else None


def _loading(source: Source, base: str | None, settings: PublishConfig) -> tuple[str, str]:
    """Return the library, and Python that loads the model with it, from the repository or the current folder."""
    place = settings.repo_id or "."
    here = "" if settings.repo_id else "  # this folder"
    kind = json_object(source.folder / "config.json", problems=[]).get("model_type")
    if kind == OWN_MODEL_TYPE and not is_adapter_folder(source.folder):
        return "llmtrain", (
            f'import llmtrain\n\nmodel = llmtrain.load_model("{place}"){here}\n'
            'print(model.generate("Once upon a time")[0].completion)\n'
        )
    if kind == OWN_CLASS_TYPE:
        name = visible(str(json_object(source.folder / "config.json", problems=[]).get("class")))
        at = f"{place}@COMMIT" if settings.repo_id else place
        return "llmtrain", (
            f"# The code of {name} is not published with its weights: install its package, or put "
            "it\n# into the current folder. trust_remote_code lets llmtrain import it.\n"
            f'import llmtrain\n\nmodel = llmtrain.load_model("{at}", trust_remote_code=True){here}\n'
            'print(model.generate("Once upon a time")[0].completion)\n'
        )
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    lines = f'tokenizer = AutoTokenizer.from_pretrained("{place}"){here}\n'
    trust = ", trust_remote_code=True" if source.trusts_code else ""
    if is_adapter_folder(source.folder):
        imports = f"from peft import PeftModel\n{imports}"
        if _is_on_hub(base):
            lines += f'base = AutoModelForCausalLM.from_pretrained("{base}"{trust})\n'
        else:
            lines += (
                f"# {visible(_public(base))}, the model that this adapter was trained on, is not published with it: "
                "put\n# the path or the Hub id of your copy here.\n"
                f'base = AutoModelForCausalLM.from_pretrained("BASE"{trust})\n'
            )
        lines += f'model = PeftModel.from_pretrained(base, "{place}")\n'
    else:
        lines += f'model = AutoModelForCausalLM.from_pretrained("{place}"{trust})\n'
    lines += (
        'ids = tokenizer("Once upon a time", return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=40)[0]))\n"
    )
    return "peft" if is_adapter_folder(source.folder) else "transformers", imports + lines


def _summary(source: Source, told: Mapping[str, Any], base: str | None) -> str:
    parameters = (told.get("summary") or {}).get("parameters") or {}
    total, trainable = parameters.get("total"), parameters.get("trainable")
    size = f" of {total:,} parameters" if isinstance(total, int) else ""
    if is_adapter_folder(source.folder):
        return f"A LoRA adapter for {_public(base)}" + (f", {trainable:,} parameters" if trainable else "") + "."
    how = f"tuned from {_public(base)}" if base is not None else "trained from scratch"
    if told:
        return f"A decoder-only language model{size}, {how} with llmtrain {__version__}."
    return f"A decoder-only language model{size}, published with llmtrain {__version__}."


def _public(name: str | None) -> str:
    """Return the name of a model without its path on this machine."""
    return str(name) if name is None or _is_on_hub(name) else Path(name).name


def _is_on_hub(name: str | None) -> bool:
    """Return whether the name is an id: the folder of a local model is recorded with its full path."""
    return name is not None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not Path(name).exists()


def _hub_dataset(path: str) -> str | None:
    if path.startswith("hf://"):
        return "/".join(path.removeprefix("hf://").removeprefix("datasets/").split("@")[0].split("/")[:2])
    return None


def _data(source: Source, told: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield a row for each source: hashes of inputs and rows, tokens, the revision."""
    meta = json_object(source.run / "meta.json", problems=[]) if source.run is not None else {}
    home = Path(str(meta.get("working_folder") or "."))
    for entry in told.get("data", []):
        row = {"source": str(redact(entry["source"])), "split": str(entry["split"])}
        if "splits" in entry:
            split = entry["splits"].get(entry["split"]) or next(iter(entry["splits"].values()))
            row |= {"documents": f"{split['documents']:,}", "tokens": f"{split['tokens']:,}"}
            row["made of, sha256"] = ", ".join(f"{one['name']} {one['sha256'][:16]}…" for one in entry["inputs"])
            row["tokenizer, sha256"] = f"{entry['tokenizer']['sha256'][:16]}…"
        elif digest := _hash_of_rows(home, str(entry["source"])):
            row["made of, sha256"] = digest
        yield row
    identity = json_object(source.folder.parent / "state.json", problems=[]).get("identity") or {}
    fingerprint = (identity.get("data") or {}).get("fingerprint")
    if fingerprint:
        yield {"source": "all that it was trained on, in its order", "made of, sha256": str(fingerprint)}


def _hash_of_rows(home: Path, path: str) -> str | None:
    """Return the hash of a file of rows, or of all files of a folder or glob; of a remote source its revision."""
    if is_remote(path):
        return commit_in(path) or path.partition("@")[2] or None
    try:
        found = find_rows([str(home / Path(path).expanduser())], key="data.train")
    except ConfigError:  # it does not exist any more
        return None
    digests = []
    for file in found:
        if isinstance(file, DataFile):
            with file.open() as stream:
                digests.append(_sha256(stream))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else None


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def _results(told: Mapping[str, Any]) -> dict[str, str]:
    return {label: form.format(told[key]) for label, key, form in _RESULTS if told.get(key) is not None}


def _comparison_about(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "It was not compared with a baseline."
    document = evaluation.document
    about = f"{counted(document.get('rows', 0), 'row')} of {document.get('data')}, on {str(document.get('time'))[:10]}"
    if not evaluation.comparison:
        return f"It was measured on {about}, and not compared with a baseline."
    return (
        f"Against {_public(str(document.get('baseline')))} on the same {about}. The interval is the 95 % of a paired "
        "bootstrap; “better” and “worse” stand where it leaves 0 out."
    )


def _contamination(evaluation: Evaluation | None) -> Iterator[str]:
    found = (evaluation.document.get("contamination") or {}) if evaluation is not None else {}
    if found.get("checked") and found.get("rows"):
        yield f"{found['rows']:,} of the rows that it was measured on stand among those that it was trained on."


def _making(source: Source, told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    environment = told.get("environment", {})
    start = environment.get("Start", {})
    if source.run is not None:
        yield "run", source.run.name
        yield "checkpoint", str(source.checkpoint)
    if start.get("command"):
        yield "command", Code(public(start["command"]))
    if (seed := told.get("config", {}).get("run.seed")) is not None:
        yield "seed", str(seed)
    for name, value in start.items():
        if name.startswith("commit") and value:
            yield name, str(value)
    for title in ("Decided at the start", "Versions", "Environment variables"):
        if values := environment.get(title):
            yield title.lower(), ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
    if hardware := environment.get("Hardware"):
        yield "hardware", redact(json.dumps(hardware, ensure_ascii=False))


def _made_into(source: Source) -> Iterator[tuple[str, str]]:
    """Yield what `export` or `merge` did, and how far its result differs from the model that was trained."""
    made = json_object(source.folder / EXPORT_FILE, problems=[])
    if "max_logit_difference" in made:
        yield (
            str(made.get("kind")),
            f"{made.get('dtype')}; logits differ by at most {made['max_logit_difference']:.1e} of the largest, by "
            f"{made.get('mean_kl_nats', 0.0):.1e} nats a token in KL divergence, from what was trained",
        )


def _config_text(source: Source) -> str | None:
    file = source.folder.parent / "config.yaml"
    if not file.is_file() or source.run is None:
        return None
    values = parse_file(file.read_text(encoding="utf-8"), label=str(file), is_json=False).values
    return redact_config(yaml_text(public(values)))
