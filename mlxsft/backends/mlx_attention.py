"""Attention whose backward pass needs memory linear in the length: queries in blocks, each computed again.

MLX has no fused backward pass for attention: the gradient keeps the scores of every query with every key, for every
head, several times over. Here a block of queries is computed at a time, and again in the backward pass, and looks at no
key after its last query, which saves half of the arithmetic of causal attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

from mlxsft.backends.mlx_models import mlx_lm  # noqa: E402

NAME = "scaled_dot_product_attention"
BLOCK = 128  # queries computed at once


@contextmanager
def blockwise_attention() -> Iterator[None]:
    """Within it, mlx-lm's models compute their attention in blocks.

    All of them call one function, which each module of mlx-lm has imported under its name; outside it is as before.
    """
    plain = getattr(mlx_lm("models.base"), NAME)
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("mlx_lm.models.") and getattr(module, NAME, None) is plain
    ]

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> mx.array:
        if queries.shape[-2] != keys.shape[-2] or sinks is not None:  # generation, or a learned place to look at
            result: mx.array = plain(queries, keys, values, cache, scale, mask, sinks)
            return result
        return in_blocks(queries, keys, values, scale, mask)

    for module in modules:
        setattr(module, NAME, attention)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, NAME, plain)


def in_blocks(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention [B, H, T, D] of queries to keys and values [B, H or fewer, T, D].

    `mask` is "causal", None, or an array that broadcasts to [B, H, T, T]: True or 0 where a query sees a key.
    """
    causal, masks = isinstance(mask, str), [] if mask is None or isinstance(mask, str) else [mask]
    tokens = queries.shape[-2]
    if tokens <= BLOCK:
        return _attend(scale, causal)(queries, keys, values, *masks)
    blocks = [(start, min(start + BLOCK, tokens)) for start in range(0, tokens, BLOCK)]

    def part(block: tuple[int, int], queries: mx.array, keys: mx.array, values: mx.array, *masks: mx.array) -> Any:
        """What the queries of a block need, and how far the keys go that they see."""
        start, end = block
        seen = end if causal else tokens
        cut = [m[..., start:end, :] if m.shape[-2] > 1 else m for m in masks]
        return seen, (queries[..., start:end, :], keys[..., :seen, :], values[..., :seen, :], *cut)

    @mx.custom_function
    def attention(*inputs: mx.array) -> mx.array:
        done: list[mx.array] = []
        for block in blocks:
            _, (some, *others) = part(block, *inputs)
            done.append(_attend(scale, causal)(after(some, done[-1:]), *others))
        return mx.concatenate(done, axis=-2)

    @attention.vjp
    def attention_vjp(inputs: Any, slope: mx.array, _: Any) -> Any:
        _, keys, values, *masks = inputs
        query_slopes: list[mx.array] = []
        slopes = [mx.zeros_like(keys), mx.zeros_like(values)]
        for start, end in blocks:
            seen, (some, *others) = part((start, end), *inputs)
            some = after(some, [*query_slopes[-1:], *slopes])
            attend = _attend(scale, causal, *others[2:])
            _, (query_slope, *more) = mx.vjp(attend, [some, *others[:2]], [slope[..., start:end, :]])
            query_slopes.append(query_slope)
            slopes = [
                mx.concatenate([total[..., :seen, :] + part, total[..., seen:, :]], axis=-2)
                for total, part in zip(slopes, more, strict=True)
            ]
        return mx.concatenate(query_slopes, axis=-2), *slopes, *map(mx.zeros_like, masks)

    outputs: Any = attention(queries, keys, values, *masks)
    result: mx.array = outputs
    return result


def after(array: mx.array, others: list[mx.array]) -> mx.array:
    """The array, which is not there before the others are: one block after another, not all of them in memory."""
    result: mx.array = mx.depends([array], others)[0] if others else array
    return result


def _attend(scale: float, causal: bool, *fixed: mx.array) -> Callable[..., mx.array]:
    """Attention of some queries, the last of them at the last key where it is `causal`; `fixed` may hold a mask."""

    def attend(queries: mx.array, keys: mx.array, values: mx.array, *mask: mx.array) -> mx.array:
        seen = "causal" if causal else (*mask, *fixed, None)[0]
        result: mx.array = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=seen)
        return result

    return attend
