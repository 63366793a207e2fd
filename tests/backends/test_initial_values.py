"""What an adapter starts with: numbers of name and seed, or the nearest matrices of a rank."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsft.backends.initial_values import initial_lora_a, principal_factors, token_keys
from mlxsft.data.batches import Batch, pack, stack
from mlxsft.data.places import Origin
from mlxsft.data.render import Example

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


def test_the_keys_of_a_row_are_its_own_however_it_lies() -> None:
    rows = [
        Example(np.arange(n), np.zeros(n, bool), Origin("rows", 1), number=number) for number, n in ((7, 5), (2, 3))
    ]
    side_by_side, packed = token_keys(stack(rows), 0, 4), token_keys(pack([rows[::-1]]), 0, 4)
    assert packed.shape == (1, 8, 3)
    assert packed.dtype == np.uint32
    np.testing.assert_array_equal(packed[0, :3], side_by_side[1, :3])
    np.testing.assert_array_equal(packed[0, 3:8], side_by_side[0, :5])
    assert packed[0, :, 1:].tolist() == [[0, 3], [1, 3], [2, 3], [0, 5], [1, 5], [2, 5], [3, 5], [4, 5]]
    assert token_keys(stack(rows[1:]), 0, 4)[0, 0, 0] == packed[0, 0, 0]
    keys = {int(token_keys(stack([row]), seed, step)[0, 0, 0]) for row in rows for seed in (0, 1) for step in (4, 5)}
    assert len(keys) == 8


def test_lines_without_numbers_are_rows_of_their_own() -> None:
    keys = token_keys(Batch(np.zeros((2, 3), np.int32), np.zeros((2, 3), bool)), 0, 0)
    assert keys[..., 1].tolist() == [[0, 1, 2]] * 2
    assert (keys[..., 2] == 3).all()
    assert len(set(keys[:, 0, 0].tolist())) == 2
