"""The learning rate, as numbers."""

from __future__ import annotations

import pytest

from mlxsft.recipe_training import TrainRecipe
from mlxsft.training.schedule import in_steps, learning_rate


def rates(total: int, **settings: object) -> list[float]:
    train = TrainRecipe.model_validate({"learning_rate": 1.0, "warmup": 0, **settings})
    return [learning_rate(step, total, train) for step in range(1, total + 1)]


def test_shares_are_of_the_run_and_whole_numbers_are_steps() -> None:
    assert in_steps(0.25, 200) == 50
    assert in_steps(1, 200) == 1
    assert in_steps(1.0, 200) == 200


def test_constant() -> None:
    assert rates(4, schedule="constant") == [1.0, 1.0, 1.0, 1.0]


def test_linear_begins_whole_and_wastes_no_step_on_zero() -> None:
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine() -> None:
    assert rates(4) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_warm_up_ends_at_the_full_rate() -> None:
    assert rates(6, warmup=4, schedule="constant") == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(8, warmup=0.25, schedule="linear")[:3] == [0.5, 1.0, 1.0]


def test_decay_ends_at_the_final_rate_and_stays_there() -> None:
    assert rates(5, schedule="linear", decay=2, final_learning_rate=0.5) == [1.0, 0.75, 0.5, 0.5, 0.5]


def test_a_warm_up_longer_than_the_run_never_exceeds_the_rate() -> None:
    assert max(rates(3, warmup=10)) <= 1.0
