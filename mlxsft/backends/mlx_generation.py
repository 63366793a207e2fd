"""Choosing the next token on MLX, with what mlx-lm has for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from mlxsft.backends import Constraint, Sampling, may_follow
from mlxsft.backends.blas import load_blas
from mlxsft.backends.initial_values import seed_of

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402

from mlxsft.backends.mlx_models import mlx_lm  # noqa: E402

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far [T], and logits [1, V] → logits [1, V]


def sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Log-probabilities [1, V] to token ids [1], with mlx-lm's filters and a random key of its own."""
    filters = mlx_lm("sample_utils")
    if sampling.temperature == 0:
        greedy: Callable[[mx.array], mx.array] = filters.greedy_sampler
        return greedy
    key = mx.random.key(seed_of(time.time_ns()) if sampling.seed is None else sampling.seed)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if 0 < sampling.top_p < 1:
            logprobs = filters.apply_top_p(logprobs, sampling.top_p)
        if sampling.min_p > 0:
            logprobs = filters.apply_min_p(logprobs, sampling.min_p)
        if 0 < sampling.top_k < logprobs.shape[-1]:
            logprobs = filters.apply_top_k(logprobs, sampling.top_k)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs / sampling.temperature, key=now)

    return sample


def processors(sampling: Sampling, constraint: Constraint | None = None) -> list[Processor]:
    """What logits go through before a token is sampled: mlx-lm's repetition penalty, then the constraint."""
    made: list[Processor] = mlx_lm("sample_utils").make_logits_processors(
        repetition_penalty=sampling.repetition_penalty
    )
    return made if constraint is None else [*made, _constrained(constraint)]


def _constrained(constraint: Constraint) -> Processor:
    """Minus infinity for what may not follow."""
    begun = False

    def masked(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal begun
        last = int(np.array(tokens[-1])) if begun else None
        begun = True
        mx.async_eval(logits)  # type: ignore[no-untyped-call]  # computed while the constraint is asked
        return mx.where(mx.array(may_follow(constraint, last, logits.shape[-1])), logits, -mx.inf)

    return masked
