"""Random numbers of training on MLX: dropout and noise that depend on seed, step and micro-batch alone."""

from __future__ import annotations

from typing import Any

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402


class RandomKeys:
    """The random key of the micro-batch that is being trained, for everything random in one model."""

    def __init__(self) -> None:
        self.value: mx.array = mx.random.key(0)
        self._users = 0

    def number(self) -> int:
        """A new user's number, for `of`."""
        self._users += 1
        return self._users - 1

    def of(self, number: int) -> mx.array:
        return mx.random.split(self.value, self._users)[number]


class KeyedDropout(nn.Module):  # type: ignore[misc]  # MLX comes without types
    """Dropout whose zeros depend on the micro-batch's key and this module's number alone.

    nn.Dropout draws from a global state: activations that `mx.checkpoint` computes again then get other zeros than in
    the forward pass, and the gradient is wrong.
    """

    def __init__(self, share: float, keys: RandomKeys) -> None:
        super().__init__()
        self._kept, self._keys, self._number = 1 - share, keys, keys.number()

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        kept = mx.random.bernoulli(self._kept, x.shape, key=self._keys.of(self._number))
        return mx.where(kept, x / self._kept, 0)


def add_noise(embedding: nn.Module, alpha: float, keys: RandomKeys) -> type:
    """Make this one embedding noisy in training; returns the class to give back to it.

    NEFTune, https://arxiv.org/abs/2310.05914: uniform within ± alpha / √(length · width), where the length is that of
    the micro-batch, as in TRL.
    """
    plain, number = type(embedding), keys.number()

    def call(self: Any, tokens: mx.array) -> Any:
        x = plain.__call__(self, tokens)
        if not self.training:
            return x
        bound = alpha / (x.shape[-2] * x.shape[-1]) ** 0.5
        return x + mx.random.uniform(-bound, bound, x.shape, key=keys.of(number)).astype(x.dtype)

    embedding.__class__ = type(plain.__name__, (plain,), {"__call__": call})
    return plain
