"""Overfitting, as it shows in the events of a run: training falls while validation rises."""

from __future__ import annotations

from collections import deque
from itertools import pairwise

from mlxsft.training.events import Evaluated, Event, Overfitted, Stepped

RISES = 2  # evaluations in a row; a single one is often noise


class Overfitting:
    """Sees the events of a run, those before a resume too, and answers with one Overfitted at most.

    The training loss of an evaluation is the mean, in nats a trained token, of the steps since the evaluation before.
    """

    def __init__(self) -> None:
        self.nats, self.tokens = 0.0, 0  # since the last evaluation
        self.points: deque[tuple[int, float, float]] = deque(maxlen=RISES + 1)  # step, training loss, validation loss
        self.said = False

    def see(self, event: Event) -> list[Event]:
        match event:
            case Stepped(loss=float(loss), trained_tokens=tokens):
                self.nats, self.tokens = self.nats + loss * tokens, self.tokens + tokens
            case Evaluated(loss=float(loss), step=step) if self.tokens:
                self.points.append((step, self.nats / self.tokens, loss))
                self.nats, self.tokens = 0.0, 0
                if not self.said and self._parted():
                    self.said = True
                    return [Overfitted(step, *(list(column) for column in zip(*self.points, strict=True)))]
            case Overfitted():
                self.said = True
        return []

    def _parted(self) -> bool:
        pairs = list(pairwise(self.points))
        return len(pairs) == RISES and all(b[1] < a[1] and b[2] > a[2] for a, b in pairs)
