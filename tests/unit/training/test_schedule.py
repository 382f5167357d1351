"""How long a run is, and batch sizes that contradict each other."""

import math
import re
from typing import Any

import pytest

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import SchedulerConfig, TrainerConfig
from llmtrain.distributed.strategy import global_batch_size
from llmtrain.errors import ConfigError
from llmtrain.training.cadence import Due
from llmtrain.training.schedule import Epoch, Schedule, make_schedule
from llmtrain.training.state import RunState

VALIDATED = Due(validation=True, questions=False)


def schedule_of(
    state: RunState | None = None,
    *,
    items_per_epoch: int = 100,
    validates: bool = True,
    ask_every: int | None = None,
    **trainer: object,
) -> Schedule:
    return make_schedule(
        TrainerConfig.model_validate(trainer),
        SchedulerConfig(),
        seed=1,
        epoch=Epoch(items_per_epoch, 32),
        state=state or RunState(),
        world_size=1,
        validates=validates,
        ask_every=ask_every,
    )


def test_the_batch_is_micro_times_accumulation_times_ranks() -> None:
    assert global_batch_size(TrainerConfig(micro_batch_size=4, grad_accum_steps=3), world_size=2) == 24
    assert global_batch_size(TrainerConfig(micro_batch_size=4, global_batch_size=24), world_size=2) == 24


def test_a_contradiction_says_both_sides() -> None:
    trainer = TrainerConfig(micro_batch_size=4, grad_accum_steps=3, global_batch_size=24)
    with pytest.raises(ConfigError, match=r"24, but micro_batch_size 4 × grad_accum_steps 3 × 1 ranks is 12"):
        global_batch_size(trainer, world_size=1)


def test_a_batch_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(ConfigError, match=r"36, which is not divisible by micro_batch_size 4 × 2 ranks: set it to 32"):
        global_batch_size(TrainerConfig(micro_batch_size=4, global_batch_size=36), world_size=2)


def test_fewer_items_than_a_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"7 sequences of 32 tokens, fewer than one batch of 8"):
        schedule_of(micro_batch_size=8, items_per_epoch=7)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_takes_few_rows_once(world_size: int) -> None:
    trainer = TrainerConfig(micro_batch_size=2, grad_accum_steps=4, max_epochs=3)
    epoch = Epoch.of(ChatConfig(name="chat", train="rows.jsonl", seq_len=32), 3)
    schedule = make_schedule(trainer, SchedulerConfig(), seed=1, epoch=epoch, state=RunState(), world_size=world_size)
    assert (schedule.batch_size, schedule.total_steps, schedule.end_item) == (3, 3, 9)


def test_one_epoch_uses_each_item_once_with_a_short_last_batch() -> None:
    schedule = schedule_of(micro_batch_size=8, max_epochs=1)
    assert (schedule.total_steps, schedule.end_item) == (13, 100)


def test_max_tokens_stops_at_the_step_that_reaches_them() -> None:
    assert schedule_of(micro_batch_size=8, max_tokens=8 * 32 * 5 + 1).total_steps == 6


@pytest.mark.parametrize("limit", [{"max_steps": 40}, {"max_epochs": 2.5}, {"max_tokens": 7000}])
def test_a_resumed_run_is_as_long_as_one_never_stopped(limit: dict[str, Any]) -> None:
    whole = schedule_of(micro_batch_size=8, **limit)
    resumed = schedule_of(RunState(step=9, item=72, tokens=2000), micro_batch_size=8, **limit)
    assert (resumed.total_steps, resumed.end_item) == (whole.total_steps, whole.end_item)


def test_a_run_without_a_limit_has_10000_steps() -> None:
    assert schedule_of().total_steps == 10_000


def state_at(step: int, *, batch: int = 8) -> RunState:
    return RunState(step=step, item=step * batch)


def test_evaluating_and_saving_are_due_at_steps_and_at_the_end_of_epochs() -> None:
    trainer: dict[str, Any] = {"micro_batch_size": 8, "max_steps": 60, "eval_every_steps": None, "eval_every_epochs": 2}
    schedule = schedule_of(**trainer, save_every_steps=25, save_every_epochs=1)  # epochs of 12.5 steps
    saves = [step for step in range(61) if schedule.save_due(state_at(step), late=False)]
    evaluations = [step for step in range(61) if schedule.evaluations_due(state_at(step), late=False).validation]
    assert saves == [13, 25, 38, 50]
    assert evaluations == [25, 50, 60]


def test_what_the_clock_says_is_due_now_but_no_evaluation_is_made_twice() -> None:
    schedule = schedule_of(micro_batch_size=8, eval_every_steps=None, save_every_steps=None, max_steps=60)
    assert schedule.save_due(state_at(7), late=True)
    assert not schedule.save_due(state_at(7), late=False)
    again = RunState(step=7, item=56, evaluated_step=7)
    assert schedule.evaluations_due(state_at(7), late=True) == Due(validation=True, questions=False)
    assert not any(schedule.evaluations_due(again, late=True))


def test_patience_counts_evaluations_without_a_gain() -> None:
    early_stopping = {"patience": 3, "min_delta": 0.1}
    schedule = schedule_of(micro_batch_size=8, max_steps=60, early_stopping=early_stopping)
    state = RunState()
    over = []
    for loss in (3.0, 2.0, 1.95, math.nan, 1.92, 1.8, 1.75):
        state.record_evaluation({"val/loss": loss}, VALIDATED, min_delta=schedule.min_delta)
        over.append(schedule.is_over(state))
    assert over == [False, False, False, False, True, False, False]
    assert (state.best_val_loss, state.gained) == (1.75, 1.8)


def test_questions_are_asked_at_steps_of_their_own_and_at_the_end() -> None:
    schedule = schedule_of(micro_batch_size=8, max_steps=20, eval_every_steps=10, ask_every=8)
    due = {step: schedule.evaluations_due(state_at(step), late=False) for step in range(21)}
    assert {step for step, one in due.items() if one.validation} == {10, 20}
    assert {step for step, one in due.items() if one.questions} == {8, 16, 20}
    asked = RunState(step=16, item=128, asked_step=16)
    assert not any(schedule.evaluations_due(asked, late=False)), "a resumed run does not ask again"
    without_data = schedule_of(micro_batch_size=8, max_steps=20, eval_every_steps=10, ask_every=8, validates=False)
    assert without_data.evaluations_due(state_at(20), late=True) == Due(validation=False, questions=True)


def test_the_best_and_the_end_go_by_the_figures_that_they_name() -> None:
    state, best, over = RunState(), [], []
    early_stopping = {"patience": 2, "metric": "eval/rougeL"}
    schedule = schedule_of(micro_batch_size=8, max_steps=60, keep_best="eval/rougeL", early_stopping=early_stopping)
    figures = [{"val/loss": 3.0}, {"eval/rougeL": 0.2}, {"val/loss": 2.0, "eval/rougeL": 0.4}, {"val/loss": 9.0}]
    figures += [{"eval/rougeL": 0.3}, {"eval/rougeL": 0.35}, {"eval/rougeL": math.nan}]
    for number, one in enumerate(figures):
        state.step = number
        names = {"keep_best": schedule.keep_best, "stop_by": schedule.stop_by}
        best.append(state.record_evaluation(one, Due("val/loss" in one, "eval/rougeL" in one), **names))  # type: ignore[arg-type]
        over.append(schedule.is_over(state))
    assert best == [False, True, True, False, False, False, False], "of answers more is better"
    assert over == [False, False, False, False, False, True, True], "a validation alone is no evaluation without a gain"
    assert (state.best, state.best_step, state.best_val_loss) == (0.4, 2, 2.0)
    assert state.validation["val/loss"] == 9.0
    none = schedule_of(micro_batch_size=8, max_steps=60, keep_best=None)
    assert not RunState().record_evaluation({"val/loss": 1.0}, VALIDATED, keep_best=none.keep_best)


def test_a_checkpoint_from_before_keeps_its_best() -> None:
    state = RunState.from_dict({"step": 9, "best_val_loss": 2.5, "gained_val_loss": 2.6, "best_step": 5})
    assert (state.best, state.gained) == (2.5, 2.6)
    assert not state.record_evaluation({"val/loss": 2.55}, VALIDATED)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trainer": {"keep_best": "val/los"}}, "trainer.keep_best is 'val/los', but it should be one of val/loss, "),
        ({"trainer": {"keep_best": "eval/bleu"}}, "metrics of eval/ are measured with evaluation.every_steps"),
        ({"trainer": {"early_stopping": {"metric": "bleu"}}}, "trainer.early_stopping.metric is 'bleu'"),
        (
            {"evaluation": {"every_steps": 5, "data": "a"}, "distributed": {"strategy": "fsdp_tp"}},
            "evaluation.every_steps asks the model for text, and with distributed.strategy fsdp_tp each process has",
        ),
        ({"evaluation": {"every_steps": 5}}, "every_steps asks rows of evaluation.data, which names none"),
        (
            {"evaluation": {"every_steps": 5, "data": "a", "metrics": ["a:f", "b:f"]}},
            "two metrics have the same name",
        ),
    ],
)
def test_a_metric_that_nobody_measures_is_rejected(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.model_validate({"data": {"name": "synthetic"}, **keys})
    trainer = {"keep_best": "eval/f", "early_stopping": {"metric": "eval/bleu"}}
    evaluation = {"every_steps": 5, "data": "a", "metrics": ["a:f", "bleu"]}
    Config.model_validate({"data": {"name": "synthetic"}, "trainer": trainer, "evaluation": evaluation})
