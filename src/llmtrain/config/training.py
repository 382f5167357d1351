"""`trainer`, `optimizer`, `scheduler` and `distributed`: how the run trains."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from llmtrain.config.base import Section, opt


class EarlyStoppingConfig(Section):
    patience: int = opt(5, "Evaluations in a row without a gain that end the run.", ge=1)
    min_delta: float = opt(0.0, "A gain is a figure that is better by more than this.", ge=0)
    metric: str = opt("val/loss", "The figure that should get better; as for trainer.keep_best.")


class TrainerConfig(Section):
    max_steps: int | None = opt(None, "Optimizer steps; 10000 when no limit is given.", ge=1)
    max_epochs: float | None = opt(None, "Passes over the training items; the last batch may be short.", gt=0)
    max_tokens: int | None = opt(None, "Stop after the step that reaches as many tokens.", ge=1)
    micro_batch_size: int = opt(8, "Sequences that one device computes at a time.", ge=1)
    grad_accum_steps: int | None = opt(None, "Micro-batches of one optimizer step on each device.", ge=1)
    global_batch_size: int | None = opt(None, "Sequences of one optimizer step over all devices.", ge=1)
    precision: Literal["auto", "32", "bf16-mixed", "bf16-true", "16-mixed"] = opt(
        "auto", "auto takes bf16-mixed where the hardware computes bf16 natively, else 32; 16-mixed scales the loss."
    )
    compile: Literal["auto"] | bool = opt("auto", "torch.compile; auto turns it on where a compiler is found.")
    max_grad_norm: float | None = opt(1.0, "Clip the gradient's global norm; null turns it off.", gt=0)
    log_every_steps: int = opt(10, "Steps between two lines of metrics.", ge=1)
    eval_every_steps: int | None = opt(
        500, "Steps between two evaluations, or null; there is one at the end as well.", ge=1
    )
    eval_every_epochs: int | None = opt(None, "Evaluate at the end of every so many epochs as well.", ge=1)
    eval_every_seconds: float | None = opt(None, "Evaluate when the last time was so long ago as well.", gt=0)
    eval_steps: int | None = opt(50, "Batches of an evaluation on each rank; null takes the whole set.", ge=1)
    save_every_steps: int | None = opt(
        1000, "Steps between two checkpoints, or null; there is one at the end as well.", ge=1
    )
    save_every_epochs: int | None = opt(None, "Save at the end of every so many epochs as well.", ge=1)
    save_every_seconds: float | None = opt(None, "Save when the last time was so long ago as well.", gt=0)
    keep_last: int = opt(3, "Newest checkpoints that are kept; the best one is kept besides.", ge=1)
    activation_checkpointing: bool = opt(
        False, "Keep only each block's input for the backward pass and compute the rest again: less memory, more time."
    )
    keep_best: str | None = opt(
        "val/loss",
        "The figure by which a checkpoint is the best and kept: val/loss, val/perplexity, val/bits_per_byte, or one of "
        "evaluation.metrics, such as eval/rougeL, with evaluation.every_steps; null keeps none.",
    )
    early_stopping: EarlyStoppingConfig | None = opt(None, "Stop when the validation loss, or another figure, stalls.")
    non_finite: Literal["stop", "skip", "rollback"] = opt(
        "stop",
        "When a loss or a gradient is infinite or no number: stop (exit 42); skip the update; rollback to the last "
        "checkpoint, and leave the items out on meeting them again.",
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> TrainerConfig:
        limits = [name for name in ("max_steps", "max_epochs", "max_tokens") if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ValueError(f"give one of {', '.join(limits)}, not {len(limits)} of them (null takes one out)")
        at_once = self.micro_batch_size * (self.grad_accum_steps or 1)
        if self.global_batch_size is not None and self.global_batch_size % at_once:
            accumulation = f" × grad_accum_steps {self.grad_accum_steps}" if self.grad_accum_steps else ""
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}{accumulation} = {at_once}"
            )
        return self


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "sgd", "muon", "adamw8bit"] = opt(
        "adamw",
        "muon: Muon for the matrices of the blocks, AdamW for all else. adamw8bit: AdamW with its state in 8 bits, but "
        "for embeddings (bitsandbytes).",
    )
    lr: float = opt(3e-4, "Peak learning rate.", gt=0)
    weight_decay: float = opt(
        0.1,
        "Of matrices; biases, norms and embeddings have none. Decoupled from the gradient in adamw and muon, added to "
        "it in adam and sgd.",
        ge=0,
    )
    betas: tuple[float, float] = opt((0.9, 0.95), "Decay rates of adamw and adam.")
    eps: float = opt(1e-8, "Epsilon of adamw and adam.", gt=0)
    momentum: float = opt(0.95, "Momentum of muon and sgd.", ge=0, lt=1)
    master_weights: bool = opt(
        True,
        "Keep float32 copies of trained weights that are in 16 bits, and update these. Off, small updates are lost.",
    )

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are decay rates from 0 to below 1, but they are {list(self.betas)}")
        return self


class SchedulerConfig(Section):
    name: Literal["cosine", "linear", "constant", "wsd"] = opt("cosine", "Shape of the learning rate after warm-up.")
    warmup_steps: int | None = opt(None, "Linear warm-up: 100 steps when not given (wsd: 10 % of all).", ge=0)
    warmup_ratio: float | None = opt(None, "Linear warm-up as a share of all steps.", ge=0, lt=1)
    min_lr_ratio: float = opt(0.1, "The last learning rate over the peak.", ge=0, le=1)
    decay_ratio: float = opt(0.1, "Share of all steps in which wsd decays, by a cosine.", gt=0, le=1)

    @model_validator(mode="after")
    def _one_warmup(self) -> SchedulerConfig:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give warmup_steps or warmup_ratio, not both")
        return self


class RendezvousConfig(Section):
    init_method: str | None = opt(
        None, "env://, tcp://HOST:PORT or file:///PATH on a disk that all see.", pattern=r"^(env|tcp|file)://"
    )
    rank: int | None = opt(None, "This process's number among all; else RANK.", ge=0)
    world_size: int | None = opt(None, "Number of processes; else WORLD_SIZE.", ge=1)
    local_rank: int | None = opt(None, "This process's number on its machine; else LOCAL_RANK, else 0.", ge=0)
    master_addr: str | None = opt(None, "Host of the first process; else MASTER_ADDR.", min_length=1)
    master_port: int | None = opt(None, "A free port there; else MASTER_PORT.", ge=1, le=65535)


class DistributedConfig(Section):
    strategy: Literal["auto", "single", "ddp", "fsdp", "fsdp_tp"] = opt(
        "auto",
        "ddp: every process holds the whole model; fsdp: each holds a part; fsdp_tp: matrices are split over some as "
        "well. auto: single with one process, else ddp where what training keeps fits into 60 % of a process's memory, "
        "else fsdp.",
    )
    tensor_parallel: int | None = opt(
        None,
        "With fsdp_tp, the processes that share each matrix (2 when not given), best those of one machine; the others "
        "are data parallel.",
        ge=2,
    )
    backend: Literal["auto", "gloo", "nccl"] = opt("auto", "auto: nccl on CUDA, gloo elsewhere.")
    timeout_sec: int = opt(600, "Several processes that get nothing done for so long are ended as hung (76).", ge=1)
    find_unused_parameters: bool = opt(False, "Let DDP look for parameters that got no gradient.")
    rendezvous: RendezvousConfig = opt(
        RendezvousConfig(), "Where processes meet that neither --nproc nor torchrun started; else the environment says."
    )

    @model_validator(mode="after")
    def _split_matrices_only_if_asked(self) -> DistributedConfig:
        if self.tensor_parallel is not None and self.strategy != "fsdp_tp":
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, but strategy is {self.strategy}: set strategy to fsdp_tp, "
                "or remove tensor_parallel"
            )
        return self

    @property
    def ranks_per_matrix(self) -> int:
        """Processes that share each matrix, and so compute the same rows."""
        return (self.tensor_parallel or 2) if self.strategy == "fsdp_tp" else 1
