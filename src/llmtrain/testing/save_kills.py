"""Kills a run of several processes at the named points of its saves, one after the other, and looks what it lost.

    start ─▶ SIGKILL at a point ─▶ what is the newest good checkpoint? ─▶ start again ─▶ … ─▶ to the end
                                                                       the weights of a run that nobody killed

`python -m llmtrain.testing.save_kills 1000` (`make soak`) does that at points, on ranks and at steps drawn at random.
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

from llmtrain.config.load import load_config
from llmtrain.recipes.prepare import prepare
from llmtrain.testing.gang import GangServer
from llmtrain.testing.tiny_run import tiny_config, weight_hash, write_config
from llmtrain.training.checkpoint import newest_good, verify
from llmtrain.training.checkpoint_shelf import step_folder

BY_EVERY_WRITER = ("before-copy", "after-copy", "model-written", "model-synced", "optimizer-written")
"""Where parameters are cut over the ranks, each comes there; else rank 0 alone saves."""
UNPUBLISHED = (
    *("before-copy", "after-copy", "temp-made", "model-written", "model-synced", "optimizer-written"),
    *("state-written", "manifest-written", "manifest-synced", "before-rename"),
)
"""Killed there, a save never was."""
PUBLISHED = (
    *("after-rename", "parent-synced", "before-latest", "after-latest", "before-best", "after-best"),
    *("before-delete", "mid-delete", "after-delete"),
)
"""Killed there, it counts, and the next start does what is left of it."""
AT_THE_END = ("before-final", "after-final")
"""In the last save of a run only; they count as well."""
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
    """SIGKILL to a rank when it comes to a point."""

    point: str
    rank: int = 0


@dataclass
class Survived:
    """What a run, or several, went through."""

    kills: int = 0
    not_reached: int = 0
    """Points that a start did not come to: a save that was not the best has fewer."""
    steps_lost: int = 0
    """At most, of those that were due to be saved; never more than the interval."""
    runs: int = 0
    seconds: float = 0.0

    def add(self, other: Survived) -> None:
        """Count another's as well."""
        self.kills += other.kills
        self.not_reached += other.not_reached
        self.steps_lost = max(self.steps_lost, other.steps_lost)
        self.runs += other.runs
        self.seconds += other.seconds


def survive(
    kills: Sequence[Kill],
    *,
    config: Path,
    gangs: GangServer,
    strategy: str = "ddp",
    world_size: int = 2,
    run_id: str = "killed",
) -> Survived:
    """Train `config`, killed as `kills` say, each in a start of its own; then to the end.

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
        gang = gangs.start([*command, f"output.run_id={run_id}"], world_size=world_size, faults=faults)
        codes = gang.wait()
        where = f"{kill} in the save of step {step} of {world_size} processes, {strategy}: {codes}"
        if codes[kill.rank] == 0:
            found.not_reached += 1
            return _finish(found, began=began)
        assert codes[kill.rank] == -signal.SIGKILL, f"{where}\n{gang.stderr}"
        others = codes[: kill.rank] + codes[kill.rank + 1 :]
        assert set(others) <= ({0, 75} if step == num_steps else {75}), f"{where}\n{gang.stderr}"
        newest = newest_good(checkpoints) if checkpoints.exists() else None
        expected = step - INTERVAL if kill.point in UNPUBLISHED else step
        if newest is None:
            assert expected == 0, f"nothing is left after {where}"
        else:
            assert (newest[0].name, newest[1]) == (step_folder(checkpoints, expected).name, []), where
        got_on, done = expected > done, expected
        found.kills += 1
        found.steps_lost = max(found.steps_lost, step - expected)
    gang = gangs.start([*command, f"output.run_id={run_id}"], world_size=world_size)
    assert gang.wait() == [0] * world_size, gang.stderr
    for link in ("latest", "final"):
        assert (checkpoints / link).resolve().name == step_folder(checkpoints, num_steps).name
    verify((checkpoints / "best").resolve())
    left = [path.name for path in checkpoints.iterdir() if path.name.startswith(".")]
    assert not left, f"what killed processes left was not removed: {left}"
    whole = run.parent / f"whole-{strategy}-{world_size}-{num_steps}"
    if not whole.exists():
        codes = gangs.run([*command, f"output.run_id={whole.name}"], world_size=world_size)
        assert codes == [0] * world_size, codes
    assert weight_hash(run) == weight_hash(whole), f"other weights than without kills: {kills}"
    return _finish(found, began=began)


def _finish(found: Survived, *, began: float) -> Survived:
    found.seconds = time.monotonic() - began
    return found


def at_random(num_kills: int, *, config: Path, gangs: GangServer, seed: int) -> Iterator[Survived]:
    """Runs that are killed up to ten times each, until there were `num_kills`; what each went through, as it ends."""
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
            chosen, config=config, gangs=gangs, strategy=strategy, world_size=world_size, run_id=f"killed-{runs}"
        )
        kills += found.kills
        yield found


def _draw(draw: random.Random, points: Sequence[str], strategy: str, world_size: int) -> Kill:
    point = draw.choice(points)
    by_all = strategy == "fsdp" and point in BY_EVERY_WRITER
    return Kill(point, rank=draw.randrange(world_size) if by_all else 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; prints one line a run, then the sum as JSON."""
    parser = argparse.ArgumentParser(prog="python -m llmtrain.testing.save_kills", description=__doc__)
    parser.add_argument("kills", type=int, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    asked = parser.parse_args(arguments)
    with TemporaryDirectory(prefix="llmtrain-kills-") as name, GangServer() as gangs:
        folder = Path(name)
        config = write_config(folder / "tiny.yaml", tiny_config(folder / "shards", folder / "runs"))
        prepare(load_config(str(config)).config)
        total = Survived()
        for found in at_random(asked.kills, config=config, gangs=gangs, seed=asked.seed):
            total.add(found)
            print(f"{total.kills:5} kills survived, {total.seconds:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps(asdict(total)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
