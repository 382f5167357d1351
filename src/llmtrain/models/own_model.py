"""Wraps a model of the user's own, named by import path, with defaults for the optional members of `contracts.Model`.

    config.model (name, options) ─ import_callable ─▶ the user's module ─▶ OwnModel ─▶ loop, evaluation, generation

Only the config of a run names the class that is imported; a model folder alone never makes us import code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtrain.config.sections.own import OwnModelConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.sharding import layers_of, take_part
from llmtrain.errors import ConfigError
from llmtrain.import_path import import_callable, what_failed
from llmtrain.models.companions import copy_tokenizer
from llmtrain.models.fetch import WEIGHTS_FILE
from llmtrain.models.folder import common_dtype, misfits

KEY = "model.name"
OWN_CLASS_TYPE = "llmtrain-own-class"
"""`model_type` in the config.json of such a model."""
REQUIRED = ("forward", "logits")


class OwnModel(nn.Module):
    """The user's module, with a default for each optional member of `contracts.Model`."""

    def __init__(self, config: OwnModelConfig, network: nn.Module, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.network: Any = network
        self.vocab_size = vocab_size
        self.saved_names = frozenset(self.saved_tensors())
        """Names of the weights in a model folder: without those of adapters, which are merged into them there."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the supervised tokens' losses, and their number."""
        found = self.network(batch)
        if not (isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
            raise ConfigError(
                f"{KEY}: forward of {self.config.name} should return two tensors, the sum of the losses and the number "
                f"of supervised tokens, but it returned {type(found).__name__}"
            )
        return found

    def logits(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: Any = None, *, last_only: bool = False
    ) -> Tensor:
        """Return [b, t, vocab] scores of the token after each of `input_ids`; [b, 1, vocab] with `last_only`."""
        if isinstance(cache, TokenCache):
            scores = cache.scores_of_new(self.network.logits(cache.append(input_ids)), input_ids.shape[1])
        elif cache is None:
            scores = self.network.logits(input_ids, document_ids)
        else:
            scores = self.network.logits(input_ids, document_ids, cache, last_only=last_only)
        return scores[:, -1:] if last_only else scores

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> Any:
        """Return the user's cache, or a TokenCache if the module has none."""
        if hasattr(self.network, "new_cache"):
            return self.network.new_cache(batch_size, max_len, first_slots=first_slots)
        padding = torch.zeros(batch_size, dtype=torch.int64) if first_slots is None else first_slots.cpu()
        return TokenCache(padding.tolist())

    @property
    def max_seq_len(self) -> int | None:
        """Longest sequence, in tokens; None: there is no limit."""
        longest: int | None = getattr(self.network, "max_seq_len", None)
        return longest

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    def num_parameters(self, *, non_embedding: bool = False) -> int:
        """Count all parameters, tied ones once; with `non_embedding`, leave out tables that are only looked up."""
        lookup = self._lookup_tables() if non_embedding else set()
        return sum(parameter.numel() for parameter in self.parameters() if id(parameter) not in lookup)

    def flops_per_token(self, seq_len: int) -> int:
        """Count forward and backward by the user's method, else 6 for each multiplied weight, or 4 if it is frozen."""
        if hasattr(self.network, "flops_per_token"):
            return int(self.network.flops_per_token(seq_len))
        lookup = self._lookup_tables()
        return sum((6 if p.requires_grad else 4) * p.numel() for p in self.parameters() if id(p) not in lookup)

    def _lookup_tables(self) -> set[int]:
        """Return the ids of embedding tables that no other module shares."""
        tables = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)}
        others = [module for module in self.modules() if not isinstance(module, nn.Embedding)]
        return tables - {id(parameter) for module in others for parameter in module.parameters(recurse=False)}

    def layers(self) -> list[nn.Module]:
        """Return the layers that are sharded one at a time."""
        return list(layers_of(self.network))

    @property
    def checkpointable(self) -> Sequence[int]:
        """Numbers of layers that `checkpoint_blocks` takes: the user's method has one switch for all."""
        return (0, self.num_blocks) if hasattr(self.network, "checkpoint_blocks") else (0,)

    @property
    def num_blocks(self) -> int:
        """Number of layers; 1 if the user's module does not name any."""
        return max(1, len(self.layers()))

    def checkpoint_blocks(self, count: int | None = None) -> None:
        """Keep less for the backward pass, in all layers. Raises ConfigError if the user's module cannot do so."""
        if not hasattr(self.network, "checkpoint_blocks"):
            raise ConfigError(
                f"trainer.activation_checkpointing: {self.config.name} has no method checkpoint_blocks(): add it, or "
                "set the key to none"
            )
        if count not in (None, self.num_blocks):
            raise ConfigError(
                f"trainer.activation_checkpointing: {self.config.name} recomputes all of its layers or none: set it to "
                "full or none"
            )
        self.network.checkpoint_blocks()

    def compile_parts(self, **options: Any) -> None:
        """Compile the parts that the user's module chooses, or else the full module."""
        getattr(self.network, "compile_parts", self.network.compile)(**options)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the user's module themselves, by name; tied ones only under their first name."""
        named: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.network.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise ConfigError(
                    f"{KEY}: {name} in the state dict of {self.config.name} is not a tensor, so it cannot be saved: "
                    "remove it from the state dict"
                )
            named.setdefault(id(tensor), (name, tensor.detach()))
        return dict(named.values())


class TokenCache:
    """Keeps the tokens of each row, for a model without a cache, which reads all tokens again for each new one.

    Rows begin at position 0, and padding comes after them, where no token attends to it. So a row's scores do not
    depend on the other rows.
    """

    def __init__(self, padding: Sequence[int]) -> None:
        self._padding = list(padding)
        self._rows: list[list[int]] = [[] for _ in padding]

    def append(self, input_ids: Tensor) -> Tensor:
        """Add tokens [b, t], and return all tokens [b, longest]. Padding on the left of the first ones is removed."""
        for row, ids in zip(self._rows, input_ids.tolist(), strict=True):
            row += ids
        self._rows = [row[padding:] for row, padding in zip(self._rows, self._padding, strict=True)]
        self._padding = [0] * len(self._rows)
        longest = max(map(len, self._rows))
        return torch.tensor([row + [0] * (longest - len(row)) for row in self._rows], device=input_ids.device)

    def scores_of_new(self, scores: Tensor, num_tokens: int) -> Tensor:
        """Return the scores [b, num_tokens, vocab] of each row's last tokens. Scores of padding have no meaning."""
        ends = torch.tensor([[len(row)] for row in self._rows], device=scores.device)
        places = (ends - num_tokens + torch.arange(num_tokens, device=scores.device)).clamp(min=0)
        return scores.gather(1, places[..., None].expand(-1, -1, scores.shape[-1]))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows and drop all others."""
        self._rows, self._padding = [self._rows[row] for row in rows], [self._padding[row] for row in rows]


def check_same_class(folder: Path, config: OwnModelConfig) -> None:
    """Raise ConfigError if the model in a folder is not of the class and options of `config`."""
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = described.get("class"), described.get("options")
    if found != (config.name, config.options):
        raise ConfigError(
            f"model.init_from: the model in {folder} is {found[0] or described.get('model_type')} with options "
            f"{found[1] or {}}, but this config's is {config.name} with {config.options}: give the same"
        )


def build_own_model(config: OwnModelConfig, vocab_size: int) -> OwnModel:
    """Build the model that `config` names. Raises ConfigError if its class cannot be imported, or is no such model."""
    make: Any = import_callable(config.name, key=KEY)
    if not (isinstance(make, type) and issubclass(make, nn.Module)):  # before it is called
        raise ConfigError(f"{KEY}: {config.name} is not a subclass of torch.nn.Module: name one")
    for name in REQUIRED:
        if getattr(make, name, None) in (None, nn.Module.forward):
            raise ConfigError(
                f"{KEY}: {config.name} has no method {name}: add it; llmtrain.contracts.Model lists all that are needed"
            )
    try:
        network = make(vocab_size=vocab_size, **config.options)
    except Exception as error:
        given = ", ".join(
            [f"vocab_size={vocab_size}", *(f"{name}={value!r}" for name, value in config.options.items())]
        )
        raise ConfigError(f"{KEY}: {config.name}({given}) failed ({what_failed(error)})") from error
    if not any(True for _ in network.parameters()):
        raise ConfigError(f"{KEY}: {config.name} has no parameters, so there is nothing to train")
    return OwnModel(config, network, vocab_size)


# -- the folder --------------------------------------------------------------------------------------------------------


def write_own_folder(
    folder: Path, *, model: OwnModel, state_dict: Mapping[str, Tensor], tokenizer_folder: Path | None
) -> None:
    """Write the weights, a config.json that names their class and options, and the tokenizer if there is one."""
    kept = model.saved_names
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items() if name in kept}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    description = {
        "model_type": OWN_CLASS_TYPE,
        "dtype": str(common_dtype(tensors)).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "class": model.config.name,
        "options": model.config.options,
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if tokenizer_folder is not None:
        copy_tokenizer(tokenizer_folder, folder)


@torch.no_grad()
def load_own_weights(folder: Path, model: OwnModel) -> None:
    """Load the weights in a folder. Raises ConfigError if they do not fit this model exactly."""
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ConfigError(f"{folder}: no {WEIGHTS_FILE} here")
    tensors, expected = load_file(file), model.saved_tensors()
    if faults := misfits(tensors, expected):
        raise ConfigError(f"{file} does not fit {model.config.name}, which was changed since: {'; '.join(faults)}")
    for name, tensor in expected.items():
        take_part(tensor, tensors[name])


def read_own_model(folder: Path, config: OwnModelConfig) -> OwnModel:
    """Return the model in a folder, of the class in its run's `config`, in the dtype that is stored."""
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build_own_model(config, int(described["vocab_size"]))
    model.to(getattr(torch, described["dtype"]))
    load_own_weights(folder, model)
    return model
