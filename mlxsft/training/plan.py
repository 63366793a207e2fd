"""What a run will take, before it is started: as it stands, with one thing changed, or on another machine.

A forecast for this machine is measured (`trial.py`). One for a named Mac is reckoned from it and marked so.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.recipe import Recipe
from mlxsft.training.trial import Trial, run_trial

SMALLEST = 64  # tokens: a max_tokens that is tried

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
    """One thing that makes a run need less memory: the settings that it changes, and what it costs."""

    name: str
    settings: Mapping[str, Any]  # by their dotted names
    price: str


@dataclass(frozen=True)
class Forecast:
    """What a run takes with some changes."""

    changes: list[Change]
    recipe: Recipe
    trial: Trial

    def to_json(self) -> dict[str, Any]:
        trial = self.trial
        facts = {"seconds": trial.seconds, "needed_bytes": trial.needed_bytes, "fits": trial.fits}
        settings = {name: value for change in self.changes for name, value in change.settings.items()}
        return {"settings": settings, **facts, **asdict(trial)}


@dataclass(frozen=True)
class PaperForecast:
    """A forecast for a machine that is not here: reckoned, not measured."""

    machine: str
    seconds: float  # of training
    needed_bytes: int
    memory_bytes: int

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes


def forecast(recipe: Recipe, backend: str, changes: list[Change] | None = None) -> Forecast:
    """What a recipe with these changes takes. Raises what loading and training raise."""
    changed = recipe
    for change in changes or []:
        changed = with_settings(changed, change.settings)
    return Forecast(list(changes or []), changed, run_trial(changed, backend))


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with other values for these dotted names, checked as a recipe file is."""
    given = recipe.model_dump(mode="json")
    for name, value in settings.items():
        section, _, field = name.partition(".")
        given[section][field] = value
    return Recipe.model_validate_json(json.dumps(given))


def changes_for(recipe: Recipe, trial: Trial) -> list[Change]:
    """What would make this run need less, the cheapest first."""
    return [*_same_result(recipe, trial), *_narrower(recipe, trial)]


def _same_result(recipe: Recipe, trial: Trial) -> Iterator[Change]:
    """Changes after which the same is learned."""
    rows, columns = trial.largest
    for count in dict.fromkeys((rows // 2, 1)):
        if 0 < count < rows:
            name = f"{count} rows at a time" if count > 1 else "one row at a time"
            yield Change(name, {"train.micro_batch_tokens": count * columns}, "the same result")
    if not recipe.train.checkpoint_activations:
        yield Change("activation checkpointing", {"train.checkpoint_activations": True}, "the same result")


def _narrower(recipe: Recipe, trial: Trial) -> Iterator[Change]:
    """Changes after which something else is learned."""
    tuned = trial.layers if recipe.adapter.layers == "all" else recipe.adapter.layers
    if (fewer := min(8, tuned // 2)) >= 1:
        yield Change(
            f"the adapter in the last {fewer} layers, what is below computed once",
            {"adapter.layers": fewer, "train.cache_trunk": "auto"},
            "a smaller adapter",
        )
    if recipe.data.too_long != "error" and (half := trial.longest // 2) >= SMALLEST:
        yield Change(
            f"rows of at most {half} tokens", {"data.max_tokens": half}, "longer rows are shortened or left out"
        )


def fitting(
    recipe: Recipe, backend: str, first: Forecast, limit: int, tell: Callable[[Forecast], None]
) -> Forecast | None:
    """The run with as few changes as make it need at most `limit` bytes, each measured; None where none is enough.

    `tell` hears of each try. Changes are added one to another, the cheapest first; one of no use is left out again.
    """
    best, tried = first, list[Change]()
    while best.trial.needed_bytes > limit:
        untried = (c for c in changes_for(best.recipe, best.trial) if c not in tried)
        if (change := next(untried, None)) is None:
            return None
        tried.append(change)
        found = forecast(recipe, backend, [*best.changes, change])
        # The program takes as much as it took before, but for chance, which is to decide nothing.
        found = replace(found, trial=replace(found.trial, process_bytes=first.trial.process_bytes))
        tell(found)
        if found.trial.peak_bytes < best.trial.peak_bytes:
            best = found
    return best


def on_paper(machine: str, recipe: Recipe, trial: Trial) -> PaperForecast:
    """The run on a named Mac, such as m2-16gb, reckoned from the rate of its GPU and its memory.

    Time: that of the updates here, times what MLX reaches in float32 products here over the rate of that GPU, as if it
    were used to the same share. Memory: the base as its files have it, and activations and optimizer as here. A GPU may
    take two thirds of the memory of a Mac with up to 32 GB, three quarters of a larger one.
    """
    match = MAC.fullmatch(machine.lower())
    if match is None or match[1] not in TERAFLOPS:
        raise UsageError(
            f"--for: {machine!r} is no Mac that is known here",
            f"Write the chip and its memory, as in m2-16gb; the chips are: {', '.join(TERAFLOPS)}.",
        )
    if not trial.matmul_rate:
        raise UsageError("--for: there is no rate of this machine to reckon from")
    memory = int(match[2]) * 2**30
    on_top = max(0, trial.peak_bytes - 4 * trial.parameters) if trial.device == "cpu" else trial.peak_bytes
    weights = trial.weight_bytes if trial.device == "cpu" else 0
    return PaperForecast(
        machine.lower(),
        trial.train_seconds * trial.matmul_rate / (TERAFLOPS[match[1]] * 1e12),
        weights + on_top + trial.process_bytes,
        math.floor(memory * (2 / 3 if memory <= 32 * 2**30 else 3 / 4)),
    )
