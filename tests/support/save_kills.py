"""Kills a run of several processes at the named points of its saves, one after the other, and checks what it lost.

    start ─▶ SIGKILL at a point ─▶ which is the newest good checkpoint? ─▶ start again ─▶ … ─▶ to the end
                                                                        with the weights of a run that was not killed

`python -m tests.support.save_kills 1000` (`make soak`) does that at points, on ranks and at steps drawn at random.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmtrain.config.loading.load import load_config
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.training.checkpoint import newest_good, step_folder, verify
from tests.support.tiny_run import tiny_config, weight_hash, write_config
from tests.support.worker_groups import GroupServer

BY_EVERY_WRITER = ("before-copy", "after-copy", "model-written", "model-synced", "optimizer-written")
"""Where parameters are sharded, every rank reaches these points; else only rank 0 saves."""
UNPUBLISHED = (
    *("before-copy", "after-copy", "temp-made", "model-written", "model-synced", "optimizer-written"),
    *("state-written", "manifest-written", "manifest-synced", "before-rename"),
)
"""After a kill here the save does not count."""
PUBLISHED = (
    *("after-rename", "parent-synced", "before-latest", "after-latest", "before-best", "after-best"),
    *("before-delete", "mid-delete", "after-delete"),
)
"""After a kill here the save counts, and the next start finishes it."""
AT_THE_END = ("before-final", "after-final")
"""Reached only in the last save of a run; after a kill here the save counts as well."""
POINTS = UNPUBLISHED + PUBLISHED + AT_THE_END

INTERVAL = 2
"""Steps between two saves."""
_KEYS = [
    f"trainer.save_every_steps={INTERVAL}",
    f"trainer.eval_every_steps={INTERVAL}",  # so that most saves are the best so far, and move that link
    "trainer.eval_steps=1",
    "trainer.keep_last=1",  # so that each deletes one
    "trainer.micro_batch_size=1",
    "optimizer.lr=0.0005",  # so that the validation loss falls each time
    "data.num_workers=0",
]


@dataclass(frozen=True)
class Kill:
    """SIGKILL to a rank when it reaches a point."""

    point: str
    rank: int = 0


@dataclass
class Survived:
    """Kills that one or several runs survived."""

    kills: int = 0
    not_reached: int = 0
    """Points that a start did not reach: a save that was not the best has fewer."""
    steps_lost: int = 0
    """The most steps that a kill cost; never more than the interval."""
    runs: int = 0
    seconds: float = 0.0

    def add(self, other: Survived) -> None:
        """Add the counts of another."""
        self.kills += other.kills
        self.not_reached += other.not_reached
        self.steps_lost = max(self.steps_lost, other.steps_lost)
        self.runs += other.runs
        self.seconds += other.seconds


def survive(
    kills: Sequence[Kill],
    *,
    config: Path,
    groups: GroupServer,
    strategy: str = "ddp",
    world_size: int = 2,
    run_id: str = "killed",
) -> Survived:
    """Train `config`, killed once in each start as `kills` say; then to the end.

    Raises AssertionError, with the point, where a start cannot go on, where more is lost than the steps of one
    interval, and where the weights at the end are not those of a run that was not killed.
    """
    began, found = time.monotonic(), Survived(runs=1)
    num_steps = INTERVAL * (2 * len(kills) + 2)
    keys = [*_KEYS, f"trainer.max_steps={num_steps}", f"distributed.strategy={strategy}"]
    command = ["train", str(config), *keys, "--resume=auto"]
    run = Path(load_config(str(config)).config.output.root_dir) / run_id
    checkpoints, done, got_on = run / "checkpoints", 0, True
    for kill in kills:
        # Three starts without a newer checkpoint are a crash loop, so where the last made none, this one makes one.
        step = num_steps if kill.point in AT_THE_END else done + INTERVAL * (1 if got_on else 2)
        faults = f"kill@{kill.point}:step={step}:rank={kill.rank}"
        group = groups.start([*command, f"output.run_id={run_id}"], world_size=world_size, faults=faults)
        codes = group.wait()
        where = f"{kill} in the save of step {step} of {world_size} processes, {strategy}: {codes}"
        if codes[kill.rank] == 0:
            found.not_reached += 1
            return _finish(found, began=began)
        assert codes[kill.rank] == -signal.SIGKILL, f"{where}\n{group.stderr}"
        others = codes[: kill.rank] + codes[kill.rank + 1 :]
        assert set(others) <= ({0, 75} if step == num_steps else {75}), f"{where}\n{group.stderr}"
        newest = newest_good(checkpoints) if checkpoints.exists() else None
        expected = step - INTERVAL if kill.point in UNPUBLISHED else step
        if newest is None:
            assert expected == 0, f"nothing is left after {where}"
        else:
            assert (newest[0].name, newest[1]) == (step_folder(checkpoints, expected).name, []), where
        got_on, done = expected > done, expected
        found.kills += 1
        found.steps_lost = max(found.steps_lost, step - expected)
    group = groups.start([*command, f"output.run_id={run_id}"], world_size=world_size)
    assert group.wait() == [0] * world_size, group.stderr
    for link in ("latest", "final"):
        assert (checkpoints / link).resolve().name == step_folder(checkpoints, num_steps).name
    verify((checkpoints / "best").resolve())
    left = [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]
    assert not left, f"the work of killed processes was not removed: {left}"
    whole = run.parent / f"whole-{strategy}-{world_size}-{num_steps}"
    if not whole.exists():
        codes = groups.run([*command, f"output.run_id={whole.name}"], world_size=world_size)
        assert codes == [0] * world_size, codes
    assert weight_hash(run) == weight_hash(whole), f"other weights than without kills: {kills}"
    return _finish(found, began=began)


def _finish(found: Survived, *, began: float) -> Survived:
    found.seconds = time.monotonic() - began
    return found


def at_random(num_kills: int, *, config: Path, groups: GroupServer, seed: int) -> Iterator[Survived]:
    """Kill runs up to ten times each, until there were `num_kills`. Yield what each run survived, as it ends."""
    draw = random.Random(seed)
    kills = runs = 0
    while kills < num_kills:
        strategy, world_size = draw.choice(["ddp", "fsdp"]), draw.choice([2, 2, 4])
        chosen = [_draw(draw, UNPUBLISHED if index == 0 else UNPUBLISHED + PUBLISHED, strategy, world_size)
                  for index in range(min(10, num_kills - kills))]  # fmt: skip
        if len(chosen) > 1 and draw.random() < 0.5:
            chosen[-1] = Kill(draw.choice(AT_THE_END))
        runs += 1
        found = survive(
            chosen,
            config=config,
            groups=groups,
            strategy=strategy,
            world_size=world_size,
            run_id=f"killed-{runs}",
        )
        kills += found.kills
        yield found


def _draw(draw: random.Random, points: Sequence[str], strategy: str, world_size: int) -> Kill:
    point = draw.choice(points)
    by_all = strategy == "fsdp" and point in BY_EVERY_WRITER
    return Kill(point, rank=draw.randrange(world_size) if by_all else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: print one line a run, then the sum as JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.save_kills", description=__doc__)
    parser.add_argument("kills", type=int, help="number of kills")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices")
    asked = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="llmtrain-kills-") as name, GroupServer() as groups:
        folder = Path(name)
        config = write_config(folder / "tiny.yaml", tiny_config(folder / "shards", folder / "runs"))
        prepare(load_config(str(config)).config)
        total = Survived()
        for found in at_random(asked.kills, config=config, groups=groups, seed=asked.seed):
            total.add(found)
            print(f"{total.kills:5} kills survived, {total.seconds:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(asdict(total)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
