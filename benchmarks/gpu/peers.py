"""The same trainings by others, as far as they are installed here, at their best settings.

Trainer    transformers' Trainer: bfloat16, compiled, fused AdamW, Liger's kernels where they are installed
peft       a bare loop around peft's LoRA, compiled, with fused AdamW
TRL        SFTTrainer with packing
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import contestants
from benchmarks import tuning as tuning_benchmark
from benchmarks.gpu.llama import new_llama
from benchmarks.gpu.setting import Setting, is_installed, need
from benchmarks.gpu.speeds import CASES, Case, shape_of
from benchmarks.gpu.steps import StepClock
from benchmarks.gpu.tuning import RANK, base_folder, base_shape, case_name, sizes, tuning_clock

TRAINER_CASES = tuple(case for case in CASES if case.optimizer == "adamw" and not case.documents)


def measure(setting: Setting) -> None:
    """Measure each peer, and how many times as fast ours was in the sections before."""
    _trainers(setting, TRAINER_CASES[:1])
    for recomputes in (False, True):
        ours = case_name(recomputes=recomputes)
        name = "peft" + (", recomputing" if recomputes else "")
        _row(setting, name, partial(_peft, setting, recomputes=recomputes), ours=("tuning", ours))
    _trainers(setting, setting.sized(TRAINER_CASES[1:3], smoke=()))
    _row(setting, "TRL, packed", partial(_trl, setting), ours=("tuning", case_name(recomputes=False)))


def _trainers(setting: Setting, some: tuple[Case, ...]) -> None:
    for case in some:
        _row(setting, "Trainer", partial(_trainer, setting, case), ours=("speeds", case.name))


def _row(setting: Setting, name: str, run: Callable[[], dict[str, Any]], *, ours: tuple[str, str]) -> None:
    """Add a peer's row; `ours` is the section and the case that it is beside."""
    section, case = ours
    with setting.recorder.trying(peer=name, case=case):
        found, speed = run(), setting.recorder.speed(section, case)
        ratio = None if speed is None else speed / found["tokens_per_sec"]
        setting.recorder.row(peer=name, case=case, ours_over_it=ratio, **found)


def _trainer(setting: Setting, case: Case) -> dict[str, Any]:
    """Measure transformers' Trainer."""
    need("accelerate")
    _, _, batch, length = shape_of(setting, case)
    best: dict[str, Any] = {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused", "tf32": True}
    if is_installed("liger-kernel"):
        best["use_liger_kernel"] = True
    settings = {"use_cpu": True} if setting.smoke else {"use_cpu": False, **best}
    clock = StepClock(setting, warm_up=setting.sized(6, smoke=1), steps=setting.sized(12, smoke=2), ends_run=False)
    task = contestants.Task(llama_of(setting, case), batch=batch, length=length)
    with clock:
        contestants.trainer(clock.num_steps, task, **settings)
    return clock.result(tokens_per_step=batch * length)


def llama_of(setting: Setting, case: Case) -> dict[str, Any]:
    """Return the model of a case as arguments of a LlamaConfig."""
    shape, vocab_size, _, length = shape_of(setting, case)
    return {
        "vocab_size": vocab_size,
        "hidden_size": shape["d_model"],
        "intermediate_size": shape["d_ff"],
        "num_hidden_layers": shape["num_layers"],
        "num_attention_heads": shape["num_heads"],
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
    }


def _peft(setting: Setting, *, recomputes: bool) -> dict[str, Any]:
    """Measure a bare loop around a model of transformers with adapters of peft, on rows without documents."""
    need("peft")
    from peft import LoraConfig, get_peft_model

    batch, length = sizes(setting)
    clock = tuning_clock(setting)
    with clock:
        dtype = setting.sized(torch.bfloat16, smoke=torch.float32)
        model = new_llama(base_shape(setting), device=setting.device, dtype=dtype)
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")).train()
        for layer in model.model.layers:
            layer.compile()
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        for _ in itertools.count():  # the clock ends it
            ids = torch.randint(1, base_shape(setting)["vocab_size"], (batch, length), device=setting.device)
            tuned(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return clock.result(tokens_per_step=batch * length)


def _trl(setting: Setting) -> dict[str, Any]:
    """Measure TRL's SFTTrainer on packed rows."""
    need("trl", "datasets")
    batch, length = sizes(setting)
    folder = base_folder(setting).parent
    words = [f"w{number}" for number in range(1, length // 4)]
    rows = [{"prompt": " ".join(words[: 2 + row % 50]), "completion": " " + " ".join(words)} for row in range(2000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clock = tuning_clock(setting)
    settings = {
        "per_device_train_batch_size": batch,
        "max_length": length,
        "packing": True,
        "gradient_checkpointing": False,
        "model_init_kwargs": {"dtype": setting.sized("bfloat16", smoke="float32")},
        "use_cpu": setting.smoke,
        "bf16": not setting.smoke,
    }
    with clock:
        tuning_benchmark.trl(folder, clock.num_steps, **settings)
    return clock.result(tokens_per_step=batch * length)
