"""Rows packed in one sequence on MLX: isolated by the mask alone, without touching mlx-lm's models.

mlx-lm's models ask the cache of a layer for the attention mask, for the position of the first token and for the keys
and values of earlier ones. `Isolated` is a cache without earlier ones, whose mask keeps attention inside each row. A
row in the middle of a sequence begins at another position, which rotary embeddings cannot see: they turn keys against
queries by the distance alone. Learned positions do see it, and a model whose layers carry a state from token to token
asks no mask; `why_different` finds out on real rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxsft.backends.mlx_models import LOADING_ERRORS, mlx_lm  # noqa: E402
from mlxsft.backends.packing import why_different  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch


class Isolated:
    """The cache of a layer that has read nothing, and lets each token attend to those of its own segment only."""

    offset = 0  # the position of the first token

    def __init__(self, segments: mx.array) -> None:
        self._segments = segments  # [B, T]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Bool [B, 1, T, T]: earlier tokens of the same segment, of the last `window_size` where that is given."""
        places = mx.arange(tokens)
        back = places[:, None] - places[None, :]
        seen = back >= 0
        if window_size is not None:
            seen = seen & (back < window_size)
        return seen & (self._segments[:, None, :, None] == self._segments[:, None, None, :])


def isolation(model: nn.Module, segments: mx.array) -> list[Isolated]:
    """The `cache` argument of a model for packed rows, `segments` [B, T]: as long as the one for generation."""
    return [Isolated(segments)] * len(_caches(model))


def unusual_cache(model: nn.Module) -> str | None:
    """The name of the first kind of cache of this model that is not one of plain attention; None: it has no other."""
    caches = mlx_lm("models.cache")
    plain = (caches.KVCache, caches.RotatingKVCache)
    return next((type(cache).__name__ for cache in _caches(model) if type(cache) not in plain), None)


def _caches(model: nn.Module) -> list[Any]:
    caches: list[Any] = mlx_lm("models.cache").make_prompt_cache(model)
    return caches


def why_not_packed(
    losses: Callable[[Batch], NDArray[np.float32]], packed: Batch, padded: Batch, model: nn.Module
) -> str | None:
    """As `Backend.why_not_packed`; `losses` is the model's."""
    if (kind := unusual_cache(model)) is not None:
        return f"its layers keep what they have read as a {kind}, which knows nothing of rows in a sequence"
    try:
        return why_different(losses, packed, padded, float32=_is_float32(model))
    except LOADING_ERRORS as error:
        return f"mlx-lm's model does not take them: {type(error).__name__}: {error}"


def _is_float32(model: nn.Module) -> bool:
    types = {array.dtype for _, array in tree_flatten(model.parameters())}
    return all(kind == mx.float32 for kind in types if mx.issubdtype(kind, mx.floating))
