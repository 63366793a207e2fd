"""Random numbers of training on MLX: dropout and noise that depend on seed, step and row alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_intercept import intercepted  # noqa: E402


class RandomKeys:
    """The random keys of the tokens that are being trained, for everything random in one model."""

    def __init__(self) -> None:
        self.value: mx.array = mx.zeros((1, 1, 3), dtype=mx.uint32)  # [B, T, 3], as `token_keys` gives them
        self._users = 0

    def number(self) -> int:
        """A new user's number, for `of`."""
        self._users += 1
        return self._users - 1

    def of(self, number: int) -> mx.array:
        """[B, T, 2]: a key for each token, of this user's own."""
        return mx.stack([self.value[..., 0], self.value[..., 1] * self._users + number], axis=-1)

    @property
    def lengths(self) -> mx.array:
        """[B, T, 1]: the length of each token's row."""
        return self.value[..., 2:]


class KeyedDropout(nn.Module):  # type: ignore[misc]  # MLX comes without types
    """Dropout whose zeros depend on the key of each token and this module's number alone.

    nn.Dropout draws from a global state: activations that `mx.checkpoint` computes again then get other zeros than in
    the forward pass, and the gradient is wrong.
    """

    def __init__(self, share: float, keys: RandomKeys) -> None:
        super().__init__()
        self._kept, self._keys, self._number = 1 - share, keys, keys.number()

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        keys = self._keys.of(self._number)
        if x.ndim > 2 and x.shape[:2] == keys.shape[:2]:
            kept = _of_tokens(lambda shape, key: mx.random.bernoulli(self._kept, shape, key=key), x, keys)
        else:  # experts, and the head on chosen positions, get tokens in another order
            kept = mx.random.bernoulli(self._kept, x.shape, key=keys[0, 0])
        return mx.where(kept, x / self._kept, 0)


@contextmanager
def noisy(embedding: nn.Module, alpha: float, keys: RandomKeys, number: int) -> Iterator[None]:
    """Within it, what the embedding gives is noisy; `number` is this user's of the keys.

    NEFTune, https://arxiv.org/abs/2310.05914: uniform within ± alpha / √(length · width), where the length is that of
    the row without its padding.
    """

    def add(plain: Callable[[mx.array], mx.array], tokens: mx.array) -> mx.array:
        x = plain(tokens)
        if x.shape[:2] != keys.value.shape[:2]:  # the head is called alone, and nothing of this is computed
            return x
        noise = _of_tokens(lambda shape, key: mx.random.uniform(-1, 1, shape, key=key), x, keys.of(number))
        return x + (noise * alpha / mx.sqrt(keys.lengths.astype(mx.float32) * x.shape[-1])).astype(x.dtype)

    with intercepted([embedding], add):
        yield


def _of_tokens(draw: Callable[[tuple[int, ...], mx.array], mx.array], x: mx.array, keys: mx.array) -> mx.array:
    """Random numbers in the shape of x [B, T, …], those of each token drawn with its own key."""
    numbers: mx.array = mx.vmap(partial(draw, x.shape[2:]))(keys.reshape(-1, 2))
    return numbers.reshape(x.shape)
