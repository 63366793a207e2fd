"""A whole run: from a recipe to a run folder, as the events that happen on the way."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from mlxsft import __version__
from mlxsft.backends import Backend, join_ranks, load_backend
from mlxsft.chat.generate import Sampling, answer_text
from mlxsft.data.dataset import Dataset, data_hashes, load_dataset
from mlxsft.data.formats import Turn
from mlxsft.data.hub import address_of
from mlxsft.data.render import Example, Renderer, load_renderer
from mlxsft.data.sources import pin_recipe
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import refuse_non_finite
from mlxsft.models.passport import base_facts, without_folders
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe import Recipe, dump_recipe
from mlxsft.training.checkpoints import Checkpoint, Progress, RunFolder
from mlxsft.training.events import Event, Finished, LeftOutRows, Noted, Restarted, Saved, Started, read_events
from mlxsft.training.loop import Plan, Training
from mlxsft.training.overfitting import Overfitting
from mlxsft.training.packing import packs
from mlxsft.training.ranks import any_of, put_back, refuse_another_run, said_by_first
from mlxsft.training.resume import check_same, versions_changed
from mlxsft.training.trackers import Trackers, refuse_missing
from mlxsft.training.trunk import TrunkCache

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
    allow_changes: Sequence[str] = (),
    restarted: Restarted | None = None,
    plugged_in: Callable[[], bool] = lambda: True,
) -> Iterator[Event]:
    """Everything that `mlxsft train` does, as events; the same events are in the folder's events.jsonl.

    An earlier run is deleted only when all that the new one needs is read and in memory. `tell` hears of downloads.
    `restarted` says why this process takes over a run (the step is filled in); no step begins while `plugged_in()` is
    False. Raises UsageError where the folder holds a run and neither `resume` nor `force` is given, or when what is
    resumed is not what was begun, but for `allow_changes`; else what reading, loading and training raise.
    """
    ranks = join_ranks()
    first = ranks.rank == 0  # which alone reads and writes the folder
    if first:
        refuse_missing(recipe.report)
    with folder.held() if first else nullcontext():
        if first:
            _check_begun(folder, resume=resume, force=force)
        before = said_by_first(ranks, folder.read_lock() if first and resume else {})
        source, recipe, commits = _pinned(recipe, before, tell)
        refuse_beyond_memory(source.name, source.weight_bytes)
        renderer = load_renderer(source, recipe.data.template)
        dataset = load_dataset(recipe.data, renderer, seed=recipe.train.seed)
        lock = _lock(recipe, source, renderer, commits)
        refuse_another_run(ranks, recipe, lock)
        checkpoint, ended = None, None
        if first and resume:
            checkpoint, notes = _resumed(folder, recipe, lock, allow_changes)
            dataset.notes.extend(notes)
            if (ended := _already_ended(folder, recipe, dataset, checkpoint)) is not None:
                yield from map(Noted, [*notes, ended])
        if any_of(ranks, ended is not None):
            return
        backend = load_backend(backend_name, source, stored=recipe.train.base_dtype == "stored")
        if ranks.count > 1 and backend.name != "mlx":
            raise UsageError(
                f"several ranks train on MLX only, and this is the {backend.name} backend",
                "Add --backend mlx, or leave out --ranks and --hosts.",
            )
        backend.ranks = ranks
        backend.attach(recipe.adapter, recipe.train.seed)
        backend.optimize(recipe.train)
        packed, note = packs(backend, recipe.train, dataset.train, renderer.positions)
        dataset.notes.extend(note)
        if first:
            folder.rewind(checkpoint.progress.step if checkpoint else -1) if resume else folder.clear()
            if restarted is None:  # which computes less at once than the person asked for
                folder.write_start(dump_recipe(recipe), lock)
        ready = Ready(
            recipe, folder, source, renderer, dataset, backend, checkpoint, lock, stop, packed, restarted, plugged_in
        )
        yield from _watched(ready.events(), folder, recipe) if first else ready.events()


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
        loaded, lost = self._load(self.checkpoint)
        progress = loaded or Progress()
        if self.backend.ranks.rank == 0:
            self.folder.drop_old(self.recipe.save.keep, self._planned)
        if self.restarted is not None:
            yield replace(self.restarted, step=progress.step)
        yield self._started(progress)
        for note in [*self.renderer.notes, *self.dataset.notes, *self.backend.notes, *lost]:
            yield Noted(note)
        if self.dataset.left_out:
            yield LeftOutRows([str(row) for row in self.dataset.left_out])
        cache = self._trunk_cache(progress.trunk_cached)
        plan = Plan.of(self.recipe, len(self.dataset.train))
        repeated = plan.total_steps > plan.steps_per_epoch
        yield from cache.fill([self.dataset.train, self.dataset.valid], repeated=repeated, stop=self.stop)
        progress = replace(progress, trunk_cached=cache.decided)
        yield from self._training(progress, *cache.rows, saved=loaded is not None).events()

    def _trunk_cache(self, decided: bool | None) -> TrunkCache:
        train, positions = self.recipe.train, self.renderer.positions
        here = self.folder.path.exists()  # other hosts do not have it
        folder = self.folder.path if here else Path(tempfile.gettempdir())
        return TrunkCache(self.backend, train.cache_trunk, folder, train.micro_batch_tokens, positions, decided)

    def _training(
        self, progress: Progress, rows: Sequence[Example], held_out: Sequence[Example], *, saved: bool
    ) -> Training:
        return Training(
            self.backend,
            self.recipe,
            rows,
            held_out,
            progress,
            save=self._save,
            go_back=self._go_back,
            answer=self._answer,
            stop=self.stop,
            positions=self.renderer.positions,
            packed=self.packed,
            saved_at=progress.step if saved else None,
            plugged_in=self.plugged_in,
        )

    def _save(self, progress: Progress) -> Event:
        state, optimizer = self.backend.adapter_state(), self.backend.optimizer_state()
        if self.backend.ranks.rank > 0:  # rank 0 has the same state and writes it
            refuse_non_finite(self.folder.path, {**state, **optimizer})
            return Saved(progress.step, "")
        save = self.recipe.save
        path = self.folder.save(
            state, self._config(), optimizer, progress, keep=save.keep, planned=self._planned, which=save.adapter
        )
        return Saved(progress.step, str(path))

    def _planned(self, step: int) -> bool:
        """Whether the uninterrupted run saves after this step."""
        return Plan.of(self.recipe, len(self.dataset.train)).saves(step)

    def _load(self, checkpoint: Checkpoint | None) -> tuple[Progress | None, list[str]]:
        """Models and run folder at rank 0's checkpoint, or at the start, and nothing behind it.

        How far the run is (None: there is no checkpoint), and what the person should know.
        """
        ranks, lost = self.backend.ranks, list[str]()
        progress = put_back(self.backend, checkpoint)
        if ranks.rank == 0:
            lost = self.folder.go_back(checkpoint, self._config(), self.recipe.save.adapter)
        if any_of(ranks, bool(lost)) and progress is not None:
            progress = replace(progress, best_valid_loss=None, best_step=None)
        return progress, lost

    def _go_back(self, step: int) -> tuple[Progress | None, list[str]]:
        """Load the newest checkpoint up to `step`, a planned one if there is any, and drop those behind it."""
        checkpoint: Checkpoint | None = None
        damaged: list[str] = []
        if self.backend.ranks.rank == 0:
            checkpoint, damaged = self.folder.newest(lambda s: s <= step and self._planned(s))
            if checkpoint is None:
                checkpoint, damaged = self.folder.newest(lambda s: s <= step)
        if not any_of(self.backend.ranks, checkpoint is not None):
            return None, damaged
        progress, lost = self._load(checkpoint)
        return progress, [*damaged, *lost]

    def _config(self) -> dict[str, Any]:
        """What adapter_config.json says."""
        return {**self.backend.adapter_config(), "mlxsft": passport(self.source, self.renderer, self.recipe, self.lock)}

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


def _watched(events: Iterable[Event], folder: RunFolder, recipe: Recipe) -> Iterator[Event]:
    """The events, written down, with what is to be said about them; events before a resume are seen first."""
    overfitting = Overfitting()
    past, _ = read_events(folder.events)
    for event in past:
        overfitting.see(event)
    with Trackers(recipe.report, folder.path, recipe.model_dump(mode="json"), past) as trackers:
        for event in events:
            before = trackers.close(event.reason) if isinstance(event, Finished) else ()  # the end stays the last event
            for told in chain(before, [event], overfitting.see(event), trackers.see(event)):
                folder.append(told)
                yield told


def _pinned(
    recipe: Recipe, before: Mapping[str, Any], tell: Callable[[str], None]
) -> tuple[ModelSource, Recipe, dict[str, str]]:
    """Base and recipe, with the commits that they stand for: those of the lock before, since a branch may have moved.

    The commits of the data sets come by the addresses that were written.
    """
    revision = recipe.revision or before.get("base", {}).get("commit")
    source = open_model(recipe.model, revision=revision, progress=tell)
    data, commits = pin_recipe(recipe.data, before.get("hub", {}), tell)
    return source, recipe.model_copy(update={"revision": source.commit or revision, "data": data}), commits


def _check_begun(folder: RunFolder, *, resume: bool, force: bool) -> None:
    if resume and not folder.begun:
        raise UsageError(f"{folder.path}: there is no run to resume in this folder", "Leave out --resume to begin one.")
    if folder.begun and not resume and not force:
        raise UsageError(
            f"{folder.path}: this folder holds a run already",
            "--resume goes on with it, --force begins anew and deletes it, another --out leaves it alone.",
        )


def _resumed(
    folder: RunFolder, recipe: Recipe, lock: Mapping[str, Any], allow_changes: Sequence[str]
) -> tuple[Checkpoint | None, list[str]]:
    """Where the run goes on (None: from its first step), and what the person should know about that."""
    differences = check_same(folder, recipe, lock, allow_changes)
    checkpoint, notes = folder.newest()
    if checkpoint is None and notes:
        raise InputRefused("\n  ".join([f"{folder.path}: no checkpoint is whole:", *notes]), "--force begins anew.")
    if checkpoint is None:
        notes = ["the run was stopped before its first checkpoint and begins again"]
    elif any(difference.name == "train.learning_rate" for difference in differences):
        checkpoint = replace(checkpoint, progress=replace(checkpoint.progress, rate_factor=1.0))
    notes += [f"changed since the run began: {difference.sentence}" for difference in differences]
    return checkpoint, [*notes, *versions_changed(folder, lock)]


def _already_ended(folder: RunFolder, recipe: Recipe, dataset: Dataset, checkpoint: Checkpoint | None) -> str | None:
    """A sentence where the run is finished and all it made is there, so that there is nothing to load a model for."""
    state, total = folder.state(), Plan.of(recipe, len(dataset.train)).total_steps
    if state is None or not state.finished or checkpoint is None or checkpoint.progress.step != state.step:
        return None
    patience, waited = recipe.eval.patience, checkpoint.progress.evaluations_since_best
    if checkpoint.progress.step < total and (patience is None or waited < patience):
        return None
    chosen, lost = folder.chosen(checkpoint, recipe.save.adapter)
    if lost or not folder.has_adapter_of(chosen):
        return None
    return (
        f"this run is finished, after {state.step} of {total} steps; to train on, raise its length with "
        "--set train.epochs=N --allow-change epochs"
    )


def _lock(recipe: Recipe, source: ModelSource, renderer: Renderer, commits: Mapping[str, str]) -> dict[str, Any]:
    """What the run stands on: hashes of base, template and rows, and versions."""
    packages = ("mlx", "mlx-lm", "transformers", "torch", "numpy")
    versions = {"mlxsft": __version__, "python": platform.python_version()}
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    return {
        "base": {"name": source.name, "commit": source.commit, "sha256": source.hashes()},
        "template": {"name": renderer.template.name, "sha256": renderer.template.sha256},
        "data": {address_of(Path(file)): sha256 for file, sha256 in data_hashes(recipe.data).items()},
        "hub": dict(commits),  # of data sets, by the address that was written
        "versions": versions | {p: metadata.version(p) for p in packages if p in installed},
    }


def passport(source: ModelSource, renderer: Renderer, recipe: Recipe, lock: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapter says about itself: what it was made on and how, and the template that its answers expect."""
    template = renderer.template
    return {
        "version": __version__,
        **base_facts(source, lock["base"]["sha256"]),
        "data": {Path(file).name: sha256 for file, sha256 in lock["data"].items()},  # no paths of this machine
        "template": {"name": template.name, "text": template.text, "sha256": template.sha256},
        "end_tokens": sorted(renderer.end_tokens),
        "recipe": without_folders(recipe.model_dump(mode="json")),
        "versions": lock["versions"],
    }
