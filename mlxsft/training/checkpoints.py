"""The run folder: what a run leaves on disk, written so that a kill at any moment loses nothing that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import (
    CONFIG,
    WEIGHTS,
    atomic_write,
    load_adapter,
    refuse_non_finite,
    save_adapter,
    sync_folder,
    writing,
)
from mlxsft.training.events import Event, Finished, Restarted, Started, Stepped, read_events

Tensors = Mapping[str, np.ndarray]
Which = Literal["best", "last"]  # adapter is the run's: `save.adapter`

# What reading a damaged checkpoint raises.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything, beside the tensors, that it needs to go on exactly as if it had not stopped."""

    step: int = 0
    trained_tokens: int = 0
    tokens: int = 0  # of the rows, with their prompts
    computed_tokens: int = 0  # with the padding
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    first_loss: float | None = None  # of the first step that was not skipped, in nats a token
    rate_factor: float = 1.0  # 0.5 once the run has diverged and gone back
    seconds: float = 0.0
    valid_loss_before: float | None = None  # that of step 0
    best_valid_loss: float | None = None  # of the steps after
    best_step: int | None = None
    evaluations: int = 0  # after step 0
    evaluations_since_best: int = 0
    evaluated_at: int | None = None  # the step of the last evaluation
    trunk_cached: bool | None = None  # whether the run has a trunk cache; None: not decided


@dataclass(frozen=True)
class Checkpoint:
    """A saved state whose manifest verified."""

    folder: Path
    progress: Progress
    adapter: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]


@dataclass(frozen=True)
class Begun:
    """How far the run in a folder is, as its files say without their hashes being looked at."""

    step: int | None  # that is saved; None: none is
    total_steps: int | None  # None: it was stopped before it began to train
    finished: bool

    @property
    def sentence(self) -> str:
        """How far it is, as a clause."""
        if self.finished:
            return "it is finished"
        of = "" if self.total_steps is None else f" of {self.total_steps}"
        return "nothing of it is saved yet" if self.step is None else f"step {self.step}{of} is saved"


class RunFolder:
    """`runs/NAME`: recipe, lock, events, adapter and checkpoints of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.lock = path / "lock.json"
        self.events = path / "events.jsonl"
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def held(self) -> Iterator[None]:
        """The folder for one process alone. Raises UsageError when another run is at work in it."""
        lock = FileLock(self.path / ".lock")
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise self._taken() from None
        try:
            self._remove_partial()
            yield
        finally:
            self._remove_unused()  # before another run can take the lock in it
            lock.release()

    def _remove_partial(self) -> None:
        """Files that a killed run was writing."""
        for leftover in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def _remove_unused(self) -> None:
        """The folder itself, where no run came about."""
        with suppress(OSError):
            if [p.name for p in self.path.iterdir()] in ([".lock"], []):
                shutil.rmtree(self.path)

    @property
    def busy(self) -> bool:
        """Whether a run is at work in the folder."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with FileLock(self.path / ".lock").acquire(timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a folder that cannot be written to
            return False

    def refuse_busy(self) -> None:
        """Returns where no run is at work in the folder. Raises UsageError where one is."""
        if self.busy:
            raise self._taken()

    def _taken(self) -> UsageError:
        return UsageError(f"{self.path}: another run is at work in this folder", "Wait for it, or give another --out.")

    @property
    def begun(self) -> bool:
        return self.recipe.exists() or self.checkpoints.exists()

    def state(self) -> Begun | None:
        """How far the run in this folder is; None where there is none."""
        if not self.begun:
            return None
        events, _ = read_events(self.events)
        total = next((e.total_steps for e in reversed(events) if isinstance(e, Started)), None)
        last = events[-1] if events else None
        finished = isinstance(last, Finished) and last.reason != "interrupted"
        return Begun(max(self.steps(), default=None), total, finished)

    def clear(self) -> None:
        """Remove what an earlier run left; anything else in the folder stays."""
        for name in ("recipe.yaml", "lock.json", "events.jsonl", "card.json", "card.html", WEIGHTS, CONFIG):
            (self.path / name).unlink(missing_ok=True)
        for name in ("checkpoints", "tensorboard", "wandb", "mlflow"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def write_start(self, recipe_yaml: str, lock: Mapping[str, Any]) -> None:
        """What the run is and stands on, where it is not there yet; the recipe last: with it the run has begun."""
        lock_json = json.dumps(lock, indent=2, ensure_ascii=False) + "\n"
        for path, text in ((self.lock, lock_json), (self.recipe, recipe_yaml)):
            if not path.exists() or path.read_bytes() != text.encode():
                atomic_write(path, text.encode())

    def read_lock(self) -> dict[str, Any]:
        """What the run began with. Raises InputRefused for a lock.json that cannot be read."""
        try:
            lock: object = json.loads(self.lock.read_text(encoding="utf-8"))
            if not isinstance(lock, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise InputRefused(f"{self.lock}: it cannot be read: {error}", "Begin anew with --force.") from error
        return lock

    def append(self, event: Event) -> None:
        with writing(self.events), self.events.open("a", encoding="utf-8") as file:
            file.write(event.to_json() + "\n")

    def rewind(self, step: int) -> None:
        """Take back the events behind `step`, which a resumed run makes again, and a line that a kill cut off.

        A run that rolled back made some steps twice; only the last time counts. What is told of restarts stays.
        """
        events, _ = read_events(self.events)
        made = max(
            (i for i, event in enumerate(events) if isinstance(event, Stepped) and event.step == step), default=-1
        )
        kept = [
            event
            for i, event in enumerate(events)
            if i <= made or isinstance(event, Restarted) or getattr(event, "step", 0) <= step
        ]
        text = "".join(f"{event.to_json()}\n" for event in kept).encode()
        if events and text != self.events.read_bytes():
            atomic_write(self.events, text)

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(
        self,
        adapter: Tensors,
        config: Mapping[str, Any],
        optimizer: Tensors,
        progress: Progress,
        *,
        keep: int,
        planned: Callable[[int], bool] = lambda step: True,
        which: Which = "best",
    ) -> Path:
        """Write a checkpoint aside, make it whole, then give it its name; replace the run's adapter; drop old ones.

        The run's adapter is replaced where this step's is the one (`which`); an untrained one, of step 0, never is.
        What an interrupted run saves between the `planned` steps never takes the place of a planned checkpoint, so that
        the resumed run can roll back to where the uninterrupted one would. Raises Diverged for a tensor that is not
        finite, OutOfResources when the disk is full.
        """
        target = self._folder(progress.step)
        refuse_non_finite(target, {**adapter, **optimizer})
        self._write(target, {WEIGHTS: _bytes(adapter), "state.safetensors": _bytes(optimizer)}, progress)
        if progress.step and adapter_step(progress, which) == progress.step:
            save_adapter(self.path, adapter, config)
        self.drop_old(keep, planned)
        return target

    def drop_old(self, keep: int, planned: Callable[[int], bool]) -> None:
        """Remove all checkpoints but the newest and the newest planned ones, `keep` of each, and the best of each.

        The best is kept of every one of them, because the run may go back to it.
        """
        steps = self.steps()
        kept = {*steps[:keep], *[step for step in steps if planned(step)][:keep]}
        kept |= {self._best_at(step) for step in kept}
        for step in steps:
            if step not in kept:
                self._drop(step)

    def _best_at(self, step: int) -> int:
        """The step of the best evaluation up to this checkpoint; the checkpoint itself where it does not tell."""
        try:
            best = _facts(self._folder(step))["progress"]["best_step"]
        except _DAMAGE:
            return step
        return step if best is None else int(best)

    def _write(self, target: Path, files: dict[str, bytes], progress: Progress) -> None:
        files = {**files, "manifest.json": _manifest(files, progress)}
        aside = self.checkpoints / f".{target.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        with writing(target):
            try:
                aside.mkdir(parents=True)
                for name, data in files.items():
                    atomic_write(aside / name, data)
                self._drop(progress.step)
                os.replace(aside, target)
                sync_folder(self.checkpoints)
            finally:
                shutil.rmtree(aside, ignore_errors=True)  # of a full disk, every byte counts

    def _drop(self, step: int) -> None:
        """Remove a checkpoint: in one step, so that no half of it is left to be found."""
        gone = self.checkpoints / f".step-{step:07d}.gone"
        with suppress(FileNotFoundError):
            os.replace(self._folder(step), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def go_back(self, checkpoint: Checkpoint | None, config: Mapping[str, Any], which: Which = "best") -> list[str]:
        """Remove the checkpoints behind this one (all, where it is None); the run's adapter is what it was then.

        A sentence where the best adapter is lost: the run's is then that of this checkpoint.
        """
        for step in self.steps():
            if checkpoint is None or step > checkpoint.progress.step:
                self._drop(step)
        if checkpoint is None or not checkpoint.progress.step:
            for name in (WEIGHTS, CONFIG):
                (self.path / name).unlink(missing_ok=True)
            return []
        chosen, lost = self.chosen(checkpoint, which)
        if not self.has_adapter_of(chosen, config):
            save_adapter(self.path, chosen.adapter, config)
        return lost

    # --- loading ---------------------------------------------------------------------------------------------------

    def newest(self, among: Callable[[int], bool] = lambda step: True) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint `among` the steps that verifies, and a sentence for each newer one that does not."""
        refused: list[str] = []
        for step in filter(among, self.steps()):
            try:
                return _load(self._folder(step)), refused
            except _DAMAGE as error:
                refused.append(f"checkpoint {self._folder(step).name} is damaged and passed over: {_what(error)}")
        return None, refused

    def chosen(self, checkpoint: Checkpoint, which: Which) -> tuple[Checkpoint, list[str]]:
        """The checkpoint whose adapter was the run's at the state of this one; this one, and a sentence, if it is lost.

        The adapter of the best evaluation lies in its checkpoint, because a later one may be taken back.
        """
        step = adapter_step(checkpoint.progress, which)
        if step == checkpoint.progress.step:
            return checkpoint, []
        try:
            return _load(self._folder(step)), []
        except _DAMAGE as error:
            return checkpoint, [
                f"the adapter of step {step}, the best so far, is lost ({_what(error)}); the run's adapter is that of "
                f"step {checkpoint.progress.step} until the next evaluation"
            ]

    def has_adapter_of(self, checkpoint: Checkpoint, config: Mapping[str, Any] | None = None) -> bool:
        """Whether the run's adapter is there and that of the checkpoint, with this `config` where one is given."""
        try:
            adapter = load_adapter(self.path)
        except InputRefused:
            return False
        if adapter.tensors.keys() != checkpoint.adapter.keys() or config not in (None, adapter.config):
            return False
        return all(np.array_equal(tensor, checkpoint.adapter[name]) for name, tensor in adapter.tensors.items())

    def steps(self) -> list[int]:
        """The steps that are saved, the newest first."""
        names = (p.name.removeprefix("step-") for p in self.checkpoints.glob("step-*"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _folder(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:07d}"


def adapter_step(progress: Progress, which: Which) -> int:
    """The step whose adapter is the run's: that of the best evaluation, else the newest."""
    return progress.best_step if which == "best" and progress.best_step is not None else progress.step


def _bytes(tensors: Tensors) -> bytes:
    """The tensors as safetensors, which writes memory as it lies: a transposed view would come out scrambled."""
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def _manifest(files: Mapping[str, bytes], progress: Progress) -> bytes:
    """What the checkpoint holds and how far it is, with the hash of every file and of this text itself."""
    facts = {"progress": asdict(progress), "sha256": {name: _sha256(data) for name, data in files.items()}}
    return (json.dumps({**facts, "manifest_sha256": _sha256(_canonical(facts))}, indent=2) + "\n").encode()


def _canonical(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _what(error: Exception) -> str:
    """What is wrong with a checkpoint that raised this when it was loaded."""
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    return f"manifest.json is none of ours ({error!r})" if isinstance(error, (KeyError, TypeError)) else str(error)


def _load(folder: Path) -> Checkpoint:
    """The checkpoint, of which every bit was hashed. Raises what _DAMAGE lists."""
    facts = _facts(folder)
    read = {name: (folder / name).read_bytes() for name in facts["sha256"]}
    for name, data in read.items():
        if _sha256(data) != facts["sha256"][name]:
            raise ValueError(f"{name} does not match its hash")
    return Checkpoint(folder, Progress(**facts["progress"]), load(read[WEIGHTS]), load(read["state.safetensors"]))


def _facts(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which agrees with its own hash. Raises what _DAMAGE lists."""
    facts: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if facts.pop("manifest_sha256", None) != _sha256(_canonical(facts)):
        raise ValueError("manifest.json does not match its hash")
    return facts
