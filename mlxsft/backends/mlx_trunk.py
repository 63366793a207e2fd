"""The frozen layers below the first trained one: what they give is the same in every epoch.

Layers are found and skipped by intercepting their calls, so that nothing here knows an architecture. A model whose
layers hand on more than their first argument is found out by `training.trunk`, which compares losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_intercept import intercepted  # noqa: E402


class Trunk:
    """The lowest `count` layers of a model, with everything below them."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._model, self.count = model, count
        self._below, self._first = list(model.layers[:count]), model.layers[count]

    def outputs(self, tokens: mx.array, **inputs: Any) -> mx.array:
        """What the layer above the trunk gets [B, T, D], for tokens [B, T]."""
        taken: list[mx.array] = []

        def take(plain: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
            taken.append(x)
            return plain(x, *args, **kwargs)  # for what follows, which is never computed

        with intercepted([self._first], take):
            self._model(tokens, **inputs)
        return taken[0]

    @contextmanager
    def given(self, outputs: mx.array | None) -> Iterator[None]:
        """Within it, the model uses these outputs [B, T, D] instead of computing them; None: it computes them."""

        def skip(plain: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return x

        def put(plain: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
            return plain(outputs, *args, **kwargs)

        if outputs is None:
            yield
            return
        with intercepted(self._below, skip), intercepted([self._first], put):
            yield


def to_numpy(array: mx.array) -> NDArray[Any]:
    """The numbers of an array; bfloat16, which NumPy does not have, as its bits in uint16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def from_numpy(array: NDArray[Any]) -> mx.array:
    """The array of which `to_numpy` made this."""
    return mx.array(array).view(mx.bfloat16) if array.dtype == np.uint16 else mx.array(array)
