"""The learning rate of each step, and the loss that none should have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlxsft.recipe_training import TrainRecipe

SCALE_WITHOUT_WARMUP = 10_000  # steps of inverse_sqrt until the rate has fallen to 1 / √2


def in_steps(amount: float | int, total_steps: int) -> int:
    """A setting that is a share of the run (a float) or a number of steps (an int), as steps."""
    return amount if isinstance(amount, int) else round(amount * total_steps)


def learning_rate(step: int, total_steps: int, train: TrainRecipe) -> float:
    """The rate of `step` (1-based): a linear warm-up from zero that ends at `learning_rate`, then the schedule.

    After it the rate falls towards `final_learning_rate` over `decay` steps, or over the rest of the run, counted so
    that the first of them still has the full rate and none in the run is wasted on a rate of zero. The formulas are
    those of https://github.com/huggingface/transformers/blob/main/src/transformers/optimization.py, where a step
    after the warm-up has the same rate.
    """
    warmup = min(in_steps(train.warmup, total_steps), total_steps)
    if step <= warmup:
        return train.learning_rate * step / warmup
    rest, done = total_steps - warmup, step - warmup - 1  # steps after the warm-up; those of them that are over
    if train.schedule == "inverse_sqrt":
        scale = warmup or SCALE_WITHOUT_WARMUP
        return train.learning_rate / math.sqrt((done + scale) / scale)
    span = max(1, rest if train.decay is None else in_steps(train.decay, total_steps))
    if train.schedule == "warmup_stable_decay":
        done = max(0, done - max(0, rest - span))
    return train.final_learning_rate + (train.learning_rate - train.final_learning_rate) * _height(done, span, train)


def _height(done: int, span: int, train: TrainRecipe) -> float:
    """The height of a fall from 1 to 0, `done` of its `span` steps after it began."""
    if train.schedule == "constant":
        return 1.0
    if done >= span:
        return 0.0
    if train.schedule in ("linear", "warmup_stable_decay"):
        return 1.0 - done / span
    cycle = done * (train.cycles or 1) % span / span  # whole numbers: a restart is not lost to rounding
    return 0.5 * (1.0 + math.cos(math.pi * cycle))


def loss_limit(train: TrainRecipe, first_loss: float | None) -> float | None:
    """The loss of a step, in nats a token, above which a run counts as diverged; None for no limit.

    20 nats are more than guessing evenly among any vocabulary's tokens costs: 12 for 160,000 of them.
    """
    if train.loss_limit == "auto":
        return None if first_loss is None else max(20.0, 3 * first_loss)
    return train.loss_limit
