"""Random numbers of training on MLX: dropout and noise that depend on seed, step and micro-batch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_intercept import intercepted  # noqa: E402


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


@contextmanager
def noisy(embedding: nn.Module, alpha: float, key: mx.array) -> Iterator[None]:
    """Within it, what the embedding gives is noisy.

    NEFTune, https://arxiv.org/abs/2310.05914: uniform within ± alpha / √(length · width), where the length is that of
    the micro-batch, as in TRL.
    """

    def add(plain: Callable[[mx.array], mx.array], tokens: mx.array) -> mx.array:
        x = plain(tokens)
        bound = alpha / (x.shape[-2] * x.shape[-1]) ** 0.5
        return x + mx.random.uniform(-bound, bound, x.shape, key=key).astype(x.dtype)

    with intercepted([embedding], add):
        yield
