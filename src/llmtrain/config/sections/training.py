"""`trainer`, `optimizer`, `scheduler` and `distributed`: how the run trains."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from llmtrain.config.sections.base import Alternatives, Section, opt


class EarlyStoppingConfig(Section):
    patience: int = opt(5, "Evaluations in a row without an improvement after which the run ends.", ge=1)
    min_delta: float = opt(0.0, "The smallest improvement that counts.", ge=0)
    metric: str = opt("val/loss", "The metric that should improve; one of those of trainer.keep_best.")


class TrainerConfig(Section):
    alternatives: ClassVar[tuple[Alternatives, ...]] = (
        Alternatives(("max_steps", "max_epochs", "max_tokens")),
        Alternatives(("grad_accum_steps", "global_batch_size"), may_agree=True),
    )

    max_steps: int | None = opt(None, "Optimizer steps; 10000 when no limit is given and the data do not end.", ge=1)
    max_epochs: float | None = opt(
        None,
        "Passes over the training data, all sources together; the last batch may be short.",
        gt=0,
    )
    max_tokens: int | None = opt(None, "Stop after the step that reaches this many tokens.", ge=1)
    max_minutes: float | None = opt(
        None,
        "Train for at most this many minutes, set-up and evaluations included. Speed is measured on steps that are "
        "discarded; the number of steps is fixed before the first real one, so that the schedule ends on time.",
        gt=0,
    )
    micro_batch_size: int = opt(8, "Sequences that one device computes at a time.", ge=1)
    grad_accum_steps: int | None = opt(None, "Micro-batches of one optimizer step on each device.", ge=1)
    global_batch_size: int | None = opt(None, "Sequences of one optimizer step over all devices.", ge=1)
    precision: Literal["auto", "32", "bf16-mixed", "bf16-true", "16-mixed", "fp8-mixed"] = opt(
        "auto",
        "auto takes bf16-mixed where the hardware computes bf16 natively, else 32; 16-mixed scales the loss; fp8-mixed "
        "is bf16-mixed with the linear layers of the blocks in float8, on GPUs that have it (the extra fp8).",
    )
    compile: Literal["auto"] | bool = opt("auto", "Use torch.compile; auto does so where a compiler is found.")
    max_grad_norm: float | None = opt(1.0, "Clip the gradient's global norm; null turns it off.", gt=0)
    log_every_steps: int = opt(10, "Steps between two lines of metrics.", ge=1)
    eval_every_steps: int | None = opt(
        500, "Steps between two evaluations, or null; there is always one at the end.", ge=1
    )
    eval_every_epochs: int | None = opt(None, "Also evaluate at the end of every N epochs.", ge=1)
    eval_every_seconds: float | None = opt(
        None, "Also evaluate when the last evaluation was this many seconds ago.", gt=0
    )
    eval_steps: int | None = opt(
        50, "Batches of an evaluation on each rank; null takes the whole validation set.", ge=1
    )
    save_every_steps: int | None = opt(
        1000, "Steps between two checkpoints, or null; there is always one at the end.", ge=1
    )
    save_every_epochs: int | None = opt(None, "Also save at the end of every N epochs.", ge=1)
    save_every_seconds: float | None = opt(None, "Also save when the last checkpoint was this many seconds ago.", gt=0)
    keep_last: int = opt(3, "Newest checkpoints that are kept, besides the best one.", ge=1)
    activation_checkpointing: Literal["auto", "none", "selective", "full"] = opt(
        "none",
        "Blocks that keep only their input, and are computed again in the backward pass: less memory, more time. "
        "selective: half of the blocks; full: all; auto: as few as let a step fit into the memory.",
    )
    memory_budget_gb: float | None = opt(
        None,
        "With activation_checkpointing auto, the gigabytes that a step may take on a device; 95 % of what is free at "
        "the start when not given.",
        gt=0,
    )
    keep_best: str | None = opt(
        "val/loss",
        "The metric that decides which checkpoint is the best and kept: val/loss, val/perplexity, val/bits_per_byte; "
        "with evaluation.every_steps also one of evaluation.metrics, such as eval/rougeL; null keeps none.",
    )
    early_stopping: EarlyStoppingConfig | None = opt(
        None, "Stop when the validation loss, or another metric, no longer improves."
    )
    non_finite: Literal["stop", "skip", "rollback"] = opt(
        "stop",
        "After a loss or gradient that is infinite or NaN: stop (exit 42); skip the update; or go back to the last "
        "checkpoint and leave the sequences out that led there (rollback).",
    )

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _older_runs_have_true_or_false(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _batch_is_divisible(self) -> TrainerConfig:
        at_once = self.micro_batch_size * (self.grad_accum_steps or 1)
        if self.global_batch_size is not None and self.global_batch_size % at_once:
            accumulation = f" × grad_accum_steps {self.grad_accum_steps}" if self.grad_accum_steps else ""
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size {self.micro_batch_size}{accumulation} = {at_once}"
            )
        return self

    @property
    def in_float8(self) -> bool:
        """True if linear layers multiply in float8."""
        return self.precision == "fp8-mixed"

    @property
    def autocast_precision(self) -> str:
        """Precision of everything that is not in float8; may be auto."""
        return "bf16-mixed" if self.in_float8 else self.precision


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "sgd", "muon", "adamw8bit"] = opt(
        "adamw",
        "muon: Muon for the matrices of the blocks, AdamW for all other weights. adamw8bit: AdamW with its state in 8 "
        "bits, except that of embeddings (bitsandbytes).",
    )
    lr: float = opt(3e-4, "Peak learning rate.", gt=0)
    weight_decay: float = opt(
        0.1,
        "Weight decay of matrices; biases, norms and embeddings have none. Decoupled from the gradient in adamw and "
        "muon, added to it in adam and sgd.",
        ge=0,
    )
    betas: tuple[float, float] = opt((0.9, 0.95), "Decay rates of adamw and adam.")
    eps: float = opt(1e-8, "Epsilon of adamw and adam.", gt=0)
    momentum: float = opt(0.95, "Momentum of muon and sgd.", ge=0, lt=1)
    master_weights: bool = opt(
        True,
        "Keep float32 copies of trained 16-bit weights, and update these; without them small updates are lost.",
    )

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are decay rates from 0 to below 1, but they are {list(self.betas)}")
        return self


class SchedulerConfig(Section):
    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("warmup_steps", "warmup_ratio")),)

    name: Literal["cosine", "linear", "constant", "wsd"] = opt("cosine", "Shape of the learning rate after warm-up.")
    warmup_steps: int | None = opt(None, "Linear warm-up: 100 steps, or a quarter of a shorter run (wsd: 10 %).", ge=0)
    warmup_ratio: float | None = opt(None, "Linear warm-up as a share of all steps.", ge=0, lt=1)
    min_lr_ratio: float = opt(0.1, "The last learning rate, as a share of the peak.", ge=0, le=1)
    decay_ratio: float = opt(0.1, "Share of all steps in which wsd decays, along a cosine.", gt=0, le=1)


class RendezvousConfig(Section):
    init_method: str | None = opt(
        None,
        "env://, tcp://HOST:PORT or file:///PATH on a disk that all processes share.",
        pattern=r"^(env|tcp|file)://",
    )
    rank: int | None = opt(None, "Rank of this process; RANK when not given.", ge=0)
    world_size: int | None = opt(None, "Number of processes; WORLD_SIZE when not given.", ge=1)
    local_rank: int | None = opt(None, "Rank of this process on its machine; LOCAL_RANK when not given, else 0.", ge=0)
    master_addr: str | None = opt(None, "Host of the first process; MASTER_ADDR when not given.", min_length=1)
    master_port: int | None = opt(None, "A free port on that host; MASTER_PORT when not given.", ge=1, le=65535)


class DistributedConfig(Section):
    strategy: Literal["auto", "single", "ddp", "fsdp", "fsdp_tp"] = opt(
        "auto",
        "ddp: every process holds the full model; fsdp: each holds a shard; fsdp_tp: fsdp, and several processes share "
        "each matrix. auto: single with one process, else ddp where weights, gradients and optimizer state fit into "
        "60 % of a process's memory, else fsdp.",
    )
    tensor_parallel: int | None = opt(
        None,
        "With fsdp_tp, the number of processes that share each matrix (2 when not given), best on one machine; the "
        "groups of such processes are data parallel.",
        ge=2,
    )
    replicate: int = opt(
        1,
        "With fsdp or fsdp_tp, the number of replicas, best one on each machine: parameters are sharded over the "
        "processes of a replica, and gradients are averaged over the replicas. 1 shards them over all processes.",
        ge=1,
    )
    backend: Literal["auto", "gloo", "nccl"] = opt("auto", "auto: nccl on CUDA, gloo elsewhere.")
    timeout_sec: int = opt(
        600, "Seconds without progress after which several processes are ended as hung (exit 76).", ge=1
    )
    find_unused_parameters: bool = opt(False, "Let DDP look for parameters without a gradient.")
    rendezvous: RendezvousConfig = opt(
        RendezvousConfig(),
        "Where processes meet that neither --nproc nor torchrun started; the environment's when not given.",
    )

    @model_validator(mode="after")
    def _split_matrices_only_if_asked(self) -> DistributedConfig:
        if self.tensor_parallel is not None and self.strategy != "fsdp_tp":
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, but strategy is {self.strategy}: set strategy to fsdp_tp, "
                "or remove tensor_parallel"
            )
        return self

    @model_validator(mode="after")
    def _replicas_of_shards_only(self) -> DistributedConfig:
        if self.replicate > 1 and self.strategy in ("single", "ddp"):
            raise ValueError(
                f"replicate is {self.replicate}, but strategy is {self.strategy}, which shards nothing: set strategy "
                "to fsdp, or remove replicate"
            )
        return self

    @property
    def tensor_parallel_size(self) -> int:
        """Number of processes that share each matrix, and so compute the same sequences."""
        return (self.tensor_parallel or 2) if self.strategy == "fsdp_tp" else 1
