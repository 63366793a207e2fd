"""Rows shared out over the cores of a CPU: each in one part, and the same updates for any number of cores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlxsft.backends.blas import blas_threads, load_blas, set_blas_threads
from mlxsft.backends.mlx import MlxBackend
from mlxsft.backends.mlx_cores import Cores
from mlxsft.data.batches import Batch
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import make_batch, rows_of

Trainer = Callable[..., MlxBackend]


@pytest.mark.parametrize(("rows", "threads", "expected"), [(4, 2, 2), (3, 2, 2), (1, 4, 1), (8, 3, 3), (4, 1, 1)])
def test_every_row_is_in_one_part_that_ends_with_its_last_trained_token(rows: int, threads: int, expected: int) -> None:
    batch = make_batch(rows=rows)
    parts = Cores("cpu", threads).parts(batch)
    assert len(parts) == expected
    numbers = np.concatenate([np.arange(rows)[part.place[0]] for part in parts])
    assert sorted(numbers.tolist()) == list(range(rows))
    assert sum(int(part.batch.mask.sum()) for part in parts) == int(batch.mask.sum())
    for part in parts:
        np.testing.assert_array_equal(part.batch.tokens, batch.tokens[part.place])
        assert part.batch.mask[:, -1].any()


def test_a_gpu_computes_the_batch_as_it_is() -> None:
    batch = make_batch()
    (part,) = Cores("gpu", 4).parts(batch)
    np.testing.assert_array_equal(part.batch.tokens, batch.tokens)


@pytest.mark.parametrize("settings", [{}, {"checkpoint_activations": True}])
def test_any_number_of_cores_makes_the_same_updates(trainer: Trainer, settings: dict[str, bool]) -> None:
    """Twenty updates with dropout, of eight rows that come in micro-batches of five and three."""
    adapter = AdapterRecipe(rank=4, alpha=8.0, dropout=0.3)
    alone, shared = trainer(adapter, **settings), trainer(adapter, **settings)
    alone._cores, shared._cores = Cores("cpu", 1), Cores("cpu", 3)
    losses = []
    for backend in (alone, shared):
        for step in range(20):
            for batch in rows_of(make_batch(seed=step), 5):
                backend.accumulate(batch)
            backend.apply(3e-3, 1.0)
        losses.append(backend.losses(make_batch()))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    one, other = alone.adapter_state(), shared.adapter_state()
    drift = np.concatenate([np.abs(one[name] - other[name]).ravel() for name in one])
    assert drift.max() < 5e-6  # of values that moved by up to 0.06
    assert drift.mean() < 1e-7


def test_rows_without_anything_trained_make_no_part(trainer: Trainer) -> None:
    whole, backend = make_batch(rows=4), trainer()
    mask = whole.mask.copy()
    mask[1::2] = False
    backend._cores = Cores("cpu", 2)
    (part,) = backend._cores.parts(Batch(whole.tokens, mask))
    assert part.place[0] == slice(0, None, 2)
    assert backend.accumulate(Batch(whole.tokens, mask))[0] == pytest.approx(backend.losses(whole)[::2].sum(), rel=1e-5)
    assert [len(part.batch.tokens) for part in backend._cores.parts(Batch(whole.tokens, mask), whole=True)] == [2, 2]


def test_the_threads_of_the_blas_are_set_and_told() -> None:
    if load_blas()[0] is None:
        pytest.skip("there is no BLAS whose threads could be set")
    before = blas_threads()
    try:
        set_blas_threads(1)
        assert blas_threads() == 1
    finally:
        set_blas_threads(before)
    assert blas_threads() == before
