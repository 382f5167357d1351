"""Checks that a GPU computes what a CPU does, and that nothing is lost in saving, resuming, packing and compiling.

Relative differences: float32 up to 1e-4, bfloat16 up to 2e-2, 0 where the result has to be the same in every bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.gpu.llama import SMALL, TINY, new_llama, write_llama
from benchmarks.gpu.motifs import Motifs
from benchmarks.gpu.setting import Setting, need
from benchmarks.gpu.small_runs import (
    LENGTHS,
    LORA,
    VOCAB_SIZE,
    Config,
    SmallRun,
    adapted,
    adapter_lr,
    difference,
    largest,
    packed_batch,
    relative,
    resumed,
    run_small,
    small_config,
    validation_loss,
)
from llmtrain.generation.decoding import CachedModel, generate
from llmtrain.generation.open_model import device_named, load_language_model, locate_model
from llmtrain.generation.sampling import Decoding, Sampling, choose_tokens
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.huggingface.quantization import Quantized

FLOAT32 = 1e-4
BFLOAT16 = 2e-2
EXACT = 0.0
KERNELS: dict[str, dict[str, Any]] = {
    "sliding window": {"attention": {"mask": "sliding_window", "window": 16}},
    "ALiBi": {"positional": {"encoding": "alibi"}},
}
"""Models whose attention has other kernels."""


def measure(setting: Setting) -> None:
    """Make every check."""
    checks = Checks(setting)
    made = setting.recorder.checked
    # Before anything else uses the GPU, since its libraries choose then how they compute.
    made("resumed = uninterrupted, deterministic", lambda: checks.resumed_exactly(), limit=EXACT)
    made("GPU = CPU, 20 steps, float32", lambda: difference(checks.cpu, checks.gpu), limit=FLOAT32)
    made("GPU in bfloat16 = CPU in float32, 20 steps", lambda: difference(checks.cpu, checks.gpu_bf16), limit=BFLOAT16)
    made("packed = alone, decoder, float32", lambda: checks.packed("decoder", torch.float32), limit=FLOAT32)
    made("packed = alone, decoder, bfloat16", lambda: checks.packed("decoder", torch.bfloat16), limit=BFLOAT16)
    for name, changes in KERNELS.items():
        made(f"packed = alone, {name}", partial(checks.packed, "decoder", torch.bfloat16, changes), limit=BFLOAT16)
    made("packed = alone, transformers, float32", lambda: checks.packed("llama", torch.float32), limit=FLOAT32)
    made("packed = alone, transformers, bfloat16", lambda: checks.packed("llama", torch.bfloat16), limit=BFLOAT16)
    made("cached = full decoding, decoder, float32", lambda: checks.cached(checks.gpu), limit=FLOAT32)
    made("cached = full decoding, transformers, float32", lambda: checks.cached(checks.lora[1]), limit=FLOAT32)
    made("generated = likeliest, decoder", lambda: checks.generated(checks.gpu), limit=BFLOAT16)
    made("generated = likeliest, transformers", lambda: checks.generated(checks.lora[1]), limit=BFLOAT16)
    made("tokens drawn on a GPU = on a CPU", lambda: checks.drawn(), limit=EXACT)
    made("a GPU's checkpoint on a CPU", lambda: checks.reloaded(checks.gpu, checks.config, on="cpu"), limit=FLOAT32)
    made("LoRA of a decoder, saved in training", lambda: checks.decoder_lora(), limit=BFLOAT16)
    made(
        "LoRA of transformers, saved in training", lambda: checks.saved(checks.lora, checks.lora_config), limit=BFLOAT16
    )
    made("LoRA of transformers on a CPU", lambda: checks.lora_on_cpu(), limit=BFLOAT16)
    made("all weights of transformers, saved in training", lambda: checks.all_weights(), limit=BFLOAT16)
    made("QLoRA, saved in training", lambda: checks.qlora(), limit=BFLOAT16)
    made("compiled = eager, float32", lambda: difference(checks.gpu, checks.compiled), limit=FLOAT32)
    made("compiled = eager, bfloat16", lambda: difference(checks.gpu_bf16, checks.compiled_bf16), limit=BFLOAT16)


class Checks:
    """The runs that checks share, each made when the first check asks for it, and the values of the checks."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self.config = small_config(setting)

    def _with(self, **changes: Mapping[str, Any]) -> Config:
        return {name: {**self.config.get(name, {}), **changes.get(name, {})} for name in {**self.config, **changes}}

    @cached_property
    def cpu(self) -> SmallRun:
        return run_small(self._setting, "cpu", self._with(run={"device": "cpu"}))

    @cached_property
    def gpu(self) -> SmallRun:
        return run_small(self._setting, "gpu", self.config)

    @cached_property
    def gpu_bf16(self) -> SmallRun:
        return run_small(self._setting, "gpu-bf16", self._with(trainer={"precision": "bf16-mixed"}))

    @cached_property
    def compiled(self) -> SmallRun:
        return run_small(self._setting, "compiled", self._with(trainer={"compile": True}))

    @cached_property
    def compiled_bf16(self) -> SmallRun:
        trainer = {"compile": True, "precision": "bf16-mixed"}
        return run_small(self._setting, "compiled-bf16", self._with(trainer=trainer))

    @cached_property
    def llama(self) -> Path:
        """Folder of a small model of transformers."""
        shape = self._setting.sized(SMALL, smoke=TINY)
        return write_llama(self._setting.work / "small-llama", shape, self._setting, dtype=torch.float32)

    @property
    def lora_config(self) -> Config:
        """LoRA of the small model of transformers, in the precision of a GPU."""
        model = {"name": "huggingface", "path": str(self.llama), "lora": LORA}
        precision = self._setting.sized("bf16-mixed", smoke="32")
        changed = self._with(
            trainer={"max_steps": 8, "precision": precision}, optimizer={"lr": adapter_lr(self._setting)}
        )
        return {**changed, "model": model}

    @cached_property
    def lora(self) -> tuple[SmallRun, SmallRun]:
        return resumed(self._setting, "lora", self.lora_config)

    def resumed_exactly(self) -> float:
        """Return the largest difference of losses and weights between a run and one that was resumed in its middle."""
        precision = self._setting.sized("bf16-mixed", smoke="32")
        config = self._with(
            run={"deterministic": True}, trainer={"max_steps": 8, "precision": precision, "compile": True}
        )
        whole, halves = resumed(self._setting, "exact", config)
        one, other = (load_file(run.checkpoint / "model" / "model.safetensors") for run in (whole, halves))
        if one.keys() != other.keys():
            raise AssertionError(f"the checkpoints hold {sorted(one)} and {sorted(other)}")
        weights = (float((one[name].double() - other[name].double()).abs().max()) for name in one)
        return largest([difference(whole, halves), *weights])

    def saved(self, runs: tuple[SmallRun, SmallRun], config: Config, *, quantized: Quantized | None = None) -> float:
        """Return how far resumed from uninterrupted, and the model read again from the one that was trained, are."""
        whole, halves = runs
        return largest([difference(whole, halves), self.reloaded(whole, config, quantized=quantized)])

    def reloaded(
        self, run: SmallRun, config: Config, *, on: str | None = None, quantized: Quantized | None = None
    ) -> float:
        """Return how far the validation loss of the saved model is from what the run measured at its end."""
        device = device_named(on or self._setting.device.type)
        opened = load_language_model(locate_model(str(run.folder)), device=device, quantized=quantized)
        measured = float(run.summary["val_loss"])
        return abs(validation_loss(opened.model, config, device) - measured) / measured

    def decoder_lora(self) -> float:
        config = adapted(self._with(trainer={"max_steps": 8}), self._setting, base=self.gpu)
        return self.saved(resumed(self._setting, "decoder-lora", config), config)

    def lora_on_cpu(self) -> float:
        return self.reloaded(self.lora[1], self.lora_config, on="cpu")

    def all_weights(self) -> float:
        config = {
            **self.lora_config,
            "model": {"name": "huggingface", "path": str(self.llama)},
            "optimizer": {"lr": 3e-3},
        }
        return self.saved(resumed(self._setting, "all-weights", config), config)

    def qlora(self) -> float:
        need("bitsandbytes")
        config = self.lora_config
        config["model"] = {**config["model"], "quantization": "nf4"}
        dtype = self._setting.sized(torch.bfloat16, smoke=torch.float32)
        return self.saved(resumed(self._setting, "qlora", config), config, quantized=Quantized("nf4", dtype))

    def packed(self, kind: str, dtype: torch.dtype, changes: Mapping[str, Any] | None = None) -> float:
        """Return how far loss and gradients of two documents in one row are from those of each alone.

        `changes` are keys of the decoder's config.
        """
        lengths = self._setting.sized(LENGTHS, smoke=(32,))
        return largest(self._packed_at(length, kind, dtype, changes or {}) for length in lengths)

    def _packed_at(self, length: int, kind: str, dtype: torch.dtype, changes: Mapping[str, Any]) -> float:
        device = device_named(self._setting.device.type)
        model = self._new_model(kind, changes).to(device).train()
        data = Motifs("train", length, VOCAB_SIZE, documents=False)
        sequences = [torch.from_numpy(data[0])[: length // 2 + 5], torch.from_numpy(data[1])[: length // 2 - 3]]
        assert sum(len(tokens) - 1 for tokens in sequences) == length, "no padding: the row is as long as wanted"
        together = _gradients(model, [sequences], device, dtype)
        alone = _gradients(model, [[tokens] for tokens in sequences], device, dtype)
        return largest(relative(one, other) for one, other in zip(together, alone, strict=True))

    def cached(self, run: SmallRun) -> float:
        """Return how far the scores of tokens given one by one are from those of all at once."""
        device = device_named(self._setting.device.type)
        model: CachedModel = load_language_model(locate_model(str(run.folder)), device=device).model
        length = int(self.config["data"]["seq_len"])
        ids = torch.randint(1, VOCAB_SIZE, (3, length), generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            full = model.logits(ids)
            cache = model.new_cache(3, length)
            steps = [model.logits(ids[:, : length // 2], None, cache)]
            steps += [model.logits(ids[:, slot : slot + 1], None, cache) for slot in range(length // 2, length)]
        return relative(full, torch.cat(steps, dim=1))

    def generated(self, run: SmallRun) -> float:
        """Return how far the scores of generated tokens are from the largest, by a forward pass over full rows.

        Both compute as `generate` and `eval` do: on a GPU in bfloat16. Rows begin and end at different times.
        """
        device = device_named(self._setting.device.type)
        opened = load_language_model(locate_model(str(run.folder)), device=device)
        drawn = torch.Generator().manual_seed(0)
        prompts = [torch.randint(1, VOCAB_SIZE, (length,), generator=drawn).tolist() for length in (9, 2, 5, 1, 7)]
        how = Decoding(max_new_tokens=20, sampling=Sampling(temperature=0.0), batch_size=2)
        gaps: list[float] = []
        with torch.no_grad(), opened.computing():
            rows = generate(opened.model, prompts, how, stop_ids=range(0, VOCAB_SIZE, 16))
            for prompt, row in zip(prompts, rows, strict=True):
                scores = opened.model.logits(torch.tensor([prompt + row], device=device))[0, len(prompt) - 1 : -1]
                chosen = scores.gather(1, torch.tensor(row, device=device, dtype=torch.int64)[:, None])[:, 0]
                gaps += ((scores.amax(1) - chosen).abs() / scores.abs().amax()).tolist() if row else []
        assert gaps, "every row ended at once"
        return largest(gaps)

    def drawn(self) -> float:
        """Return the share of tokens that the GPU draws otherwise than the CPU, from the same scores and numbers."""
        made = torch.Generator().manual_seed(0)
        scores = torch.randn(64, VOCAB_SIZE, generator=made) * 3
        numbers = torch.rand(64, generator=made, dtype=torch.float64)
        differ = []
        for settings in ({}, {"temperature": 0.7}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.95}):
            how = Sampling(**settings)
            device = self._setting.device
            ours = choose_tokens(scores.to(device), sampling=how, numbers_b=numbers.to(device)).cpu()
            differ.append(float((ours != choose_tokens(scores, sampling=how, numbers_b=numbers)).double().mean()))
        return largest(differ)

    def _new_model(self, kind: str, changes: Mapping[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        if kind == "llama":
            shape = self._setting.sized(SMALL, smoke=TINY)
            return HuggingFaceModel(new_llama(shape, device=torch.device("cpu"), dtype=torch.float32))
        from llmtrain.config.sections.model import DecoderConfig

        config = self._with(model=changes)["model"]
        config["attention"] = {**self.config["model"]["attention"], **changes.get("attention", {})}
        return Decoder(DecoderConfig.model_validate(config), VOCAB_SIZE)


def _gradients(model: nn.Module, rows: list[list[Tensor]], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return the loss of all rows, each of which holds some documents, and the gradients of all parameters."""
    model.zero_grad()
    total = torch.zeros((), device=device)
    for documents in rows:
        batch = {name: value.to(device) for name, value in packed_batch(documents).items()}  # type: ignore[attr-defined]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss_sum, _ = model(batch)
        loss_sum.backward()
        total += loss_sum.detach()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [total, torch.cat([gradient.flatten() for gradient in gradients])]
