"""When overfitting is said, as tables of losses."""

from __future__ import annotations

import pytest

from mlxsft.training.events import Evaluated, Event, Overfitted, RolledBack, Stepped
from mlxsft.training.overfitting import Overfitting


def run(training: list[list[float]], valid: list[float]) -> list[Event]:
    """Losses of the steps before each evaluation, and the validation losses, the first of them at step 0."""
    made: list[Event] = [Evaluated(0, valid[0], 5, 1, False, 0.1)]
    step = 0
    for losses, judged in zip(training, valid[1:], strict=True):
        for loss in losses:
            step += 1
            made.append(Stepped(step, 0.1, loss, 1.0, 1e-3, 10, 20, 20, 0.1, 1))
        made.append(Evaluated(step, judged, 5, 1, False, 0.1))
    return made


def said(events: list[Event]) -> list[Event]:
    watch = Overfitting()
    return [told for event in events for told in watch.see(event)]


def test_falling_training_and_two_rises_of_validation_are_said_once() -> None:
    events = run([[3.0, 2.0], [1.5], [1.0], [0.5], [0.25]], [4.0, 3.0, 3.5, 3.75, 4.0, 5.0])
    assert said(events) == [Overfitted(4, [2, 3, 4], [2.5, 1.5, 1.0], [3.0, 3.5, 3.75])]


@pytest.mark.parametrize(
    ("training", "valid"),
    [
        ([[3.0], [2.0], [1.0]], [4.0, 3.0, 3.5, 3.25]),  # one rise
        ([[3.0], [2.0], [2.5]], [4.0, 3.0, 3.5, 3.75]),  # training rises too
        ([[3.0], [2.0]], [2.0, 3.0, 4.0]),  # before training there is no training loss to fall from
        ([[3.0], [2.0], [1.0]], [4.0, 3.0, 2.5, 2.0]),
    ],
)
def test_anything_else_is_not(training: list[list[float]], valid: list[float]) -> None:
    assert said(run(training, valid)) == []


def test_tokens_weigh_and_what_is_not_finite_is_left_out() -> None:
    events = run([[3.0], [2.0], [1.0]], [4.0, 3.0, 3.5, 3.75])
    events.insert(2, Stepped(1, 0.1, 7.0, 1.0, 1e-3, 30, 40, 40, 0.1, 1))
    events.insert(3, Stepped(1, 0.1, None, None, 1e-3, 30, 40, 40, 0.1, 1, skipped=True))
    events.insert(4, Evaluated(1, None, 5, 1, False, 0.1))
    (told,) = said(events)
    assert isinstance(told, Overfitted)
    assert told.training_losses == [6.0, 2.0, 1.0]


def test_a_resumed_run_does_not_say_it_again() -> None:
    events = run([[3.0], [2.0], [1.0], [0.5]], [4.0, 3.0, 3.5, 3.75, 4.0])
    watch, again = Overfitting(), Overfitting()
    before = [told for event in events[:-2] for told in (event, *watch.see(event))]
    assert isinstance(before[-1], Overfitted)
    for event in before:
        again.see(event)
    assert [told for event in events[-2:] for told in again.see(event)] == []


def test_what_a_run_took_back_does_not_count() -> None:
    events = run([[3.0], [2.0], [1.0]], [4.0, 3.0, 3.5, 3.75])
    twice = [*events[:5], RolledBack(2, 1, 0.5, "it ran away"), *events[3:]]
    assert events[4] == Evaluated(2, 3.5, 5, 1, False, 0.1)
    assert said(twice) == said(events) == [Overfitted(3, [1, 2, 3], [3.0, 2.0, 1.0], [3.0, 3.5, 3.75])]
    assert said([*events, RolledBack(3, 1, 0.5, "it ran away"), *events[3:]]) == said(events) * 2
