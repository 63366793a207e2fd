"""Overfitting, as it shows in the events of a run: training falls while validation rises."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from mlxsft.training.events import Evaluated, Event, Overfitted, RolledBack, Stepped

RISES = 2  # evaluations in a row; a single one is often noise


class Overfitting:
    """Sees the events of a run, those before a resume too, and answers with one Overfitted at most.

    The training loss of an evaluation is the mean, in nats a trained token, of the steps since the evaluation before.
    """

    def __init__(self) -> None:
        self.nats, self.tokens = 0.0, 0  # since the last evaluation
        self.points: deque[tuple[int, float, float]] = deque(maxlen=RISES + 1)  # step, training loss, validation loss
        self.said_at: int | None = None  # step

    def see(self, event: Event) -> list[Event]:
        match event:
            case Stepped(loss=float(loss), trained_tokens=tokens):
                self.nats, self.tokens = self.nats + loss * tokens, self.tokens + tokens
            case Evaluated(loss=float(loss), step=step) if self.tokens:
                self.points.append((step, self.nats / self.tokens, loss))
                self.nats, self.tokens = 0.0, 0
                if self.said_at is None and self._parted():
                    self.said_at = step
                    return [Overfitted(step, *(list(column) for column in zip(*self.points, strict=True)))]
            case Overfitted(step=step):
                self.said_at = step
            case RolledBack(to_step=to_step):
                self.nats, self.tokens = 0.0, 0
                self.points = deque((point for point in self.points if point[0] <= to_step), maxlen=RISES + 1)
                self.said_at = None if (self.said_at or 0) > to_step else self.said_at
        return []

    def _parted(self) -> bool:
        pairs = list(pairwise(self.points))
        return len(pairs) == RISES and all(b[1] < a[1] and b[2] > a[2] for a, b in pairs)
