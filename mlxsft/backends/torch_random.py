"""Random numbers of training on PyTorch: dropout and noise that depend on seed, step and row alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mlxsft.backends.initial_values import seed_of
from mlxsft.backends.torch_intercept import intercepted


class RandomKeys:
    """The random keys of the tokens that are being trained, for everything random in one model; None: nothing is."""

    def __init__(self) -> None:
        self.value: NDArray[np.uint32] | None = None  # [B, T, 3], as `token_keys` gives them
        self._users = 0

    def number(self) -> int:
        """A new user's number, for `uniform`."""
        self._users += 1
        return self._users - 1

    def uniform(self, shape: torch.Size, number: int) -> torch.Tensor:
        """Numbers from 0 to 1, for tokens [B, T, …] the same whenever they are asked for by this user.

        Those of each token depend on its key alone; without a token for each place, on the first key.
        """
        assert self.value is not None
        keys = self.value
        if shape[:2] != keys.shape[:2]:
            return torch.rand(shape, generator=_generator(int(keys[0, 0, 0]), number))
        return torch.stack([self._line(line, shape[2:], number) for line in keys])

    @staticmethod
    def _line(keys: NDArray[np.uint32], shape: torch.Size, number: int) -> torch.Tensor:
        """[T, …]: the numbers of a line of tokens, row by row."""
        rows = np.split(keys, np.flatnonzero(keys[1:, 0] != keys[:-1, 0]) + 1)
        return torch.cat([torch.rand((len(row), *shape), generator=_generator(int(row[0, 0]), number)) for row in rows])

    @property
    def lengths(self) -> torch.Tensor:
        """[B, T, 1]: the length of each token's row."""
        assert self.value is not None
        return torch.from_numpy(self.value[..., 2:].astype(np.float32))


def _generator(key: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(key, number))


class KeyedDropout(nn.Module):  # type: ignore[misc]  # torch is taken without its types
    """Dropout whose zeros depend on the key of each token and this module's number alone.

    nn.Dropout draws from a global state, which neither a resumed run nor activations that are computed again would see.
    """

    def __init__(self, share: float, keys: RandomKeys) -> None:
        super().__init__()
        self._kept, self._keys, self._number = 1 - share, keys, keys.number()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._keys.value is None:
            return x
        kept = self._keys.uniform(x.shape, self._number) < self._kept
        return torch.where(kept, x / self._kept, 0.0)


@contextmanager
def noisy(embedding: nn.Module, alpha: float, keys: RandomKeys, number: int) -> Iterator[None]:
    """Within it, what the embedding gives is noisy; `number` is this user's of the keys.

    NEFTune, https://arxiv.org/abs/2310.05914: uniform within ± alpha / √(length · width), where the length is that of
    the row without its padding.
    """

    def add(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        x = plain(*args, **kwargs)
        noise = 2 * keys.uniform(x.shape, number) - 1
        return x + noise * alpha / (keys.lengths * x.shape[-1]).sqrt()

    with intercepted([embedding], add):
        yield
