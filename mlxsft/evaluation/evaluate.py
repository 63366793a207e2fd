"""A run folder → its card: the base and the tuned model in one memory, asked the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mlxsft import __version__
from mlxsft.backends import load_backend
from mlxsft.chat.generate import Answer
from mlxsft.chat.load import Loaded, load_for_chat
from mlxsft.data.dataset import Dataset, data_hashes, load_dataset
from mlxsft.data.hub import address_of
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.data.sources import files_of
from mlxsft.errors import InputRefused, UsageError
from mlxsft.evaluation import overlap
from mlxsft.evaluation.benchmarks import Scores, refuse_without_lm_eval, scores, side_by_side
from mlxsft.evaluation.card import Card, Findings, verdict, warnings_of
from mlxsft.evaluation.judge import win_shares
from mlxsft.evaluation.measure import Observer, Watch, Work, unwatched
from mlxsft.evaluation.rows import (
    INSTRUCTIONS,
    NONE,
    PROBE,
    Asked,
    RowSet,
    constrained,
    file_set,
    row_set,
    training_texts,
)
from mlxsft.evaluation.rules import RuleBook, read_rules
from mlxsft.models.adapter import WEIGHTS
from mlxsft.models.lock import hash_of
from mlxsft.models.passport import without_folders
from mlxsft.models.sizes import refuse_beyond_memory
from mlxsft.models.source import open_model
from mlxsft.recipe import Recipe, load_recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.history import is_run

TUNED = "tuned"  # the name of the adapter in memory

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What an evaluation is made of, and what bounds its cost."""

    rows: int = 512  # of each set, whose loss is taken
    samples: int = 16  # prompts of each set that are answered
    max_tokens: int = 128  # of an answer
    seed: int = 0
    backend: str = "auto"
    data: Path | None = None  # held-out rows of its own
    rules: Path | None = None
    probe: Path | None = None  # beside the built-in one
    ifeval: Path | None = None  # instead of the built-in prompts
    judge: str | None = None
    benchmarks: tuple[str, ...] = ()  # tasks of lm-eval

    def told(self) -> dict[str, Any]:
        """As a card keeps them: of files the name alone, since their folders are of this machine."""
        values = {name: v.name if isinstance(v, Path) else v for name, v in vars(self).items() if name != "backend"}
        return values | {"benchmarks": list(self.benchmarks) or None}


def evaluate(run: Path, settings: Settings, *, tell: Tell = print, watch: Watch = unwatched) -> Card:
    """The card of a run. Raises InputRefused where the run, its rows, its base or its adapter are not what they were
    when it was trained, or a file given with the settings cannot be taken, UsageError where the run has no adapter.
    """
    folder = RunFolder(run)
    if settings.benchmarks:
        refuse_without_lm_eval()
    if not is_run(run):
        raise InputRefused(f"{run}: there is no run in this folder", "`mlxsft runs FOLDER` lists those below a folder.")
    recipe, lock = load_recipe(folder.recipe), folder.read_lock()
    book = read_rules(settings.rules) if settings.rules else RuleBook()
    loaded = load_for_chat(
        recipe.model,
        {TUNED: run},
        revision=recipe.revision,
        template=recipe.data.template,
        backend_name=settings.backend,
        progress=tell,
    )
    try:
        return _Evaluation(run, recipe, lock, settings, book, loaded, tell, watch).card()
    finally:
        loaded.backend.close()


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation whose model is in memory."""

    run: Path
    recipe: Recipe
    lock: dict[str, Any]
    settings: Settings
    book: RuleBook
    loaded: Loaded
    tell: Tell
    watch: Watch

    def card(self) -> Card:
        settings, backend = self.settings, self.loaded.backend
        work, notes = self._work()
        observer = Observer(
            self._renderer, work, self.recipe.train.micro_batch_tokens, settings.max_tokens, settings.seed, self.watch
        )
        backend.use(None)
        benchmarks_before = self._benchmarks()  # first, since it may ask for what cannot be had
        base = observer.measure(backend, "base")
        backend.use(TUNED)
        tuned = observer.measure(backend, "tuned")
        benchmarks_after = self._benchmarks()
        notes += [note for note in backend.notes if note not in notes]
        wins = self._judged(work, base.answers["heldout"], tuned.answers["heldout"]) if settings.judge else None
        texts = partial(training_texts, self.recipe.data)
        findings = Findings(work, base, tuned, settings.seed, texts, wins)
        metrics = findings.metrics()
        warnings = warnings_of(metrics, findings.leaks())
        if not overlap.has_sacrebleu():
            notes.append(f"chrf, bleu and self_bleu need sacrebleu, not installed here. {overlap.INSTALL}")
        said = verdict(metrics, warnings)
        return Card(
            run=self.run.resolve().name,
            adapter=adapter_hash(self.run),
            model=without_folders(self.loaded.source.name),
            backend=f"{backend.name} on {backend.device}",
            mlxsft=__version__,
            settings=settings.told(),
            inputs=inputs_of(self.run, self.settings),
            metrics=metrics,
            verdict=said,
            good=said.startswith("Better") and not warnings,
            warnings=warnings,
            notes=notes,
            groups=findings.groups(),
            forms=findings.forms(),
            answers=findings.answers(),
            benchmarks=side_by_side(benchmarks_before, benchmarks_after),
        )

    @property
    def _renderer(self) -> Renderer:
        return self.loaded.renderers[TUNED]

    def _work(self) -> tuple[Work, list[str]]:
        """What is asked, and what the person should know about it."""
        notes: list[str] = []
        training, heldout = self._own(notes)
        if self.settings.data is not None:
            heldout = self._file("held out", self.settings.data, notes)
        probe = self._file("built-in probe", PROBE, notes)
        if self.settings.probe is not None:
            probe = _together(probe, self._file("--probe", self.settings.probe, notes))
        asked, told = constrained(
            self.settings.ifeval or INSTRUCTIONS,
            self._renderer,
            samples=self.settings.samples,
            seed=self.settings.seed,
        )
        notes += told
        for name, rows in (("held-out", heldout), ("training", training)):
            if len(rows.examples) < rows.total:
                notes.append(f"{len(rows.examples):,} of {rows.total:,} {name} rows are judged (--rows)")
        if not heldout.examples:
            notes.append("no row is held out, so nothing says how the model does on new ones; --data FILE gives some")
        return Work(heldout, training, probe, asked), notes

    def _own(self, notes: list[str]) -> tuple[RowSet, RowSet]:
        """The run's training and held-out rows; none, with a note, where they changed and --data has others."""
        try:
            dataset = self._dataset()
        except InputRefused as error:
            if self.settings.data is None:
                raise
            notes.append(f"nothing is said of memorized rows: {error.message}")
            return NONE, NONE
        options = self._options
        data, rows = self.recipe.data, dataset.rows
        split = "valid" if isinstance(data.valid, str) else "train"
        renderer, book = self._renderer, self.book
        held = [] if self.settings.data is not None else rows["valid"]
        return (
            row_set("training", data, rows["train"], "train", renderer, book, **options),
            row_set("held out", data, held, split, renderer, book, **options),
        )

    def _dataset(self) -> Dataset:
        """The rows, split as the run split them. Raises InputRefused where a file is not what it was then."""
        now = {address_of(Path(file)): sha256 for file, sha256 in data_hashes(self.recipe.data).items()}
        if now != self.lock.get("data"):
            raise InputRefused(
                f"{self.run}: its rows have changed since it was trained, so that which were held out is not known",
                "Put them back as they were, or judge it on rows of their own: --data FILE.",
            )
        return load_dataset(self.recipe.data, self._renderer, seed=self.recipe.train.seed)

    def _file(self, what: str, path: Path, notes: list[str]) -> RowSet:
        rows, told = file_set(what, path, self._renderer, self.book, **self._options)
        notes += told
        return rows

    @property
    def _options(self) -> dict[str, int]:
        return {"count": self.settings.rows, "samples": self.settings.samples, "seed": self.settings.seed}

    def _benchmarks(self) -> Scores:
        """What lm-eval says of the model that answers now."""
        tasks, settings = self.settings.benchmarks, self.settings
        if not tasks:
            return {}
        backend, renderer = self.loaded.backend, self._renderer
        return scores(backend, renderer, tasks, limit=settings.rows, seed=settings.seed, watch=self.watch)

    def _judged(self, work: Work, base: Sequence[Answer], tuned: Sequence[Answer]) -> list[float]:
        """What the judge says of the held-out answers."""
        if not work.heldout.asked:
            raise UsageError("--judge: there is no held-out prompt", "Give rows with --data FILE.")
        self.loaded.backend.close()
        source = open_model(str(self.settings.judge), progress=self.tell)
        refuse_beyond_memory(source.name, source.weight_bytes)
        backend = load_backend(self.settings.backend, source)
        try:
            asked: Sequence[Asked] = work.heldout.asked
            return win_shares(backend, load_renderer(source), asked, base, tuned, watch=self.watch)
        finally:
            backend.close()


def inputs_of(run: Path, settings: Settings) -> dict[str, str]:
    """Hashes and versions of all that decides a card beside its settings and its adapter, by what they are of.

    The base is what the run's lock says, since an adapter is judged on no other one. Raises InputRefused where a file
    is not there.
    """
    folder = RunFolder(run)
    found = {"the run's recipe and lock": _digest(folder.recipe, folder.lock)}
    try:
        hashes = data_hashes(load_recipe(folder.recipe).data)
        found["the run's rows"] = hashlib.sha256(json.dumps(sorted(hashes.values())).encode()).hexdigest()
    except InputRefused:
        if settings.data is None:
            raise
    given = {name: getattr(settings, name) for name in ("data", "rules", "probe", "ifeval")}
    for name, path in given.items():
        if path is not None:
            files = files_of([path], "train") if path.is_dir() else [path]
            found[f"the file of --{name}"] = _digest(*files)
    if settings.judge is not None and Path(settings.judge).is_dir():
        found["the judge"] = _digest(*sorted(Path(settings.judge).glob("*.safetensors")))
    found["the built-in prompts"] = _digest(PROBE, INSTRUCTIONS)
    packages = ["sacrebleu", "jsonschema", *(["lm-eval"] if settings.benchmarks else [])]
    versions = {"mlxsft": __version__, **{name: version for name in packages if (version := _version(name))}}
    found["the versions of programs"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return found


def changed_since(card: Card, run: Path, settings: Settings) -> list[str]:
    """What is other than when the card of this run's adapter was made; nothing where a new one would be the same."""
    now, then = settings.told(), card.settings
    changed = [f"--{name.replace('_', '-')} ({then.get(name)} then)" for name in now if now[name] != then.get(name)]
    if settings.backend not in ("auto", card.backend.partition(" ")[0]):
        changed.append(f"--backend ({card.backend} then)")
    inputs = inputs_of(run, settings)
    return changed + [name for name in {**card.inputs, **inputs} if card.inputs.get(name) != inputs.get(name)]


def _digest(*files: Path) -> str:
    """One SHA-256 of the files' own, in their order."""
    return hashlib.sha256("".join(hash_of(file).sha256 for file in files).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def adapter_hash(run: Path) -> str:
    """SHA-256 of the tensors of a run's adapter. Raises InputRefused where there are none."""
    return hash_of(run / WEIGHTS).sha256


def _together(first: RowSet, second: RowSet) -> RowSet:
    return RowSet(
        [*first.examples, *second.examples], [*first.asked, *second.asked], first.total + second.total
    )  # fmt: skip
