"""The learning rate, as numbers."""

from __future__ import annotations

import pytest
import torch
from transformers import optimization

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


def reference(name: str, total: int, warmup: int, **settings: object) -> list[float]:
    """transformers' rates of a run; its first step has a rate of zero."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = getattr(optimization, name)(optimizer, num_warmup_steps=warmup, **settings)
    found = []
    for _ in range(total):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("settings", "name", "theirs"),
    [
        ({"schedule": "linear"}, "get_linear_schedule_with_warmup", {"num_training_steps": 40}),
        ({"schedule": "cosine"}, "get_cosine_schedule_with_warmup", {"num_training_steps": 40}),
        (
            {"schedule": "cosine", "final_learning_rate": 0.1},
            "get_cosine_with_min_lr_schedule_with_warmup",
            {"num_training_steps": 40, "min_lr_rate": 0.1},
        ),
        (
            {"schedule": "cosine_with_restarts", "cycles": 3},
            "get_cosine_with_hard_restarts_schedule_with_warmup",
            {"num_training_steps": 40, "num_cycles": 3},
        ),
        ({"schedule": "inverse_sqrt"}, "get_inverse_sqrt_schedule", {}),
        (
            {"schedule": "warmup_stable_decay", "decay": 0.25, "final_learning_rate": 0.1},
            "get_wsd_schedule",
            {"num_training_steps": 40, "num_decay_steps": 10, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
        ({"schedule": "constant"}, "get_constant_schedule_with_warmup", {}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_after_the_warm_up_are_those_of_transformers(
    settings: dict[str, object], name: str, theirs: dict[str, object], warmup: int
) -> None:
    expected = reference(name, 40, warmup, **theirs)
    assert rates(40, warmup=warmup, **settings)[warmup:] == pytest.approx(expected[warmup:], abs=1e-12)


def test_a_restart_begins_whole() -> None:
    assert rates(6, schedule="cosine_with_restarts") == pytest.approx([1.0, 0.75, 0.25, 1.0, 0.75, 0.25])


def test_warm_up_stable_decay_falls_in_the_last_fifth() -> None:
    assert rates(10, schedule="warmup_stable_decay", warmup=2)[1:] == [1.0] * 8 + [0.5]
    assert rates(4, schedule="warmup_stable_decay", warmup=2, decay=9)[2:] == [1.0, pytest.approx(8 / 9)]
