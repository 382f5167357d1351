"""Runs of small models through llmtrain's own verbs, and their comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.motifs import Motifs
from benchmarks.gpu.setting import Setting
from llmtrain.config.loading.load import load_config
from llmtrain.contracts import Batch
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train

Config = dict[str, Any]
VOCAB_SIZE = 64
LENGTHS = (192, 256)
"""Tokens of a row. cuDNN's masked attention is wrong where 64 are left over from a multiple of 128."""
STEPS = 20
LORA: dict[str, Any] = {"r": 8, "alpha": 16}


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """A run that has ended."""

    folder: Path
    losses: Mapping[int, float]
    """Losses by step."""
    summary: Mapping[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The last one."""
        return max((self.folder / "checkpoints").glob("step_*"))

    @property
    def model(self) -> Path:
        """Its model, or adapter, as a user names it."""
        return self.folder


def small_config(setting: Setting, **sections: Mapping[str, Any]) -> Config:
    """Return the config of a small decoder on packed documents; keys of `sections` win.

    Its length is 64 above a multiple of 128, and its weights are large, so that attention is far from uniform.
    """
    width, length = setting.sized((256, LENGTHS[0]), smoke=(32, 32))
    config: dict[str, dict[str, Any]] = {
        "run": {"device": setting.device.type},
        "model": {
            "max_seq_len": setting.sized(max(LENGTHS), smoke=length),
            "d_model": width,
            "num_layers": setting.sized(4, smoke=1),
            "init_std": 0.05,
            "attention": {"variant": "gqa", "num_heads": 4, "num_kv_heads": 2},
        },
        "data": {
            "name": "benchmarks.gpu.motifs:Motifs",
            "seq_len": length,
            "options": {"vocab_size": VOCAB_SIZE},
        },
        "trainer": {
            "max_steps": STEPS,
            "micro_batch_size": 8,
            "precision": "32",
            "compile": False,
            "log_every_steps": 1,
            "eval_every_steps": None,
            "eval_steps": None,
            "save_every_steps": None,
        },
        "optimizer": {"lr": setting.sized(1e-3, smoke=3e-3)},
        "scheduler": {"name": "constant", "warmup_steps": 0},  # so that half a run has the schedule of a whole one
        "tracking": {"tensorboard": {"enabled": False}, "system_interval_sec": 0},
        "logging": {"level": "ERROR"},
    }
    return {name: {**config.get(name, {}), **sections.get(name, {})} for name in {**config, **sections}}


def adapted(config: Config, setting: Setting, *, base: SmallRun, **lora: Any) -> Config:
    """Return the config of adapters on the decoder that `base` has trained, on data that are new to it."""
    options = {**config["data"]["options"], "smallest_step": 5}
    return {
        **config,
        "model": {**config["model"], "init_from": str(base.folder), "lora": {**LORA, **lora}},
        "data": {**config["data"], "options": options},
        "optimizer": {"lr": adapter_lr(setting)},
    }


def adapter_lr(setting: Setting) -> float:
    """Return a learning rate with which adapters on small models learn something in a few steps."""
    return setting.sized(1e-2, smoke=3e-2)


def run_small(setting: Setting, name: str, config: Config) -> SmallRun:
    """Train `config` in the work folder, in this process."""
    file = write_config(setting.work, name, config)
    return small_run(train(load_config(str(file), say=False)))


def write_config(work: Path, name: str, config: Config) -> Path:
    """Write a config whose run is called `name`, in the work folder; return its file."""
    file = work / f"{name}.json"
    file.write_text(json.dumps({**config, "output": {"root_dir": str(work / "runs"), "run_id": name}}))
    return file


def small_run(summary: Mapping[str, Any]) -> SmallRun:
    """Return what a run with this summary has left on the disk."""
    folder = Path(summary["run"])
    lines = read_metrics(folder / "metrics.jsonl")
    losses = {int(line["step"]): float(line["train/loss"]) for line in lines if "train/loss" in line}
    return SmallRun(folder=folder, losses=losses, summary=summary)


def resumed(setting: Setting, name: str, config: Config) -> tuple[SmallRun, SmallRun]:
    """Return a run that saves in its middle and is never stopped, and one that ends there and is resumed."""
    steps = int(config["trainer"]["max_steps"])
    halves = {**config, "trainer": {**config["trainer"], "save_every_steps": steps // 2}}
    whole = run_small(setting, f"{name}-whole", halves)
    first = {**halves, "trainer": {**halves["trainer"], "max_steps": steps // 2}}
    half = run_small(setting, f"{name}-half", first)
    summary = train(None, resume=str(half.folder), overrides=[f"trainer.max_steps={steps}"])
    if summary["resumed_from_step"] != steps // 2:
        raise AssertionError(f"resumed from step {summary['resumed_from_step']}, not from {steps // 2}")
    return whole, small_run(summary)


def difference(one: SmallRun, other: SmallRun) -> float:
    """Return the largest relative difference of the losses of two runs, which have learned something.

    Raises AssertionError for runs that say nothing: of other steps, or whose loss has not fallen.
    """
    if one.losses.keys() != other.losses.keys() or not one.losses:
        raise AssertionError(f"the steps of the runs are {sorted(one.losses)} and {sorted(other.losses)}")
    first, last = one.losses[min(one.losses)], one.losses[max(one.losses)]
    if not last < 0.95 * first:
        raise AssertionError(f"the loss went from {first:.4f} to {last:.4f}: runs that learn nothing cannot differ")
    return largest(abs(one.losses[step] - other.losses[step]) / one.losses[step] for step in one.losses)


def largest(values: Any) -> float:
    """Return the largest of some values; NaN if one is NaN, which `max` would lose."""
    found = [float(value) for value in values]
    return next((value for value in found if value != value), max(found, default=0.0))


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the norm of a difference over the norm of `one`, in float64 on the CPU."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / one.norm())


def packed_batch(sequences: Sequence[torch.Tensor]) -> Batch:
    """Return one row of these sequences, each of which is a document of one token less."""
    numbers = [torch.full((len(tokens) - 1,), index, dtype=torch.int32) for index, tokens in enumerate(sequences)]
    document_ids = torch.cat(numbers)[None]
    return Batch(
        input_ids=torch.cat([tokens[:-1] for tokens in sequences])[None],
        labels=torch.cat([tokens[1:] for tokens in sequences])[None],
        document_ids=document_ids,
        cu_seqlens=torch.from_numpy(cu_seqlens(document_ids.numpy())),
    )


def validation_loss(model: nn.Module, config: Config, device: torch.device) -> float:
    """Return the loss of a model on the validation data of `config`, one sequence at a time."""
    data = Motifs("val", config["data"]["seq_len"], **config["data"]["options"])
    loss_sum, num_tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(data)):
            tokens = torch.from_numpy(data[index])
            batch = {"input_ids": tokens[None, :-1].to(device), "labels": tokens[None, 1:].to(device)}
            batch_loss, batch_tokens = model(batch)
            loss_sum, num_tokens = loss_sum + float(batch_loss), num_tokens + int(batch_tokens)
    return loss_sum / num_tokens
