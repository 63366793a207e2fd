"""A run folder → what happened in it, whether the run is over, under way or was killed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mlxsft.errors import InputRefused
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import (
    Evaluated,
    Event,
    Finished,
    LeftOutRows,
    Noted,
    Overfitted,
    Restarted,
    RolledBack,
    Sampled,
    Started,
    Stepped,
    lasting,
    read_events,
)
from mlxsft.training.report import overfitting_sentence, restart_sentence, rolled_back_sentence

DEPTH = 3  # folders below the one that is searched for runs
_ENDS = {"done": "finished", "patience": "stopped early", "interrupted": "interrupted"}


class Point(NamedTuple):
    """A value over steps: the mean of a few of them, with the lowest and the highest."""

    step: float
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class History:
    """What one run folder holds; `busy`: a run is at work in it, `unread`: lines of events.jsonl that are no events."""

    path: Path
    events: Sequence[Event]
    unread: int
    busy: bool
    recipe: dict[str, Any]
    lock: dict[str, Any]
    size_bytes: int

    @cached_property
    def lasting(self) -> list[Event]:
        """The events without what the run took back when it diverged."""
        return lasting(self.events)

    @cached_property
    def start(self) -> Started | None:
        return next((e for e in self.events if isinstance(e, Started)), None)

    @cached_property
    def steps(self) -> list[Stepped]:
        return [e for e in self.lasting if isinstance(e, Stepped)]

    @cached_property
    def evaluations(self) -> list[Evaluated]:
        return [e for e in self.lasting if isinstance(e, Evaluated)]

    @cached_property
    def samples(self) -> dict[str, list[Sampled]]:
        """The answers to each prompt, in the order of steps."""
        found: dict[str, list[Sampled]] = {}
        for event in self.lasting:
            if isinstance(event, Sampled):
                found.setdefault(event.prompt, []).append(event)
        return found

    @cached_property
    def notes(self) -> list[str]:
        """Each note once: a resumed run says most of them again."""
        said = [e.message for e in self.events if isinstance(e, Noted)]
        said += [f"restart {e.restart}: {restart_sentence(e)}" for e in self.events if isinstance(e, Restarted)]
        said += [f"step {e.step}: {rolled_back_sentence(e)}" for e in self.events if isinstance(e, RolledBack)]
        said += [f"step {e.step}: {overfitting_sentence(e)}" for e in self.lasting if isinstance(e, Overfitted)]
        said += (
            [f"{self.unread} of the lines in events.jsonl cannot be read, as a kill may leave one"]
            if self.unread > self.busy
            else []
        )
        return list(dict.fromkeys(said))

    @cached_property
    def left_out(self) -> list[str]:
        return list(dict.fromkeys(row for e in self.events if isinstance(e, LeftOutRows) for row in e.rows))

    @property
    def end(self) -> Finished | None:
        """How the run ended; None where it goes on or was killed."""
        last = self.events[-1] if self.events else None
        return last if isinstance(last, Finished) else None

    @property
    def state(self) -> str:
        """finished, stopped early, interrupted, running, or unfinished: killed or failed."""
        if self.busy and self.end is None:
            return "running"
        return _ENDS[self.end.reason] if self.end else "unfinished"

    @property
    def step(self) -> int:
        return self.steps[-1].step if self.steps else 0

    @property
    def best(self) -> Evaluated | None:
        """The evaluation with the lowest loss after step 0."""
        judged = [e for e in self.evaluations if e.step and e.loss is not None]
        return min(judged, key=lambda e: e.loss or 0.0, default=None)

    @property
    def seconds(self) -> float:
        """How long the run took, as far as its events tell."""
        if self.end:
            return self.end.seconds
        return sum(e.seconds for e in self.steps) + sum(e.seconds for e in self.evaluations)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the rows, prompts included and padding not, over all steps."""
        seconds = sum(e.seconds for e in self.steps)
        return sum(e.tokens for e in self.steps) / seconds if seconds else None

    def summary(self) -> dict[str, Any]:
        """The run in a few values; losses in nats a trained token."""
        losses = [e.loss for e in self.steps if e.loss is not None]
        return {
            "path": str(self.path),
            "model": self.start.model if self.start else self.recipe.get("model"),
            "state": self.state,
            "step": self.step,
            "total_steps": self.start.total_steps if self.start else None,
            "loss": losses[-1] if losses else None,
            "best_valid_loss": self.best.loss if self.best else None,
            "best_step": self.best.step if self.best else None,
            "adapter_step": self.end.adapter_step if self.end else None,
            "started": self.start.time if self.start else None,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": max((e.peak_bytes for e in self.steps), default=None),
            "skipped_steps": sum(e.skipped for e in self.steps),
            "size_bytes": self.size_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole run: the summary, the settings, and every step, evaluation, sample and note."""
        return self.summary() | {
            "ledger": self.start.ledger if self.start else None,
            "notes": self.notes,
            "left_out": self.left_out,
            "evaluations": [asdict(e) for e in self.evaluations],
            "samples": [asdict(e) for answers in self.samples.values() for e in answers],
            "steps": [asdict(e) for e in self.steps],
            "settings": self.recipe,
            "lock": self.lock,
        }


def read_run(path: Path) -> History:
    """The history of a run folder. Raises InputRefused where the folder holds no run."""
    import json

    import yaml

    folder = RunFolder(path)
    if not is_run(path):
        raise InputRefused(
            f"{path}: there is no run in this folder", "`mlxsft runs FOLDER` lists those below a folder."
        )
    try:
        events, unread = read_events(folder.events)
        recipe = yaml.safe_load(folder.recipe.read_text(encoding="utf-8")) if folder.recipe.exists() else {}
        lock = json.loads(folder.lock.read_text(encoding="utf-8")) if folder.lock.exists() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputRefused(f"{path}: this run cannot be read: {str(error).splitlines()[0]}") from error
    size = sum(_size(file) for file in path.rglob("*"))
    return History(path, events, unread, folder.busy, _mapping(recipe), _mapping(lock), size)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in a folder and up to DEPTH levels below it, by name. Raises InputRefused for no folder."""
    if not folder.is_dir():
        raise InputRefused(f"{folder}: there is no such folder")
    for place, below, _ in os.walk(folder):
        path = Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if is_run(path):
            yield path
            below.clear()
        elif len(path.relative_to(folder).parts) >= DEPTH:
            below.clear()


def is_run(path: Path) -> bool:
    return (path / "events.jsonl").is_file() or ((path / "recipe.yaml").is_file() and (path / "lock.json").is_file())


def thinned(values: Sequence[tuple[int, float]], most: int) -> list[Point]:
    """At most `most` points, each of equally many neighbouring (step, value) pairs."""
    size = max(1, -(-len(values) // most))
    points = []
    for first in range(0, len(values), size):
        steps, numbers = zip(*values[first : first + size], strict=True)
        points.append(Point(sum(steps) / len(steps), sum(numbers) / len(numbers), min(numbers), max(numbers)))
    return points


def share_of_points(run: History, runs: Sequence[History], most: int) -> int:
    """How many of `most` points the curve of this run has, so that a point stands for as many steps in all runs."""
    longest = max(len(other.steps) for other in runs)
    return max(1, -(-most * len(run.steps) // longest)) if longest else 1


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size if file.is_file() else 0
    except OSError:  # a checkpoint that is dropped at this moment
        return 0


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
