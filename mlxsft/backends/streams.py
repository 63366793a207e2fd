"""Answers one after the other, for backends and models that cannot compute several at once."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxsft.backends import Backend, Constraint, Sampling


class OneByOne:
    """`backends.Streams` of which only the oldest goes on."""

    capacity = 1

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._streams: dict[int, Generator[int, None, None]] = {}

    def add(self, number: int, tokens: list[int], sampling: Sampling, constraint: Constraint | None = None) -> None:
        cache = self._backend.new_cache()
        self._streams[number] = self._backend.stream(tokens, sampling, cache, constraint=constraint)

    def step(self) -> list[tuple[int, int]]:
        return [(number, next(stream)) for number, stream in list(self._streams.items())[:1]]

    def remove(self, number: int) -> None:
        self._streams.pop(number).close()

    def close(self) -> None:
        for number in list(self._streams):
            self.remove(number)
