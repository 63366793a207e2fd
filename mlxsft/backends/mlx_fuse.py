"""Layers with an adapter, and quantized ones, as plain layers on MLX.

Everything is computed in float32 and rounded once: a weight that were dequantized to bfloat16 first, and rounded again
with the adapter added, would lose a part of a small adapter. It is done in blocks of rows, so that beside the weight
and the result only a few blocks are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_dora import root  # noqa: E402
from mlxsft.backends.mlx_models import mlx_lm  # noqa: E402

BLOCK_VALUES = 1 << 15

Place = tuple[int | slice, ...]  # some rows of a matrix, or of one of a stack of matrices
Change = Callable[[mx.array, Place], mx.array]


def plain(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """A layer that answers as this one without adapter and without packed numbers; nothing is computed yet.

    With a low-rank adapter its weight is W + s·BA (https://arxiv.org/abs/2106.09685), with DoRA each row of that has
    the length m (https://arxiv.org/abs/2402.09353). The numbers of the weight are of the type.
    """
    if "lora_a" not in layer:
        return _with_weight(layer, dtype, lambda rows, place: rows)
    low_rank: Any = layer
    base, left, right = _factors(layer)

    def changed(rows: mx.array, place: Place) -> mx.array:
        rows += low_rank.scale * (left[place] @ right[place[:-1]])
        if "m" not in layer:
            return rows
        lengths = root(mx.square(rows).sum(axis=1, keepdims=True))
        rows *= low_rank.m[place[-1]].astype(mx.float32)[:, None] / lengths
        return rows

    return _with_weight(base, dtype, changed)


def _factors(layer: nn.Module) -> tuple[Any, mx.array, mx.array]:
    """The layer below an adapter, and [..., rows, rank] and [..., rank, columns] of the change of its weight."""
    a, b = layer.lora_a, layer.lora_b
    if isinstance(a, mx.array):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        if "embedding" in layer:
            return layer.embedding, a, b
        return layer.linear, *((b, a) if a.ndim == 3 else (b.T, a.T))
    raise InputRefused(f"an adapter on a {type(layer).__name__} cannot be fused", "Keep it beside its base.")


def _with_weight(base: Any, dtype: mx.Dtype, change: Change) -> nn.Module:
    """A copy of a linear module, an embedding or experts, not packed, whose weight is what `change` makes of its rows.

    `change` gets rows in float32, and their place.
    """
    holder = nn.Module()
    holder.part = copy.deepcopy(base)  # its arrays are the same ones
    mlx_lm("utils").dequantize_model(holder)
    made: nn.Module = holder.part
    if "scales" in made:
        raise InputRefused(f"mlx-lm cannot dequantize a {type(base).__name__}")
    made.weight = _in_blocks(base, dtype, change)
    return made


def _in_blocks(base: Any, dtype: mx.Dtype, change: Change) -> mx.array:
    columns = base.scales.shape[-1] * base.group_size if "scales" in base else base.weight.shape[-1]
    made = mx.zeros((*base.weight.shape[:-1], columns), dtype)
    for place in _places(base.weight.shape[:-1], max(1, BLOCK_VALUES // columns)):
        made[place] = change(_rows(base, place), place).astype(
            dtype
        )  # written into the same memory, one after the other
    return made


def _rows(base: Any, place: Place) -> mx.array:
    """Rows of a weight, float32, dequantized where they must be, with scales of float32 so that nothing is rounded."""
    rows: mx.array
    if "scales" not in base:
        rows = base.weight[place]
        return rows.astype(mx.float32)
    biases = _wide(base.biases[place]) if base.get("biases") is not None else None
    sizes = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    rows = mx.dequantize(base.weight[place], _wide(base.scales[place]), biases, **sizes)
    return rows.astype(mx.float32)


def _wide(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array


def _places(shape: tuple[int, ...], step: int) -> Iterator[Place]:
    """Every row of matrices in a stack of this shape, without columns, up to `step` at a time."""
    for index in product(*map(range, shape[:-1])):
        for start in range(0, shape[-1], step):
            yield (*index, slice(start, start + step))
