"""Random numbers of training on PyTorch: dropout and noise that depend on seed, step and micro-batch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mlxsft.backends.initial_values import seed_of
from mlxsft.backends.torch_intercept import intercepted


class RandomKeys:
    """The random key of the micro-batch that is being trained, for everything random in one model; None: nothing is."""

    def __init__(self) -> None:
        self.value: int | None = None
        self._users = 0

    def number(self) -> int:
        """A new user's number, for `of`."""
        self._users += 1
        return self._users - 1

    def of(self, number: int) -> torch.Generator:
        """A new generator, the same whenever it is asked for with the same key."""
        return torch.Generator().manual_seed(seed_of(self.value or 0, number))


class KeyedDropout(nn.Module):  # type: ignore[misc]  # torch is taken without its types
    """Dropout whose zeros depend on the micro-batch's key and this module's number alone.

    nn.Dropout draws from a global state, which neither a resumed run nor activations that are computed again would see.
    """

    def __init__(self, share: float, keys: RandomKeys) -> None:
        super().__init__()
        self._kept, self._keys, self._number = 1 - share, keys, keys.number()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._keys.value is None:
            return x
        kept = torch.rand(x.shape, generator=self._keys.of(self._number)) < self._kept
        return torch.where(kept, x / self._kept, 0.0)


@contextmanager
def noisy(embedding: nn.Module, alpha: float, generator: torch.Generator) -> Iterator[None]:
    """Within it, what the embedding gives is noisy.

    NEFTune, https://arxiv.org/abs/2310.05914: uniform within ± alpha / √(length · width), where the length is that of
    the micro-batch, as in TRL.
    """

    def add(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        x = plain(*args, **kwargs)
        bound = alpha / (x.shape[-2] * x.shape[-1]) ** 0.5
        return x + (2 * torch.rand(x.shape, generator=generator) - 1) * bound

    with intercepted([embedding], add):
        yield
