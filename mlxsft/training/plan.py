"""What a run will take, before it is started: as it stands, with one thing changed, or on another machine.

A forecast for this machine is measured (`trial.py`). One for a named Mac is reckoned from it and marked so.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from mlxsft.errors import MlxsftError, OutOfResources, UsageError
from mlxsft.recipe import Recipe, dump_recipe
from mlxsft.training.trial import Counts, NoMemory, Trial, run_trial

SMALLEST = 64  # tokens: a max_tokens that is tried
BITS = 4  # of a quantized base that is tried
# What MLX reaches on the CPU with numbers that are not float32: 2 to 4 GFLOP/s were measured with its matrix products.
PACKED_RATE = 3e9
LONGEST_TRIAL = 600.0  # seconds that a trial on such numbers may take

# Float32 rates of the GPUs with all their cores, in TFLOP/s, by 128 lanes a core, 2 operations a lane and the clock, to
# about a tenth: none was measured, and of published tables M1 Max, M3 Pro, M3 Max and M4 Max were compared.
TERAFLOPS = {
    "m1": 2.6,
    "m1-pro": 5.2,
    "m1-max": 10.4,
    "m1-ultra": 21.0,
    "m2": 3.6,
    "m2-pro": 6.8,
    "m2-max": 13.6,
    "m2-ultra": 27.2,
    "m3": 3.5,
    "m3-pro": 6.4,
    "m3-max": 14.2,
    "m4": 4.3,
    "m4-pro": 8.5,
    "m4-max": 17.0,
}
MAC = re.compile(r"(m\d(?:-(?:pro|max|ultra))?)-(\d+)gb")


@dataclass(frozen=True)
class Change:
    """One thing that makes a run need less memory: the settings that it changes, and what it costs.

    `first` are the words of a command of mlxsft that makes the base which the settings name, where it is not there yet.
    """

    name: str
    settings: Mapping[str, Any]  # by their dotted names
    price: str
    first: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forecast:
    """What a run takes with some changes; where its trial failed, `counts` alone and why."""

    changes: list[Change]
    recipe: Recipe
    counts: Counts | None
    trial: Trial | None = None
    failure: str = ""

    @property
    def needed_bytes(self) -> float:
        """Infinite where nothing was measured."""
        return self.trial.needed_bytes if self.trial else math.inf

    @property
    def fits(self) -> bool:
        """In the memory of this machine."""
        return self.trial is not None and self.trial.fits

    @property
    def settings(self) -> dict[str, Any]:
        """What is changed, by dotted names."""
        return {name: value for change in self.changes for name, value in change.settings.items()}

    @property
    def commands(self) -> list[str]:
        """What has to be run before the run."""
        return [shlex.join(["mlxsft", *change.first]) for change in self.changes if change.first]

    def to_yaml(self) -> str:
        """The recipe, with the commands in its head."""
        return "".join(f"# First: {command}\n" for command in self.commands) + dump_recipe(self.recipe)

    def to_json(self) -> dict[str, Any]:
        found = {"settings": self.settings, "run_first": self.commands}
        if self.trial is None:
            counts = asdict(self.counts) if self.counts else {}
            return {**found, "fits": False, "failure": self.failure, **counts}
        trial = self.trial
        facts = {"seconds": trial.seconds, "needed_bytes": trial.needed_bytes, "fits": trial.fits}
        return {**found, **facts, "most_seconds": trial.most_seconds, **asdict(trial)}


@dataclass(frozen=True)
class PaperForecast:
    """A forecast for a machine that is not here: reckoned, not measured."""

    machine: str
    seconds: float | None  # of training; None where this machine computes in numbers that are slow here alone
    needed_bytes: int
    memory_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes


def forecast(recipe: Recipe, backend: str, changes: Sequence[Change] = ()) -> Forecast:
    """What a recipe with these changes takes.

    A trial that finds no memory is a forecast without one. Raises what else loading and training raise.
    """
    changed = recipe
    for change in changes:
        changed = with_settings(changed, change.settings)
    try:
        with _with_bases(changed, changes) as there:
            trial = run_trial(there, backend)
    except NoMemory as error:
        return Forecast(list(changes), changed, error.counts, failure=error.message)
    return Forecast(list(changes), changed, trial, trial)


def tried(recipe: Recipe, backend: str, changes: Sequence[Change], before: Counts) -> Forecast:
    """As `forecast`, for changes that may turn out not to work, or to take too long to try: that is a failure too."""
    try:
        _refuse_slow_trial(changes, before)
        return forecast(recipe, backend, changes)
    except MlxsftError as error:
        return Forecast(list(changes), recipe, None, failure=error.message)


@contextmanager
def _with_bases(recipe: Recipe, changes: Sequence[Change]) -> Iterator[Recipe]:
    """The recipe with a base that is there: one that a command has yet to make is made, to be deleted again."""
    command = next((change.first for change in changes if change.first), ())
    if not command:
        yield recipe
        return
    with tempfile.TemporaryDirectory(prefix="mlxsft-plan-") as place:
        out = str(Path(place) / "base")
        words = [out if word == recipe.model else word for word in command]
        done = subprocess.run([sys.executable, "-m", "mlxsft", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise OutOfResources(f"the base could not be quantized to be tried: {said[0].removeprefix('Error: ')}")
        yield recipe.model_copy(update={"model": out})


def _refuse_slow_trial(changes: Sequence[Change], before: Counts) -> None:
    """On the CPU packed numbers are slow: four micro-batches, twice, for parameters of which the files have 2 bytes."""
    stored = any(change.settings.get("train.base_dtype") == "stored" for change in changes)
    rows, columns = before.largest
    seconds = 4 * (before.weight_bytes / 2) * rows * columns * 4 / PACKED_RATE
    if stored and before.device == "cpu" and seconds > LONGEST_TRIAL:
        raise UsageError(f"not tried: on this CPU such numbers are so slow that it would take {seconds / 60:,.0f} min")


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values for these dotted names, checked as a recipe file is."""
    given = recipe.model_dump(mode="json")
    for name, value in settings.items():
        section, _, field = name.rpartition(".")
        (given[section] if section else given)[field] = value
    return Recipe.model_validate_json(json.dumps(given))


def changes_for(recipe: Recipe, counts: Counts) -> list[Change]:
    """What would make this run need less, the cheapest first: on the CPU that is not a base in other numbers."""
    others = [_smaller_base(recipe, counts), _narrower(recipe, counts)]
    return [*_same_result(recipe, counts), *chain(*(others[::-1] if counts.device == "cpu" else others))]


def _same_result(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    """Changes after which the same is learned."""
    rows, columns = counts.largest
    for count in dict.fromkeys((rows // 2, 1)):
        if 0 < count < rows:
            name = f"{count} rows at a time" if count > 1 else "one row at a time"
            yield Change(name, {"train.micro_batch_tokens": count * columns}, "the same result")
    if not recipe.train.checkpoint_activations:
        yield Change("activation checkpointing", {"train.checkpoint_activations": True}, "the same result")
    if recipe.train.cache_trunk != "disk" and recipe.adapter.layers != "all" and counts.epochs > 1:
        name = "what is below the adapter computed once, and kept on the disk"
        yield Change(name, {"train.cache_trunk": "disk"}, "the same result")


def _smaller_base(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    """Changes after which the base is rounded more."""
    if counts.backend != "mlx":
        return
    slow = {"train.base_dtype": "stored"} if counts.device == "cpu" else {}
    if slow and recipe.train.base_dtype != "stored" and not counts.float32:
        name = "the base computed in the numbers of its files"
        yield Change(name, slow, "rounded as these are, and slow on the CPU")
    if not counts.quantized and recipe.adapter.kind != "full":
        base = quantized_folder(recipe.model)
        pinned = ("--revision", recipe.revision) if recipe.revision and base != Path(recipe.model) else ()
        first = ("convert", recipe.model, str(base), "--bits", str(BITS), *pinned)
        price = "the base is rounded, and slow on the CPU" if slow else "the base is rounded"
        yield Change(
            f"the base in {BITS} bits",
            {"model": str(base), "revision": None, **slow},
            price,
            () if base.exists() else first,
        )


def quantized_folder(model: str) -> Path:
    """Where the quantized base of a model belongs: beside a folder, in `models` for one of the Hub."""
    here = Path(model) if Path(model).is_dir() else Path("models").resolve() / model.rpartition("/")[2]
    return here.with_name(f"{here.name}-{BITS}bit")


def _narrower(recipe: Recipe, counts: Counts) -> Iterator[Change]:
    """Changes after which something else is learned."""
    tuned = counts.layers if recipe.adapter.layers == "all" else recipe.adapter.layers
    if (fewer := min(8, tuned // 2)) >= 1:
        name = f"the adapter in the last {f'{fewer} layers' if fewer > 1 else 'layer'}"
        price = "a smaller adapter"
        if counts.epochs > 1:
            kept = {"adapter.layers": fewer, "train.cache_trunk": "disk"}
            yield Change(f"{name}, what is below computed once, and kept on the disk", kept, price)
        yield Change(name, {"adapter.layers": fewer, "train.cache_trunk": "off"}, price)
    if recipe.data.too_long != "error" and (half := counts.longest // 2) >= SMALLEST:
        yield Change(
            f"rows of at most {half} tokens", {"data.max_tokens": half}, "longer rows are shortened or left out"
        )


def no_changes(recipe: Recipe, counts: Counts) -> list[str]:
    """Why some of what helps others is not among the changes, as sentences."""
    said = []
    if counts.backend != "mlx":
        said.append("no quantized base: PyTorch has it as float32 in memory")
    elif counts.quantized:
        said.append("no smaller base: it is quantized already")
    elif recipe.adapter.kind == "full":
        said.append("no quantized base: adapter.kind full trains the numbers of the base")
    if counts.epochs <= 1:
        said.append("no trunk cache: every row is seen once")
    if recipe.data.too_long == "error":
        said.append("no shorter rows: data.too_long is error")
    return said


def fitting(
    recipe: Recipe, backend: str, first: Forecast, limit: int, tell: Callable[[Forecast], None]
) -> Forecast | None:
    """The run with as few changes as make it need at most `limit` bytes, each measured; None where none is enough.

    `tell` hears of each try. Changes are added one to another, the cheapest first; one of no use is left out again. As
    long as none could be measured, for want of memory, all are kept.
    """
    best, known = first, list[Change]()
    while best.needed_bytes > limit:
        assert best.counts is not None  # it would have failed by itself
        untried = (change for change in changes_for(best.recipe, best.counts) if change not in known)
        if (change := next(untried, None)) is None:
            return None
        known.append(change)
        kept = [earlier for earlier in best.changes if not earlier.settings.keys() <= change.settings.keys()]
        found = tried(recipe, backend, [*kept, change], best.counts)
        if found.trial and first.trial:
            # The program takes as much as it took before, but for chance, which is to decide nothing.
            same = replace(found.trial, process_bytes=first.trial.process_bytes)
            found = replace(found, trial=same, counts=same)
        tell(found)
        if found.counts and (_arrays(found) < _arrays(best) or (not found.trial and not best.trial)):
            best = found
    return best


def _arrays(found: Forecast) -> float:
    return found.trial.peak_bytes + found.trial.trunk_bytes if found.trial else math.inf


def on_paper(machine: str, recipe: Recipe, trial: Trial) -> PaperForecast:
    """The run on a named Mac, such as m2-16gb, reckoned from the rate of its GPU and its memory.

    Time: that of the updates here, times what MLX reaches in float32 products here over the rate of that GPU, as if it
    were used to the same share. Memory: the base as its files have it, and activations and optimizer as here. A GPU may
    take two thirds of the memory of a Mac with up to 32 GB, three quarters of a larger one.
    """
    chip, memory = mac(machine)
    if not trial.matmul_rate:
        raise UsageError("--for: there is no rate of this machine to reckon from")
    float32 = trial.device == "cpu" and recipe.train.base_dtype == "auto"
    on_top = max(0, trial.peak_bytes - 4 * trial.parameters) if float32 else trial.peak_bytes
    weights = trial.weight_bytes if float32 else 0
    slow_here = trial.device == "cpu" and not float32
    return PaperForecast(
        machine.lower(),
        None if slow_here else trial.train_seconds * trial.matmul_rate / (TERAFLOPS[chip] * 1e12),
        weights + on_top + trial.trunk_bytes + trial.process_bytes,
        math.floor(memory * (2 / 3 if memory <= 32 * 2**30 else 3 / 4)),
    )


def mac(machine: str) -> tuple[str, int]:
    """Chip and bytes of memory of a Mac, as in m2-16gb. Raises UsageError for one that is not known here."""
    match = MAC.fullmatch(machine.lower())
    if match is None or match[1] not in TERAFLOPS:
        raise UsageError(
            f"--for: {machine!r} is no Mac that is known here",
            f"Write the chip and its memory, as in m2-16gb; the chips are: {', '.join(TERAFLOPS)}.",
        )
    return match[1], int(match[2]) * 2**30
