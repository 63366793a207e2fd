"""What of a run's events lasts, when the run went back."""

from __future__ import annotations

from mlxsft.training.events import Evaluated, Event, Noted, RolledBack, Sampled, Saved, Stepped, lasting


def at(step: int, loss: float) -> list[Event]:
    made = Stepped(step, 0.1, loss, 1.0, 1e-3, 10, 20, 20, 0.1, 1)
    return [made, Evaluated(step, loss, 5, 1, True, 0.1), Sampled(step, "?", str(loss)), Saved(step, f"step-{step}")]


def test_of_steps_that_were_made_twice_the_last_time_lasts() -> None:
    back = RolledBack(3, 1, 0.5, "it ran away")
    told = [*at(1, 3.0), *at(2, 9.0), Noted("so it is"), *at(3, 99.0), back, *at(2, 2.0), *at(3, 1.0)]
    assert lasting(told) == [*at(1, 3.0), Noted("so it is"), back, *at(2, 2.0), *at(3, 1.0)]
