"""A whole run: from a recipe to a run folder, as the events that happen on the way."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxsft import __version__
from mlxsft.backends import Backend, join_ranks, load_backend
from mlxsft.chat.generate import Sampling, answer_text
from mlxsft.data.dataset import Dataset, data_hashes, load_dataset
from mlxsft.data.formats import Turn
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe import Recipe, dump_recipe
from mlxsft.training.checkpoints import Checkpoint, Progress, RunFolder
from mlxsft.training.events import Event, LeftOutRows, Noted, Restarted, Saved, Started
from mlxsft.training.loop import Plan, Training
from mlxsft.training.packing import packs
from mlxsft.training.ranks import put_back, refuse_another_run

SAMPLE_TOKENS = 128  # of an answer to a prompt of eval.samples


def run_training(
    recipe: Recipe,
    folder: RunFolder,
    *,
    backend_name: str,
    resume: bool,
    force: bool,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
    restarted: Restarted | None = None,
    plugged_in: Callable[[], bool] = lambda: True,
) -> Iterator[Event]:
    """Everything that `mlxsft train` does, as events; the same events are in the folder's events.jsonl.

    An earlier run is deleted only when all that the new one needs is read and in memory. `tell` hears of downloads.
    `restarted` says why this process takes over a run (the step is filled in); no step begins while `plugged_in()` is
    False. Raises UsageError where the folder holds a run and neither `resume` nor `force` is given, or when what is
    resumed is not what was begun; else what reading, loading and training raise.
    """
    ranks = join_ranks()
    first = ranks.rank == 0  # which alone reads and writes the folder
    with folder.held() if first else nullcontext():
        if first:
            _check_begun(folder, resume=resume, force=force)
        source = open_model(recipe.model, revision=recipe.revision, progress=tell)
        recipe = recipe.model_copy(update={"revision": source.commit or recipe.revision})
        renderer = load_renderer(source, recipe.data.template)
        dataset = load_dataset(recipe.data, renderer, seed=recipe.train.seed)
        lock = _lock(recipe, source, renderer)
        checkpoint = None
        refuse_another_run(ranks, recipe, lock)
        if resume and first:
            _check_same(folder, recipe, lock)
            checkpoint, damaged = folder.newest()
            dataset.notes.extend(damaged)
        backend = load_backend(backend_name, source)
        backend.ranks = ranks
        backend.attach(recipe.adapter, recipe.train.seed)
        backend.optimize(recipe.train)
        packed, note = packs(backend, recipe.train, dataset.train, renderer.positions)
        dataset.notes.extend(note)
        if first and resume:
            folder.rewind(checkpoint.progress.step if checkpoint else -1)
        elif first:
            folder.clear()
            folder.write_start(dump_recipe(recipe), lock)
        ready = Ready(
            recipe, folder, source, renderer, dataset, backend, checkpoint, lock, stop, packed, restarted, plugged_in
        )
        for event in ready.events():
            if first:
                folder.append(event)
            yield event


@dataclass(frozen=True)
class Ready:
    """A run whose rows are read and whose model is in memory."""

    recipe: Recipe
    folder: RunFolder
    source: ModelSource
    renderer: Renderer
    dataset: Dataset
    backend: Backend
    checkpoint: Checkpoint | None
    lock: Mapping[str, Any]
    stop: Callable[[], bool]
    packed: bool
    restarted: Restarted | None
    plugged_in: Callable[[], bool]

    def events(self) -> Iterator[Event]:
        progress = put_back(self.backend, self.checkpoint)
        if self.restarted is not None:
            yield replace(self.restarted, step=progress.step)
        yield self._started(progress)
        for note in [*self.renderer.notes, *self.dataset.notes, *self.backend.notes]:
            yield Noted(note)
        if self.dataset.left_out:
            yield LeftOutRows([str(row) for row in self.dataset.left_out])
        yield from self._training(progress).events()

    def _training(self, progress: Progress) -> Training:
        return Training(
            self.backend,
            self.recipe,
            self.dataset.train,
            self.dataset.valid,
            progress,
            save=self._save,
            answer=self._answer,
            stop=self.stop,
            positions=self.renderer.positions,
            packed=self.packed,
            plugged_in=self.plugged_in,
        )

    def _save(self, progress: Progress) -> Event:
        if self.backend.ranks.rank > 0:
            return Saved(progress.step, "")  # by rank 0, whose state is the same
        state, optimizer = self.backend.adapter_state(), self.backend.optimizer_state()
        config = {**self.backend.adapter_config(), "mlxsft": passport(self.renderer, self.lock)}
        path = self.folder.save(state, config, optimizer, progress, keep=self.recipe.save.keep)
        return Saved(progress.step, str(path))

    def _answer(self, prompt: str) -> str:
        turns = [Turn("user", prompt)]
        return answer_text(self.backend, self.renderer, turns, Sampling(), SAMPLE_TOKENS, stop=self.stop)

    def _started(self, progress: Progress) -> Started:
        plan = Plan.of(self.recipe, len(self.dataset.train))
        total, trainable = self.backend.parameters()
        return Started(
            model=self.source.name,
            backend=self.backend.name,
            device=self.backend.device,
            ranks=self.backend.ranks.count,
            step=progress.step,
            total_steps=plan.total_steps,
            epochs=plan.total_steps / plan.steps_per_epoch,
            parameters=total,
            trainable_parameters=trainable,
            ledger=self.dataset.ledger,
            template=self.renderer.template.name,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _check_begun(folder: RunFolder, *, resume: bool, force: bool) -> None:
    if resume and not folder.begun:
        raise UsageError(f"{folder.path}: there is no run to resume in this folder", "Leave out --resume to begin one.")
    if folder.begun and not resume and not force:
        raise UsageError(
            f"{folder.path}: this folder holds a run already",
            "--resume goes on with it, --force begins anew and deletes it, another --out leaves it alone.",
        )


def _lock(recipe: Recipe, source: ModelSource, renderer: Renderer) -> dict[str, Any]:
    """What the run stands on: hashes of base, template and rows, and versions."""
    packages = ("mlx", "mlx-lm", "transformers", "torch", "numpy")
    versions = {"mlxsft": __version__, "python": platform.python_version()}
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    return {
        "base": {"name": source.name, "commit": source.commit, "sha256": source.hashes()},
        "template": {"name": renderer.template.name, "sha256": renderer.template.sha256},
        "data": data_hashes(recipe.data),
        "versions": versions | {p: metadata.version(p) for p in packages if p in installed},
    }


def _check_same(folder: RunFolder, recipe: Recipe, lock: Mapping[str, Any]) -> None:
    """Raises UsageError or InputRefused, with the differences, when a resumed run would not be the run that began."""
    changed = "; ".join(sorted(_settings(folder.recipe.read_text(encoding="utf-8")) ^ _settings(dump_recipe(recipe))))
    if changed:
        raise UsageError(
            f"{folder.recipe}: the recipe is not the one that this run began with: {changed}",
            f"Resume with {folder.recipe}, or begin a new run with another --out.",
        )
    then = folder.read_lock()
    changed_parts = [part for part in ("base", "template", "data") if then.get(part) != lock[part]]
    if changed_parts:
        raise InputRefused(
            f"{folder.lock}: changed since the run began: {', '.join(changed_parts)}",
            "Restore it, or begin a new run with another --out.",
        )


def _settings(recipe_yaml: str) -> set[str]:
    """The lines of a recipe, without the one setting that changes memory and not the result."""
    lines = (line.strip() for line in recipe_yaml.splitlines())
    return {line for line in lines if not line.startswith("micro_batch_tokens:")}


def passport(renderer: Renderer, lock: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter says about itself: what it was made on, and the template that its answers expect."""
    template = renderer.template
    return {
        "version": __version__,
        "base": lock["base"],
        "data": {Path(file).name: sha256 for file, sha256 in lock["data"].items()},  # no paths of this machine
        "template": {"name": template.name, "text": template.text, "sha256": template.sha256},
        "end_tokens": sorted(renderer.end_tokens),
    }
