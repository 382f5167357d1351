"""`eval --tasks`: standard benchmarks, as lm-evaluation-harness defines and scores them, for any model.

    tasks ─ lm_eval ─▶ requests ─ TaskModel ─▶ row_losses, complete ─▶ answers ─ lm_eval ─▶ scores

The harness makes three kinds of requests: the likelihood of a continuation, the likelihood of a text, and a generated
continuation. They are answered by the same functions that evaluate rows, for any kind of model.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_harness
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.folder import evaluation_folder, write_metrics
from llmtrain.evaluation.row_loss import row_losses
from llmtrain.generation.completion import TokenizedPrompt, complete
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.open_model import load_language_model
from llmtrain.generation.sampling import Decoding, Sampling
from llmtrain.runs.stores import runs_folder
from llmtrain.tracking.progress import Progress

log = logging.getLogger("llmtrain.eval")

T = TypeVar("T")
DEFAULT_NEW_TOKENS = 256
"""Number of new tokens for a task that does not set it."""
LONGEST_CONTEXT = 2048
"""Context length of a model without a limit, in tokens."""


def evaluate_tasks(
    folder: Path,
    settings: EvaluationConfig,
    *,
    seed: int,
    root_dir: str,
    engine: Engine,
    trusts_code: bool = False,
) -> dict[str, Any]:
    """Evaluate the tasks and write metrics.json; return its document, with the score of every task, on every rank.

    Raises ConfigError for tasks that are not known, or cannot be loaded.
    """
    began = time.monotonic()
    with _seeded(seed), engine.main_first():  # one rank fetches what a task needs
        tasks = _load(settings, seed=seed)
    language_model = load_language_model(
        folder, device=engine.device, trust_remote_code=trusts_code, precision=engine.resolved.precision
    )
    if language_model.tokenizer is None:
        raise ConfigError(f"{folder} has no tokenizer, so it cannot answer questions")
    log.info("%s for %s", ", ".join(settings.tasks), folder)
    with language_model.computing(), _seeded(seed), Progress(quiet=not engine.is_main) as progress:
        model = TaskModel(language_model, engine=engine, batch_size=settings.batch_size, seed=seed, progress=progress)
        found = run_harness(
            model,
            tasks,
            limit=settings.max_samples,
            apply_chat_template=settings.chat is True,
            log_samples=False,
        )
    assert found is not None, "to the harness each process is the only one"

    def write() -> dict[str, Any]:
        output = evaluation_folder(
            folder, root=runs_folder(root_dir), identity=f"tasks, {datetime.now(UTC).isoformat()}"
        )
        document = {
            "model": str(folder),
            "precision": language_model.precision,
            "output": str(output),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "tasks": {name: _scores(name, found) for name in found["results"]},
            "settings": {**settings.model_dump(mode="json"), "seed": seed},
            "seconds": time.monotonic() - began,
        }
        write_metrics(output, document)
        return document

    return engine.from_main(write)


class TaskModel(TemplateLM):  # type: ignore[misc]  # what the harness calls has to be one of its own
    """A model with the harness's interface. Several processes share the requests; to the harness there is only one."""

    def __init__(
        self, language_model: LanguageModel, *, engine: Engine, batch_size: int, seed: int, progress: Progress
    ) -> None:
        super().__init__()
        assert language_model.tokenizer is not None
        self._opened, self._tokenizer = language_model, language_model.tokenizer
        self._engine, self._batch_size, self._seed, self._progress = engine, batch_size, seed, progress
        self._longest = language_model.model.max_seq_len or LONGEST_CONTEXT

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """Token with which a text without context begins."""
        bos_id = self._opened.encoder.bos_id if self._opened.encoder else None
        return self.eot_token_id if bos_id is None else int(bos_id)

    @property
    def tokenizer_name(self) -> str:
        """Name for the harness's own caches, which are off."""
        return str(self._opened.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the tokens of a text, with a BOS token if the tokenizer adds one and the text has none."""
        if self._opened.encoder is None:
            return self._tokenizer.encode(string)
        return self._opened.encoder.encode_prompt(string, is_complete=add_special_tokens is False)

    def apply_chat_template(self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the turns as the prompt for the next turn."""
        if not add_generation_prompt:
            raise ConfigError(
                "evaluation.chat: a task begins the answer itself, which chat templates do not support: set it to false"
            )
        return self._opened.render(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template's text, for the harness's records."""
        return self._opened.encoder.template.text if self._opened.encoder else ""

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each continuation its log probability, and whether it is the likeliest one."""
        rows = []
        for _texts, context, continuation in requests:
            ids = [*context, *continuation][-(self._longest + 1) :]
            counted = min(len(continuation), len(ids))
            rows.append((ids, [False] * (len(ids) - counted) + [True] * counted))

        def measure(share: Sequence[tuple[list[int], list[bool]]]) -> list[tuple[float, bool]]:
            found = row_losses(self._opened.model, share, after_batch=self._tell("likelihoods", len(share)))
            return [(-one.loss_sum, one.is_likeliest) for one in found]

        return self._shared(rows, measure)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log probability of each text, computed in windows of the context's length."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),  # with BOS, as the harness's own models do
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest,
                context_len=1,
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to the stop texts of its task."""
        alike: dict[str, list[int]] = defaultdict(list)
        for row, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True, default=str)].append(row)
        answers = [""] * len(requests)
        for rows in alike.values():
            contexts = [str(requests[row].args[0]) for row in rows]
            settings: Mapping[str, Any] = requests[rows[0]].args[1]

            def write(share: Sequence[str], settings: Mapping[str, Any] = settings) -> list[str]:
                return self._continuations(share, settings)

            for row, answer in zip(rows, self._shared(contexts, write), strict=True):
                answers[row] = answer
        return answers

    def _continuations(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        until = settings.get("until") or []
        wanted = int(settings.get("max_gen_toks") or DEFAULT_NEW_TOKENS)
        num_new = min(wanted, self._longest - 1)
        prompts = [self.tok_encode(context)[-(self._longest - num_new) :] for context in contexts]
        found = complete(
            self._opened.model,
            self._tokenizer,
            [
                TokenizedPrompt(context, prompt or [self.prefix_token_id])
                for context, prompt in zip(contexts, prompts, strict=True)
            ],
            Decoding(
                max_new_tokens=num_new,
                sampling=Sampling(
                    temperature=float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0,
                    top_p=settings.get("top_p") if settings.get("do_sample") else None,
                    seed=self._seed,
                ),
                batch_size=self._batch_size,
            ),
            stop=[text for text in ([until] if isinstance(until, str) else until) if text],
            stop_ids=self._opened.eos_ids,
            heal=False,
        )
        return [one.completion for one in found]

    def _shared(self, items: Sequence[Any], work: Callable[[Sequence[Any]], list[T]]) -> list[T]:
        """Return the results of all items in their order, each computed by one process."""
        rank, world_size = self._engine.rank, self._engine.world_size
        parts = self._engine.gather(work(items[rank::world_size]))
        return [parts[index % world_size][index // world_size] for index in range(len(items))]

    def _tell(self, stage: str, total: int) -> Callable[[int], None]:
        return lambda done: self._progress.track(stage, done, total)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python's and numpy's generators within the block, for tasks that draw, such as the order of choices."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _load(settings: EvaluationConfig, *, seed: int) -> Any:
    """Return the harness's tasks, by name or from YAML files. Raises ConfigError if one cannot be loaded."""
    files = [name for name in settings.tasks if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise ConfigError(f"evaluation.tasks: {missing[0]}: no such file")
    manager = TaskManager(include_defaults=len(files) < len(settings.tasks))  # reading thousands of files takes seconds
    try:
        loaded = manager.load(list(settings.tasks))
    except (KeyError, ValueError, OSError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0].strip("'\"")
        raise ConfigError(
            f"evaluation.tasks: {', '.join(settings.tasks)} cannot be loaded: {why}. Tasks are named as "
            "`lm-eval ls tasks` lists them, or are YAML files"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"evaluation.tasks: {name} runs code that the model writes, which is not allowed: remove it"
            )
        if settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def _scores(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's metrics. If there is only one of the harness's filters, their names do not include it."""
    values = {key: value for key, value in found["results"][name].items() if "," in key}
    filters = {key.partition(",")[2] for key in values}
    named = {key.partition(",")[0] if len(filters) == 1 else key: value for key, value in values.items()}
    return {
        "scores": {key: value if isinstance(value, int | float) else None for key, value in named.items()},
        "num_fewshot": found.get("n-shot", {}).get(name),
        "rows": found.get("n-samples", {}).get(name, {}).get("effective"),
        "version": found.get("versions", {}).get(name),
    }
