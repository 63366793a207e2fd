"""The run folder: what a run leaves on disk, written so that a kill at any moment loses nothing that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import atomic_write, refuse_non_finite, save_adapter, writing
from mlxsft.training.events import Event, Restarted, from_json

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Progress:
    """How far a run is: everything, beside the tensors, that it needs to go on exactly as if it had not stopped."""

    step: int = 0
    trained_tokens: int = 0
    tokens: int = 0  # of the rows, with their prompts
    computed_tokens: int = 0  # with the padding
    skipped_steps: int = 0
    seconds: float = 0.0
    best_valid_loss: float | None = None
    evaluations_since_best: int = 0
    evaluated_at: int | None = None  # the step of the last evaluation


@dataclass(frozen=True)
class Checkpoint:
    """A saved state whose manifest verified."""

    folder: Path
    progress: Progress
    adapter: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]


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
                raise UsageError(f"{self.path}: another run is at work in this folder", "Give another --out.") from None
        try:
            self._remove_partial()
            yield
        finally:
            lock.release()
            self._remove_unused()

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
    def begun(self) -> bool:
        return self.recipe.exists() or self.checkpoints.exists()

    def clear(self) -> None:
        """Remove what an earlier run left; anything else in the folder stays."""
        for name in ("recipe.yaml", "lock.json", "events.jsonl", "adapters.safetensors", "adapter_config.json"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def write_start(self, recipe_yaml: str, lock: Mapping[str, Any]) -> None:
        atomic_write(self.recipe, recipe_yaml.encode())
        atomic_write(self.lock, (json.dumps(lock, indent=2, ensure_ascii=False) + "\n").encode())

    def read_lock(self) -> dict[str, Any]:
        """What the run began with. Raises InputRefused for a lock.json that cannot be read."""
        try:
            lock: dict[str, Any] = json.loads(self.lock.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputRefused(f"{self.lock}: it cannot be read: {error}", "Begin anew with --force.") from error
        return lock

    def append(self, event: Event) -> None:
        with writing(self.events), self.events.open("a", encoding="utf-8") as file:
            file.write(event.to_json() + "\n")

    def rewind(self, step: int) -> None:
        """Take back the events after `step`, which a resumed run makes again, and a line that a kill cut off.

        What is told of restarts stays.
        """
        if not self.events.exists():
            return
        kept = []
        for line in self.events.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                event = from_json(line)
                if isinstance(event, Restarted) or getattr(event, "step", 0) <= step:
                    kept.append(f"{line}\n")
        atomic_write(self.events, "".join(kept).encode())

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(
        self, adapter: Tensors, config: Mapping[str, Any], optimizer: Tensors, progress: Progress, *, keep: int
    ) -> Path:
        """Write a checkpoint aside, make it whole, then give it its name; replace the run's adapter; drop old ones.

        Raises Diverged for a tensor that is not finite, OutOfResources when the disk is full.
        """
        target = self.checkpoints / f"step-{progress.step:07d}"
        refuse_non_finite(target, {**adapter, **optimizer})
        aside = self.checkpoints / f".{target.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        files = {"adapters.safetensors": _bytes(adapter), "state.safetensors": _bytes(optimizer)}
        hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        manifest = {"progress": asdict(progress), "sha256": hashes}
        files["manifest.json"] = (json.dumps(manifest, indent=2) + "\n").encode()
        with writing(target):
            aside.mkdir(parents=True)
            for name, data in files.items():
                atomic_write(aside / name, data)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(aside, target)
        save_adapter(self.path, adapter, config)
        for old in self._names()[keep:]:
            shutil.rmtree(self.checkpoints / old, ignore_errors=True)
        return target

    # --- loading ---------------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and a sentence for each newer one that does not."""
        refused: list[str] = []
        for name in self._names():
            try:
                return _load(self.checkpoints / name), refused
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                refused.append(f"checkpoint {name} is damaged ({error}); the one before is taken")
        return None, refused

    def _names(self) -> list[str]:
        """Names of the checkpoints, the newest first."""
        return sorted((p.name for p in self.checkpoints.glob("step-*")), reverse=True)


def _bytes(tensors: Tensors) -> bytes:
    """The tensors as safetensors, which writes memory as it lies: a transposed view would come out scrambled."""
    return save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})


def _load(folder: Path) -> Checkpoint:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name, expected in manifest["sha256"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{name} does not match its hash")
    return Checkpoint(
        folder,
        Progress(**manifest["progress"]),
        load_file(folder / "adapters.safetensors"),
        load_file(folder / "state.safetensors"),
    )
