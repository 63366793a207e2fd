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
from mlxsft.backends.pieces import pieces

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

from mlxsft.backends.mlx_exp import is_faster, softmax, swiglu  # noqa: E402
from mlxsft.backends.mlx_models import mlx_lm  # noqa: E402

ATTENTION = "scaled_dot_product_attention"
GATE = "swiglu"
BLOCK = 128  # queries computed at once, about


@contextmanager
def economical_functions() -> Iterator[None]:
    """Within it, mlx-lm's models compute attention in blocks, and gates with `mlx_exp` where that is faster.

    All of them call one function for each, which each module of mlx-lm has imported under its name; outside it is as
    before.
    """
    attention = getattr(mlx_lm("models.base"), ATTENTION)
    gate = getattr(mlx_lm("models.activations"), GATE)

    def blockwise(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> Any:
        if queries.shape[-2] != keys.shape[-2] or sinks is not None:  # generation, or a learned place to look at
            return attention(queries, keys, values, cache, scale, mask, sinks)
        return in_blocks(queries, keys, values, scale, mask)

    def gated(gate_input: mx.array, x: mx.array) -> Any:
        return swiglu(gate_input, x) if is_faster(gate_input) else gate(gate_input, x)

    with _replaced(ATTENTION, attention, blockwise), _replaced(GATE, gate, gated):
        yield


@contextmanager
def _replaced(name: str, plain: Any, other: Any) -> Iterator[None]:
    """Within it, a function that mlx-lm's models have imported under a name is another one."""
    modules = [
        module
        for path, module in sys.modules.copy().items()
        if path.startswith("mlx_lm.models.") and getattr(module, name, None) is plain
    ]
    for module in modules:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, name, plain)


def in_blocks(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
    """Attention [B, H, T, D] of queries to keys and values [B, H or fewer, T, D].

    `mask` is "causal", None, or an array that broadcasts to [B, H, T, T]: True or 0 where a query sees a key.
    """
    causal, masks = isinstance(mask, str), [] if mask is None or isinstance(mask, str) else [mask]
    tokens = queries.shape[-2]
    blocks = [(block.start, block.stop) for block in pieces(tokens, BLOCK)]
    if len(blocks) == 1:
        return _attend(scale, causal)(queries, keys, values, *masks)

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
        if is_faster(queries):
            return _attend_by_parts(queries, keys, values, scale, seen)
        result: mx.array = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=seen)
        return result

    return attend


def _attend_by_parts(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Any) -> mx.array:
    """The same from products and `mlx_exp.softmax`. Queries that share keys lie one after another in one product."""
    rows, heads, length, width = queries.shape
    shared, seen = keys.shape[1], keys.shape[2]
    together = (queries * scale).reshape(rows, shared, heads // shared * length, width)
    scores = together @ keys.swapaxes(-1, -2)
    if mask is not None:
        scores = scores.reshape(rows, shared, heads // shared, length, seen) + _added(mask, length, seen, shared)
    weights = softmax(scores).reshape(rows, shared, heads // shared * length, seen)
    result: mx.array = (weights @ values).reshape(rows, heads, length, values.shape[-1])
    return result


def _added(mask: Any, length: int, seen: int, shared: int) -> Any:
    """A mask as numbers to add to scores [B, heads of keys, queries a head, T, S]."""
    if isinstance(mask, str):
        mask = mx.arange(seen - length, seen)[:, None] >= mx.arange(seen)
    if mask.dtype == mx.bool_:
        mask = mx.where(mask, 0.0, mx.finfo(mx.float32).min)
    if mask.ndim == 4:
        heads = mask.shape[1]
        mask = mask.reshape(mask.shape[0], *((1, 1) if heads == 1 else (shared, heads // shared)), *mask.shape[2:])
    return mask
