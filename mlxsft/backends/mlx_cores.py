"""The rows of a batch shared out over the cores of a CPU.

A stream of MLX's CPU device computes on one core, matrix products aside, which the BLAS spreads over all of them: while
everything between two products is computed, the other cores wait. Here each core gets a part of the rows and a stream
of its own, products included. A step of SmolLM2-135M (4 rows of 160 tokens, two cores) takes 0.75 of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsft.backends.blas import blas_threads, load_blas, set_blas_threads
from mlxsft.backends.pieces import InStep, Way

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch


@dataclass(frozen=True)
class Part:
    """Rows of a batch that one core computes on `stream`, and the columns that they need: `batch` at `place`."""

    batch: Batch
    place: tuple[slice, slice]
    stream: Any
    way: Way

    @contextmanager
    def making(self) -> Iterator[None]:
        """Within it, what is made is computed on this part's core, in step with the others."""
        with mx.stream(self.stream), self.way.making():
            yield


class Cores:
    """The cores that the rows of a batch are shared out over; a single one where MLX computes on a GPU."""

    def __init__(self, device: str, threads: int | None = None) -> None:
        """`threads`: how many cores to use, as many as the BLAS without it."""
        self._cuts = device == "cpu"
        self._default = mx.default_stream(mx.default_device())
        self._threads = (threads or blas_threads()) if device == "cpu" else 1
        self._streams = [mx.new_stream(mx.cpu) for _ in range(self._threads)] if self._threads > 1 else []

    def parts(self, batch: Batch, *, whole: bool = False) -> list[Part]:
        """The batch in as many parts as there are rows or cores, of rows that stand apart, so of nearly equal work.

        On a CPU, where every shape will do, each ends with its last trained token, and one without any is left out:
        what follows has no part in any loss. With `whole` it has every row and column. The largest comes first: it
        decides into how many pieces all are cut.
        """
        count = max(1, min(len(batch.tokens), len(self._streams)))
        streams = self._streams[:count] if count > 1 else [self._default]
        parts, in_step = [], InStep()
        for start, stream in enumerate(streams):
            rows = slice(start, None, count)
            trained = np.flatnonzero(batch.mask[rows].any(axis=0))
            cut = self._cuts and not whole and len(trained)
            place = (rows, slice(int(trained[-1]) + 1) if cut else slice(None))
            parts.append(Part(batch.part(*place), place, stream, in_step.part()))
        trained_ones = [part for part in parts if part.batch.mask.any()]
        parts = parts if whole or not trained_ones else trained_ones
        return sorted(parts, key=lambda part: part.batch.tokens.size, reverse=True)

    @contextmanager
    def sharing(self, parts: list[Part]) -> Iterator[None]:
        """Within it, each of the parts has the cores to itself that are its share."""
        if len(parts) < 2:
            yield
            return
        before = blas_threads()
        set_blas_threads(self._threads // len(parts))
        try:
            yield
        finally:
            set_blas_threads(before)
