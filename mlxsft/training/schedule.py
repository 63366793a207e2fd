"""The learning rate of each step, and the loss that none should have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxsft.recipe_training import TrainRecipe


def in_steps(amount: float | int, total_steps: int) -> int:
    """A setting that is a share of the run (a float) or a number of steps (an int), as steps."""
    return amount if isinstance(amount, int) else round(amount * total_steps)


def learning_rate(step: int, total_steps: int, train: TrainRecipe) -> float:
    """The rate of `step` (1-based): a linear warm-up from zero that ends at `learning_rate`, then the schedule.

    After it the rate falls towards `final_learning_rate` over `decay` steps, or over the rest of the run, counted so
    that the first of them still has the full rate and none in the run is wasted on a rate of zero.
    """
    warmup = min(in_steps(train.warmup, total_steps), total_steps)
    if step <= warmup:
        return train.learning_rate * step / warmup
    span = total_steps - warmup if train.decay is None else in_steps(train.decay, total_steps)
    progress = min(1.0, (step - warmup - 1) / max(1, span))
    fall = train.learning_rate - train.final_learning_rate
    if train.schedule == "linear":
        return train.learning_rate - fall * progress
    if train.schedule == "cosine":
        return train.final_learning_rate + fall * 0.5 * (1.0 + math.cos(math.pi * progress))
    return train.learning_rate


def loss_limit(train: TrainRecipe, first_loss: float | None) -> float | None:
    """The loss of a step, in nats a token, above which a run counts as diverged; None for no limit.

    20 nats are more than guessing evenly among any vocabulary's tokens costs: 12 for 160,000 of them.
    """
    if train.loss_limit == "auto":
        return None if first_loss is None else max(20.0, 3 * first_loss)
    return train.loss_limit
