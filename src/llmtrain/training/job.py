"""All that a run is made of, and what the loop asks of it: batches, evaluations, snapshots, a way back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.sections.schema import Config
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.errors import RunError, WillFailAgain
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.runs.folders import start_run
from llmtrain.training.cadence import Due
from llmtrain.training.checkpoint import Snapshot, load_optimizer, load_state, newest_good
from llmtrain.training.non_finite import NonFinite, StepNumbers, leave_out
from llmtrain.training.resume import Identity
from llmtrain.training.schedule import Schedule, warmup_asked
from llmtrain.training.setup.data import RunData
from llmtrain.training.setup.start import Position, Start
from llmtrain.training.setup.trained import Trained
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState, seed_step
from llmtrain.training.step import Learner

if TYPE_CHECKING:
    from llmtrain.evaluation.answers_in_training import AnswersInTraining
    from llmtrain.evaluation.samples_in_training import Samples

log = logging.getLogger("llmtrain.train")

DRY_RUN_STEPS = 5
MAX_ROWS_NAMED = 20


@dataclass
class Job:
    """A run, before anything of it is written, and while it trains."""

    config: Config
    start: Start
    data: RunData
    trained: Trained
    """The model, and how checkpoints store it."""
    learner: Learner
    """The same model as the engine wraps it, its optimizer, and the engine."""
    identity: Identity
    schedule: Schedule
    position: Position
    """Position in the run at which this process starts."""
    answers: AnswersInTraining | None
    """The questions that the model is asked while it trains, if it is."""
    process_bytes: int
    """Resident memory before there was a model."""
    samples: Samples | None = None
    """Lets the model write at evaluations, where the config asks for it."""
    state: RunState = field(init=False)
    resumed_step: int | None = field(init=False)
    """The step that this process goes on from, if it does."""
    resumed_from: Path | None = field(init=False)
    """The checkpoint of that step, if there was one."""

    def __post_init__(self) -> None:
        self.state = self.position.state
        self.resumed_step = self.state.step if self.start.origin else None
        self.resumed_from = self.position.checkpoint

    @property
    def engine(self) -> Engine:
        """The processes that compute it."""
        return self.learner.engine

    @property
    def run_id(self) -> str | None:
        """The run's id, if it has one yet."""
        return self.start.origin.run.name if self.start.origin else self.config.output.run_id

    def find_or_make_folder(self) -> Path:
        """Return the run's folder; a new one with its metadata for a new run."""
        config, origin = self.config, self.start.origin
        if origin:
            return origin.run
        decided = {"resolved": self.engine.resolved.as_dict(), "commits": dict(self.start.commits)}
        return start_run(config.run, config.output, decided=decided, as_written=self.start.as_written)

    # -- tensors -------------------------------------------------------------------------------------------------------

    def load_tensors(self, checkpoint: Path) -> None:
        """Load the weights and the optimizer's state of a verified checkpoint."""
        with self.learner.optimizer.reading_weights():
            self.trained.read(checkpoint / "model")
        self.learner.optimizer.load_state_tensors(load_optimizer(checkpoint))

    def load_or_initialize(self) -> None:
        """Give weights and optimizer their values: a checkpoint's, or those of a new run."""
        if self.position.checkpoint:
            self.load_tensors(self.position.checkpoint)
        else:
            seed_step(self.config.run.seed, -1, rank=0)
            self.trained.initialize()
            self.learner.optimizer.take_weights()

    def snapshot(self) -> Snapshot:
        """Return what a checkpoint of this moment holds. Its tensors are the live ones."""
        optimizer, config = self.learner.optimizer, self.config
        self.state.warmup_steps = self.schedule.warmup_steps
        self.state.warmup_asked = warmup_asked(config.scheduler)
        saved = {
            "position": self.state.as_dict(),
            "identity": self.identity,
            "resolved": self.engine.resolved.as_dict(),
            "world_size": self.engine.world_size,
            "learning_rate": optimizer.lr,
            "planned": self.planned(),
            "random_numbers": {"seed": config.run.seed, "drawn_from": ["seed", "step", "rank"]},
        }
        tensors = optimizer.saved_weights(self.trained.tensors())
        return Snapshot(step=self.state.step, state=saved, model=tensors, optimizer=optimizer.state_tensors())

    def planned(self) -> dict[str, float]:
        """Return what a resumed run compares its own plan with."""
        schedule = self.schedule
        rate = self.config.optimizer.lr * schedule.learning_rate_scale(min(self.state.step, schedule.total_steps - 1))
        return {"batch_size": schedule.batch_size, "total_steps": schedule.total_steps, "next_learning_rate": rate}

    def roll_back(self, run: Path, found: StepNumbers) -> None:
        """Go back to the newest good checkpoint of `run`, to go on from there without the items of the step `found`.

        Raises WillFailAgain if that was tried many times, CheckpointError if no checkpoint is good.
        """
        newest = self.engine.from_main(lambda: newest_good(run / "checkpoints"))
        if newest is None:  # no save succeeded: the log says why
            raise RunError(f"{found}. There is no checkpoint to go back to")
        state = RunState.from_dict(load_state(newest[0])["position"])
        state.left_out = self.state.left_out
        leave_out(state, found)
        log.warning("%s. Back to step %d, to go on without these sequences", found, state.step)
        self.load_tensors(newest[0])
        self.state, self.resumed_step, self.resumed_from = state, state.step, newest[0]

    def with_rows(self, error: NonFinite) -> RunError:
        """Return what to raise in place of `error`: where items are made of rows, it names these."""
        rows = self.rows_of(error.found.items)
        if not rows:
            return error
        more = f" and {len(rows) - MAX_ROWS_NAMED} more" if len(rows) > MAX_ROWS_NAMED else ""
        return WillFailAgain(f"{error}. Its rows: {', '.join(rows[:MAX_ROWS_NAMED])}{more}")

    # -- batches and evaluations ---------------------------------------------------------------------------------------

    def batches(self) -> Generator[list[Batch], None, None]:
        """Yield the micro-batches of each step from here to the end of the schedule."""
        return self.data.training.batches(
            start_item=self.state.item,
            batch_size=self.schedule.batch_size,
            end_item=self.schedule.end_item,
            micro_batch_size=self.config.trainer.micro_batch_size,
        )

    def rows_of(self, items: range) -> list[str]:
        """Return `file:line` of the rows of some items, where items are made of rows."""
        return [row for item in items for row in self.data.training.rows_of(item)]

    def evaluate(self, run: Path, stop: StopSignal, due: Due) -> dict[str, float]:
        """Return the metrics that are due by their names. The ranks agree before each batch whether to stop."""

        def agree_to_go_on() -> None:
            if self.engine.world_size > 1 and self.engine.sum(int(stop.requested))[0]:
                raise StopRequested

        metrics = self.validate(before_batch=agree_to_go_on) if due.validation else {}
        if due.questions and self.answers:
            metrics |= self.answers.metrics(self.answers.generate(before_batch=agree_to_go_on))
        if due.validation and self.samples:
            self.samples.write(run, step=self.state.step, before_batch=agree_to_go_on)
        return metrics

    def validate(self, *, before_batch: Callable[[], None], max_batches: int | None = None) -> dict[str, float]:
        """Measure the model on the validation data: all batches of an evaluation, or only `max_batches` a rank."""
        validation = self.data.validation
        assert validation is not None
        with closing(validation.evaluation_batches(**self.evaluation_options(max_batches))) as batches:
            return evaluate_loss(
                self.learner.model,
                batches,
                engine=self.engine,
                tokens_per_byte=validation.facts.tokens_per_byte,
                before_batch=before_batch,
            ).metrics()

    def evaluation_options(self, max_batches: int | None = None) -> dict[str, Any]:
        batches = max_batches or self.config.trainer.eval_steps
        return {
            "batch_size": self.config.trainer.micro_batch_size,
            "max_batches": batches and batches * self.engine.data_parallel_size,
            "rank": self.engine.data_parallel_rank,
            "world_size": self.engine.data_parallel_size,
        }

    def dry_run(self) -> dict[str, Any]:
        """Compute a few forward steps: the data can be read, the model built, and a batch fits in memory."""
        losses = []
        with closing(self.batches()) as batches:
            for step, micro_batches in enumerate(islice(batches, DRY_RUN_STEPS), start=1):
                result = evaluate_loss(self.learner.model, micro_batches, engine=self.engine, tokens_per_byte=None)
                losses.append(result.loss)
                message = "dry run %d/%d: loss %.4f, %d tokens"
                log.info(message, step, DRY_RUN_STEPS, result.loss, result.num_tokens)
        return {"dry_run": True, "losses": losses, "planned_steps": self.schedule.total_steps}
