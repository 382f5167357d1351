"""`plan`: what a run would be, without running it. Needs no GPU, and no data where the sizes are known otherwise.

    config ─▶ device and vocabulary ─▶ parameters, FLOPs ─▶ steps, tokens ─▶ memory of a step ─▶ time

What had to be assumed is said. The model is built on the meta device, which has no storage.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.chat import ChatConfig
from llmtrain.config.data import SyntheticConfig, TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import Config
from llmtrain.data.prepare.reuse import named_sources
from llmtrain.data.prepare.vocabulary import DEFAULT_VOCAB_SIZE
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.data.tokens import TokenData, open_training_data
from llmtrain.distributed.engine import computes_bf16, missing_for_compile
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.tracking.summary import ParameterCount
from llmtrain.tracking.system import flops_at, peak_memory_bytes, peak_of
from llmtrain.training.memory import CUDA_CONTEXT_BYTES, overhead, parameters_by_part, step_memory
from llmtrain.training.plan import Schedule, make_schedule
from llmtrain.training.state import RunState

ASSUMED_VOCAB_SIZE = 50_257
ENDLESS = 2**62

MFU_OF_GPU = 0.40
MFU_OF_GPU_EAGER = 0.25
SHARE_OF_CPU = 0.75
SHARE_OF_CPU_EAGER = 0.45
"""The share of the peak (a CPU: of the measured matrix products) that a step is assumed to reach."""
GEMM_SEC = 1.0
GEMM_SIZE = 1024

_GB = 1e9
GPUS = {
    "b200": ("B200", 192),
    "h200": ("H200", 141),
    "h100": ("H100 80GB HBM3", 80),
    "h100-pcie": ("H100 PCIe", 80),
    "a100": ("A100-SXM4-80GB", 80),
    "a100-40gb": ("A100-SXM4-40GB", 40),
    "a40": ("A40", 48),
    "a30": ("A30", 24),
    "a10": ("A10", 24),
    "a10g": ("A10G", 24),
    "l40s": ("L40S", 48),
    "l4": ("L4", 24),
    "rtx5090": ("RTX 5090", 32),
    "rtx4090": ("RTX 4090", 24),
    "rtx3090": ("RTX 3090", 24),
    "v100": ("V100-SXM2-32GB", 32),
    "t4": ("T4", 16),
    "mi300x": ("MI300X", 192),
}
"""Names for --device: the name in the table of peaks (tracking/system.py), and GB of memory."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that the run is planned for, with every `auto` decided for it."""

    name: str
    on_gpu: bool
    precision: str
    compiled: bool
    memory_bytes: int
    flops: float | None
    """Per second: a GPU's peak, or what this CPU's matrix products were measured to reach."""


def plan(config: Config, *, device: str | None = None, num_ranks: int | None = None) -> dict[str, Any]:
    """What `config` would train, as plain values. Raises ConfigError for a device that is not known.

    `device`: a name of GPUS, cpu, or this (the machine's own, as `train` would take it). `num_ranks`: processes, one a
    device; those of torchrun's environment when not given.
    """
    process_bytes = peak_memory_bytes()
    world_size = num_ranks or int(os.environ.get("WORLD_SIZE", "1"))
    assumed: list[str] = []
    target = _target(config, device or "this", assumed)
    model, data = config.decoder(wanted_by="plan"), _data(config, assumed)
    vocab_size = _vocab_size(config, data, assumed)
    with torch.device("meta"):
        decoder = Decoder(model, vocab_size)
    schedule = _schedule(config, data, world_size=world_size, assumed=assumed)

    seq_len, micro = config.data.seq_len, config.trainer.micro_batch_size
    num_micro_batches = schedule.batch_size // (micro * world_size)
    memory_of = partial(
        step_memory,
        model,
        vocab_size=vocab_size,
        optimizer=config.optimizer,
        micro_batch_size=micro,
        seq_len=seq_len,
        num_micro_batches=num_micro_batches,
        documents=not isinstance(config.data, SyntheticConfig) and config.data.mask_documents,
        precision=target.precision,
        compiled=target.compiled,
        on_gpu=target.on_gpu,
    )
    checkpointing = config.trainer.activation_checkpointing
    step = memory_of(activation_checkpointing=checkpointing)
    on_top = overhead(
        step,
        on_gpu=target.on_gpu,
        compiled=target.compiled,
        process_bytes=process_bytes,
        saves_on_the_way=_saves_on_the_way(schedule),
        kept_otherwise=memory_of(activation_checkpointing=False).transient if checkpointing else None,
        num_blocks=model.num_layers,
    )
    peak_bytes = step.total + sum(on_top.values())
    count, flops_per_token = ParameterCount.of(decoder), decoder.flops_per_token(seq_len)
    steps = None if schedule.total_steps > ENDLESS // schedule.batch_size // 2 else schedule.total_steps
    tokens = None if steps is None else schedule.end_item * seq_len
    epochs = None if data is None or steps is None else schedule.end_item / data.items_per_epoch
    return {
        "model": {"name": config.model.name, "vocab_size": vocab_size},
        "parameters": {
            **parameters_by_part(decoder),
            "total": count.total,
            "trainable": count.trainable,
            "non_embedding": decoder.num_parameters(non_embedding=True),
        },
        "flops_per_token": flops_per_token,
        "flops": None if tokens is None else flops_per_token * tokens,
        "run": {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_step": schedule.batch_size * seq_len,
            "items_per_epoch": None if data is None else data.items_per_epoch,
            "epochs": epochs,
        },
        "layout": {
            "ranks": world_size,
            "strategy": _strategy(config, world_size),
            "micro_batch_size": micro,
            "grad_accum_steps": num_micro_batches,
            "batch_size": schedule.batch_size,
            "seq_len": seq_len,
            "precision": target.precision,
            "compile": target.compiled,
            "activation_checkpointing": checkpointing,
        },
        "memory": {
            "peak_bytes": peak_bytes,
            "parts": {**step.parts, **on_top},
            "device_bytes": target.memory_bytes,
            "fits": peak_bytes + (CUDA_CONTEXT_BYTES if target.on_gpu else 0) < target.memory_bytes,
        },
        "time": _time(target, flops_per_token=flops_per_token, tokens=tokens, world_size=world_size),
        "assumed": assumed,
    }


# -- the device --------------------------------------------------------------------------------------------------------


def _target(config: Config, device: str, assumed: list[str]) -> Target:
    wanted = device.lower().removeprefix("nvidia ").replace(" ", "")
    if wanted in ("this", "cpu"):
        has_gpu = torch.cuda.is_available() and config.run.device != "cpu"
        if wanted == "this" and config.run.device.startswith("cuda") and not has_gpu:
            raise ConfigError(
                f"run.device is {config.run.device}, and there is no such device here: name the one to plan for, such "
                f"as --device h100 ({', '.join(GPUS)})"
            )
        return _gpu_here(config, assumed) if has_gpu and wanted == "this" else _cpu_here(config, assumed)
    if wanted not in GPUS:
        raise ConfigError(f"--device {device}: not known; it is this, cpu or one of {', '.join(GPUS)}")
    name, gigabytes = GPUS[wanted]
    return _gpu(config, name, memory_bytes=round(gigabytes * _GB), assumed=assumed)


def _gpu_here(config: Config, assumed: list[str]) -> Target:
    index = int(config.run.device.partition(":")[2] or 0)
    properties = torch.cuda.get_device_properties(index)
    return _gpu(config, properties.name, memory_bytes=properties.total_memory, assumed=assumed)


def _gpu(config: Config, name: str, *, memory_bytes: int, assumed: list[str]) -> Target:
    peak = peak_of(name)
    precision: str = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if peak is None or peak.bf16 else "32"
    flops = None if peak is None else flops_at(peak, precision)
    compiled = config.trainer.compile is not False
    share = MFU_OF_GPU if compiled else MFU_OF_GPU_EAGER
    if flops is None:
        assumed.append(f"no time: the peak of {name} in {precision} is not known")
    else:
        assumed.append(
            f"time: {share:.0%} of the {flops / 1e12:.0f} TFLOP/s that {name} has at best in {precision}; "
            "a small model or batch reaches less"
        )
    return Target(
        name=name, on_gpu=True, precision=precision, compiled=compiled, memory_bytes=memory_bytes, flops=flops
    )


def _cpu_here(config: Config, assumed: list[str]) -> Target:
    precision: str = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if computes_bf16("cpu") else "32"
    compiled = config.trainer.compile is not False and missing_for_compile() is None
    flops = _measure_gemm(torch.float32 if precision == "32" else torch.bfloat16)
    share = SHARE_OF_CPU if compiled else SHARE_OF_CPU_EAGER
    assumed.append(
        f"time: {share:.0%} of the {flops / 1e12:.2g} TFLOP/s that matrix products in {precision} reached here just "
        f"now ({torch.get_num_threads()} threads)"
    )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Target(
        name="cpu", on_gpu=False, precision=precision, compiled=compiled, memory_bytes=memory_bytes, flops=flops
    )


def _measure_gemm(dtype: torch.dtype) -> float:
    """FLOP/s of square products on this CPU, the best of about a second."""
    matrix = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=dtype)
    torch.mm(matrix, matrix)
    best, end = float("inf"), time.perf_counter() + GEMM_SEC
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - began)
    return 2 * GEMM_SIZE**3 / best


def _time(target: Target, *, flops_per_token: int, tokens: int | None, world_size: int) -> dict[str, Any]:
    if target.on_gpu:
        share = MFU_OF_GPU if target.compiled else MFU_OF_GPU_EAGER
    else:
        share = SHARE_OF_CPU if target.compiled else SHARE_OF_CPU_EAGER
    speed = None if target.flops is None else target.flops * share * world_size / flops_per_token
    return {
        "device": target.name,
        "flops_per_sec": target.flops,
        "assumed_utilisation": share,
        "tokens_per_sec": speed,
        "seconds": None if speed is None or tokens is None else tokens / speed,
    }


# -- the data ----------------------------------------------------------------------------------------------------------


def _data(config: Config, assumed: list[str]) -> TokenData | None:
    """The training data where it can be read at once; None where it is still to be made."""
    data = config.data
    if isinstance(data, TokensConfig):
        missing = [source for source in named_sources(data) if source.is_missing()]
        if missing:
            assumed.append(f"{missing[0]}: no token shards yet, so the number of epochs is not known")
            return None
    elif not isinstance(data, SyntheticConfig):
        assumed.append(f"data.name is {data.name}: `train` makes its shards, so the number of epochs is not known yet")
        return None
    return open_training_data(data, seed=config.run.seed)


def _vocab_size(config: Config, data: TokenData | None, assumed: list[str]) -> int:
    wanted = config.decoder(wanted_by="plan").vocab_size
    if wanted is not None:
        return wanted
    if data is not None:
        return data.facts.vocab_size
    if isinstance(config.data, TokensConfig):
        tokenizer = config.prepare.tokenizer if config.prepare else None
    else:
        tokenizer = None if isinstance(config.data, SyntheticConfig | ChatConfig) else config.data.tokenizer
    if tokenizer is not None and tokenizer.kind == "bpe":
        size = tokenizer.vocab_size or DEFAULT_VOCAB_SIZE
        assumed.append(f"a vocabulary of {size:,}: as many as the tokenizer is asked to have")
        return size
    if tokenizer is not None and tokenizer.path is not None and Path(tokenizer.path).expanduser().is_dir():
        return load_tokenizer(Path(tokenizer.path).expanduser()).vocab_size
    assumed.append(
        f"a vocabulary of {ASSUMED_VOCAB_SIZE:,}, since the tokenizer is not here: model.vocab_size=N says it"
    )
    return ASSUMED_VOCAB_SIZE


def _schedule(config: Config, data: TokenData | None, *, world_size: int, assumed: list[str]) -> Schedule:
    if data is None and config.trainer.max_epochs is not None:
        assumed.append("steps and tokens are not known: trainer.max_epochs needs the shards")
    return make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        items_per_epoch=data.items_per_epoch if data else ENDLESS,
        state=RunState(),
        world_size=world_size,
    )


def _saves_on_the_way(schedule: Schedule) -> bool:
    save = schedule.save
    by_steps = save.every_steps is not None and save.every_steps < schedule.total_steps
    by_epochs = save.every_epochs is not None and save.every_epochs * schedule.items_per_epoch < schedule.end_item
    return by_steps or by_epochs or save.every_seconds is not None


def _strategy(config: Config, world_size: int) -> str:
    wanted = config.distributed.strategy
    if wanted == "auto":
        return "ddp" if world_size > 1 else "single"
    if wanted == "single" and world_size > 1:
        raise ConfigError(
            f"distributed.strategy is single, but the plan is for {world_size} processes: set it to ddp or auto"
        )
    return wanted
