"""The trunk cache: what the frozen layers below the adapter give for every row, computed once for all epochs.

Rows that a cache holds carry their part of it (`Example.trunk`), so that nothing after this module knows of caches.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from mlxsft.data.batches import Batch, micro_batches, stack
from mlxsft.training.events import Event, Noted, TrunkCached
from mlxsft.training.ranks import any_of

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.render import Example

Place = Literal["memory", "disk"]

SHARE_OF_MEMORY = 0.25  # of what is available, at most, for `auto`
SHARE_OF_DISK = 0.5  # of what is free, at most
TOLERANCE = 1e-4  # of a token's loss: nats, and as much again for each nat of the loss; sixteen-bit types round more
REPORTED = 20  # how often the filling is reported


@dataclass
class TrunkCache:
    """Fills itself for some rows, if it is worth it; `rows` are then the same rows with their activations.

    `choice` is the recipe's `cache_trunk`; `decided` whether the run has a cache, None before that is known: a resumed
    run must not decide anew, because rounding differs a little. The file on disk has no name: a kill leaves nothing.
    """

    backend: Backend
    choice: Literal["auto", "memory", "disk", "off"]
    folder: Path
    micro_batch_tokens: int
    positions: int | None
    decided: bool | None = None
    used: bool = False
    rows: list[list[Example]] = field(default_factory=list)

    def fill(self, sets: Sequence[Sequence[Example]], *, repeated: bool, stop: Callable[[], bool]) -> Iterator[Event]:
        """Compute what the trunk gives for every row of the sets (training rows, held-out rows).

        `repeated`: the training rows are used more than once. After `stop()` nothing is cached. Every rank keeps all
        rows, because it gets others of them in every epoch; where one cannot, none does.
        """
        self.rows = [list(rows) for rows in sets]
        everything = [row for rows in sets for row in rows]
        if everything and self._wanted(repeated):
            yield from self._fill(everything, stop)
        if any_of(self.backend.ranks, not self.used) and self.used:
            self.used, self.rows = False, [list(rows) for rows in sets]
            yield Noted(
                "train.cache_trunk: the lower layers are computed in every epoch: another rank cannot keep them"
            )
        if not stop():
            self.decided = self.used

    def _wanted(self, repeated: bool) -> bool:
        if self.choice == "auto":
            return repeated if self.decided is None else self.decided
        return self.choice != "off"

    def _fill(self, everything: list[Example], stop: Callable[[], bool]) -> Iterator[Event]:
        layers = self.backend.trunk_layers()
        if not layers:
            if self.choice != "auto":
                yield Noted("train.cache_trunk: there is no layer below what is trained, so nothing is kept")
            return
        groups = self._groups(everything)
        first = self._batch(everything, groups[0])
        outputs = self.backend.trunk(first)
        if (why := self._why_wrong(first, outputs)) is None:
            why = yield from self._store(everything, groups, outputs, layers, stop)
        if why:
            yield Noted(f"train.cache_trunk: the lower {layers} layers are computed in every epoch: {why}")

    def _store(
        self,
        rows: list[Example],
        groups: list[NDArray[np.int64]],
        outputs: NDArray[Any],
        layers: int,
        stop: Callable[[], bool],
    ) -> Generator[Event, None, str]:
        """Keep the trunk's outputs of all rows; why that cannot be, or nothing."""
        ends = np.cumsum([len(row.tokens) for row in rows])
        needed = int(ends[-1]) * outputs.shape[-1] * outputs.itemsize
        place = self.place(needed * self.backend.ranks.count)  # which may all be on this machine
        if place is None:
            return f"their activations take {needed / 2**30:.1f} GiB, more than there is room for"
        store = _new_store((int(ends[-1]), outputs.shape[-1]), outputs.dtype, place, self.folder)
        report_at = 0.0
        for number, group in enumerate(groups):
            if stop():
                return ""
            outputs = self.backend.trunk(self._batch(rows, group)) if number else outputs
            for line, row in enumerate(group):
                size = len(rows[row].tokens)
                store[ends[row] - size : ends[row]] = outputs[line, :size]
            if (done := (number + 1) / len(groups)) >= report_at:
                report_at = done + 1 / REPORTED
                yield TrunkCached(layers, place, needed, done)
        parts = iter(np.split(store, ends[:-1]))
        self.rows = [[replace(row, trunk=next(parts)) for row in group] for group in self.rows]
        self.used = True
        self.backend.release_trunk()
        return ""

    def _groups(self, rows: list[Example]) -> list[NDArray[np.int64]]:
        """All rows in batches, always the same ones: a resumed run must get the same numbers to the last bit."""
        lengths = [len(row.tokens) for row in rows]
        return micro_batches(np.arange(len(rows)), lengths, self.micro_batch_tokens)

    def _batch(self, rows: list[Example], group: NDArray[np.int64]) -> Batch:
        return stack([rows[i] for i in group], limit=self.positions)

    def _why_wrong(self, batch: Batch, outputs: NDArray[Any]) -> str | None:
        """How the whole model's losses of a batch differ from those that start at the cached outputs."""
        whole, cached = self.backend.losses(batch), self.backend.losses(replace(batch, trunk=outputs))
        tolerance = TOLERANCE if outputs.dtype == np.float32 else 100 * TOLERANCE
        different = np.abs(whole - cached)
        if bool((different <= tolerance * (1 + np.abs(whole))).all()):
            return None
        return f"the loss of a token then differs by {different.max():.2g} nats"

    def place(self, needed: int) -> Place | None:
        """Where so many bytes are kept; None where there is no room."""
        free = shutil.disk_usage(self.folder).free
        if self.choice == "memory":
            return "memory"
        if self.choice == "auto" and needed <= SHARE_OF_MEMORY * psutil.virtual_memory().available:
            return "memory"
        return "disk" if needed <= (SHARE_OF_DISK if self.decided is None else 1.0) * free else None


def _new_store(shape: tuple[int, int], dtype: np.dtype[Any], place: Place, folder: Path) -> NDArray[Any]:
    """Room for the activations: an array, or a file in `folder` that vanishes with the process."""
    if place == "memory":
        return np.empty(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(shape[0] * shape[1] * dtype.itemsize)
        return np.memmap(file, dtype=dtype, mode="r+", shape=shape)
