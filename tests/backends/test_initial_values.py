"""What an adapter starts with: numbers of name and seed, or the nearest matrices of a rank."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsft.backends.initial_values import initial_lora_a, principal_factors

NAME = "model.layers.0.self_attn.q_proj.lora_a"


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first = initial_lora_a(NAME, 0, (64, 8))
    assert first.dtype == np.float32
    assert np.array_equal(first, initial_lora_a(NAME, 0, (64, 8)))
    assert not np.array_equal(first, initial_lora_a(NAME, 1, (64, 8)))
    assert not np.array_equal(first, initial_lora_a(NAME.replace("q_proj", "k_proj"), 0, (64, 8)))


def test_initial_values_of_another_day() -> None:
    """The numbers themselves: a checkpoint of today resumes, and the other backend begins, with the same ones."""
    expected = [-0.0378537, 0.4426506, -0.2843721, 0.2738045, -0.0839273, -0.0921713, -0.4844988, 0.4383206]
    assert initial_lora_a(NAME, 7, (4, 2)).ravel().tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("shape", "inputs"), [((400, 8), 400), ((4, 8, 100), 100)])
def test_initial_values_fill_the_range(shape: tuple[int, ...], inputs: int) -> None:
    values = np.abs(initial_lora_a(NAME, 0, shape))
    assert 0.98 < values.max() * np.sqrt(inputs) <= 1


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (300, 200), (200, 300)])
def test_principal_factors_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal(shape) * np.linspace(1, 0.05, shape[1])).astype(np.float32)
    left, right = principal_factors(matrix, 4)
    u, values, vt = np.linalg.svd(matrix)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    assert left.dtype == right.dtype == np.float32
    error, least = np.linalg.norm(matrix - left @ right), np.linalg.norm(matrix - best)
    assert error < least * (1 + 1e-4)
    np.testing.assert_allclose(np.square(left).sum(axis=0), values[:4], rtol=1e-3)
    np.testing.assert_allclose(np.square(right).sum(axis=1), values[:4], rtol=1e-3)
