"""The numbers that everything random starts with: the same on every backend, from seed, name and weight alone."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch

SUBSPACE_ITERATIONS, OVERSAMPLING = 8, 16


def initial_lora_a(name: str, seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The first value of a LoRA A, from its tensor name and the seed alone: uniform within ±1/√inputs.

    `shape` is mlx-lm's: [inputs, rank], or [experts, rank, inputs]. Both backends start with the same numbers.
    """
    inputs = shape[0] if len(shape) == 2 else shape[-1]
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4")
    bound = 1 / np.sqrt(inputs)
    values = np.random.default_rng([seed, *words.tolist()]).uniform(-bound, bound, shape)
    return values.astype(np.float32)


def principal_factors(matrix: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[m, rank] and [rank, n], of equal norms, whose product is the nearest of that rank to a matrix [m, n].

    PiSSA starts there, https://arxiv.org/abs/2404.02948. By subspace iteration, algorithm 4.4 of
    https://arxiv.org/abs/0909.4061, since a whole decomposition of a model's matrices would take hours.
    """
    columns = min(rank + OVERSAMPLING, *matrix.shape)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], columns)).astype(np.float32)
    for _ in range(SUBSPACE_ITERATIONS):
        basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
    left, values, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    roots = np.sqrt(values[:rank])
    return left[:, :rank] * roots, roots[:, None] * (right[:rank] @ basis.T)


def token_keys(batch: Batch, seed: int, step: int) -> NDArray[np.uint32]:
    """[B, T, 3]: a random key of the token's row, the token's position in its row, the row's length.

    What is random in training depends on these alone: it is the same however the rows of an update are cut, padded,
    packed, or divided among ranks.
    """
    lines, columns = np.indices(batch.tokens.shape)
    numbers = lines if batch.numbers is None else batch.numbers
    rows, at, lengths = np.unique(numbers, return_inverse=True, return_counts=True)
    keys = np.array([seed_of(seed, step, int(row) + 1) for row in rows], dtype=np.uint64)
    begins = np.diff(numbers, axis=1, prepend=-2) != 0
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    of_tokens = [(keys & 0xFFFFFFFF)[at].reshape(numbers.shape), positions, lengths[at].reshape(numbers.shape)]
    return np.stack(of_tokens, axis=-1).astype(np.uint32)


def seed_of(*words: int) -> int:
    """A 64-bit seed from any numbers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
