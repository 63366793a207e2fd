"""Several answers at once on MLX: mlx-lm's continuous batching, each with a sampler of its own."""

from __future__ import annotations

from mlxsft.backends import Constraint, Sampling
from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_generation import processors, sampler  # noqa: E402
from mlxsft.backends.mlx_models import mlx_lm  # noqa: E402

ENDLESS = 2**31 - 1  # tokens; who asks for an answer ends it


class Batched:
    """`backends.Streams` of mlx-lm's BatchGenerator."""

    def __init__(self, model: nn.Module, capacity: int) -> None:
        self.capacity = capacity
        self._generator = mlx_lm("generate").BatchGenerator(
            model, completion_batch_size=capacity, prefill_batch_size=capacity
        )
        self._numbers: dict[int, int] = {}  # ours by mlx-lm's

    def add(self, number: int, tokens: list[int], sampling: Sampling, constraint: Constraint | None = None) -> None:
        (uid,) = self._generator.insert(
            [tokens],
            [ENDLESS],
            samplers=[sampler(sampling)],
            logits_processors=[processors(sampling, constraint)],
        )
        self._numbers[uid] = number

    def step(self) -> list[tuple[int, int]]:
        return [(self._numbers[r.uid], r.token) for r in self._generator.next_generated()]

    def remove(self, number: int) -> None:
        uid = next(uid for uid, ours in self._numbers.items() if ours == number)
        del self._numbers[uid]
        self._generator.remove([uid])

    def close(self) -> None:
        self._generator.close()
