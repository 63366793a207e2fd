"""Rows packed in one sequence on MLX: isolated by the mask alone, without touching mlx-lm's models.

mlx-lm's models ask the cache of a layer for the attention mask, for the position of the first token and for the keys
and values of earlier ones. `Isolated` is a cache without earlier ones, whose mask keeps attention inside each row. A
row in the middle of a sequence begins at another position, which rotary embeddings cannot see: they turn keys against
queries by the distance alone. Learned positions do see it, and a model whose layers carry a state from token to token
asks no mask; `why_different` finds out on real rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlxsft.backends.mlx_models import LOADING_ERRORS, mlx_lm  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch

# The largest difference of a token's loss that rounding explains, in nats, and as much again for each nat of the loss.
TOLERANCE = 1e-4  # in float32
# In bfloat16 and float16 a token's loss rounds by up to half a nat, so the mean difference is compared with what it is
# when rows see each other. Measured on three small Llamas in bfloat16: 0.006 to 0.05 of it.
SHARE_OF_LEAK = 0.1


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


def why_different(
    losses: Callable[[Batch], NDArray[np.float32]], packed: Batch, padded: Batch, model: nn.Module
) -> str | None:
    """How the losses of the same rows differ between packed and padded, as a clause; None: by rounding at most."""
    try:
        in_sequence = losses(packed)[packed.mask]
    except LOADING_ERRORS as error:
        return f"mlx-lm's model does not take them: {type(error).__name__}: {error}"
    alone = losses(padded)[padded.mask]
    different = np.abs(in_sequence - alone)
    if _is_float32(model):
        rounded = bool((different <= TOLERANCE * (1 + alone)).all())
    else:
        leaking = losses(replace(packed, segments=np.ones_like(packed.tokens)))[packed.mask]
        rounded = bool(different.mean() <= SHARE_OF_LEAK * np.abs(leaking - alone).mean())
    if rounded:
        return None
    return f"the loss of a token differs by {different.max():.2g} nats from its loss in a row of its own"


def _is_float32(model: nn.Module) -> bool:
    types = {array.dtype for _, array in tree_flatten(model.parameters())}
    return all(kind == mx.float32 for kind in types if mx.issubdtype(kind, mx.floating))
