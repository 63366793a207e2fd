"""How a quantized model is to be judged: the demands, the rows, and those that a method learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlxsft.data.dataset import Dataset, load_dataset
from mlxsft.data.render import Example, Renderer
from mlxsft.errors import InputRefused, UsageError
from mlxsft.recipe import DataRecipe

BUILT_IN = Path(__file__).with_name("check_text.jsonl")  # everyday English of our own
METHODS = ("dynamic", "dwq", "awq", "gptq")  # mlx-lm's
HELD_OUT = 0.2  # of the calibration rows, to judge by where no others are named


@dataclass(frozen=True)
class CheckSettings:
    """How the quality of a quantized model is measured, and what it has to be."""

    rows: Path | None = None  # None: those held out of the calibration, else the built-in text
    method: str | None = None  # of METHODS; None: rounding to nearest
    calibration: Path | None = None  # rows that the method learns from
    max_kl: float | None = None  # nats a token; above it the command fails
    target_kl: float | None = None  # nats a token; bits are raised until it holds
    max_bytes: int | None = None  # of all tensors; bits are raised no further

    def __post_init__(self) -> None:
        for option, value in (("--max-kl", self.max_kl), ("--target-kl", self.target_kl)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{option} {value}: expected a number of nats above 0, such as 0.05")
        if self.method and not self.calibration:
            raise UsageError(f"--method {self.method} learns from rows", "Give them with --calibration FILE.")
        if self.calibration and not self.method:
            raise UsageError("--calibration: rounding to nearest learns nothing", "Give --method too.")
        if self.method and self.raises_bits:
            raise UsageError(f"--method {self.method} with --target-kl or --max-size: both choose", "Take one of them.")

    @property
    def raises_bits(self) -> bool:
        return self.target_kl is not None or self.max_bytes is not None

    def options(self) -> list[str]:
        """The command line that asks for the same; of the rows' path the name alone."""
        given = (
            ("--method", self.method),
            ("--calibration", self.calibration.name if self.calibration else None),
            ("--check", called(self.rows) if self.rows else None),
            ("--max-kl", self.max_kl),
            ("--target-kl", self.target_kl),
            ("--max-size", self.max_bytes),
        )
        return [word for option, value in given if value is not None for word in (option, str(value))]


def called(rows: Path) -> str:
    return "builtin" if rows == BUILT_IN else rows.name


def read_rows(settings: CheckSettings, renderer: Renderer) -> tuple[list[Example], list[Example], list[str]]:
    """(rows to judge by, others to learn from, what the person should know).

    Raises InputRefused where a row is broken or none is left.
    """
    judged, learned, notes = list[Example](), list[Example](), list[str]()
    named = settings.rows or (None if settings.calibration else BUILT_IN)
    if settings.calibration:
        dataset = _load("--calibration", settings.calibration, renderer, None if named else HELD_OUT, notes)
        learned, judged = dataset.train, dataset.valid
    if named:
        judged = _load("--check", named, renderer, None, notes).train
    if not judged:
        raise InputRefused(f"--calibration {settings.calibration}: no row can be held out", "Name others with --check.")
    seen = {example.tokens.tobytes() for example in judged}
    kept = [example for example in learned if example.tokens.tobytes() not in seen]
    if learned and not kept:
        raise InputRefused("--calibration: has the rows of --check and no others", "Name rows that differ.")
    notes += [f"--calibration: {n} rows are those of --check, left out"] if (n := len(learned) - len(kept)) else []
    return judged, kept, notes


def _load(option: str, rows: Path, renderer: Renderer, held_out: float | None, notes: list[str]) -> Dataset:
    try:
        dataset = load_dataset(DataRecipe(train=str(rows), valid=held_out), renderer, seed=0)
    except InputRefused as error:
        raise InputRefused(f"{option} {called(rows)}: {error.message}", error.hint) from error
    left = len(dataset.left_out)
    notes += [f"{option}: {left} of {dataset.ledger['read']} rows left out"] if left else []
    notes += [f"{option}: {note}" for note in dataset.notes]
    return dataset


def segments(examples: Sequence[Example], longest: int) -> NDArray[np.int32]:
    """[N, T]: the rows one after the other, cut to equal lengths as mlx-lm takes them, without the rest."""
    if not examples:
        return np.zeros((0, longest), dtype=np.int32)
    stream = np.concatenate([example.tokens for example in examples])
    length = min(longest, stream.size)
    return stream[: stream.size // length * length].reshape(-1, length).astype(np.int32)
