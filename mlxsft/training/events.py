"""What happens in a run, as values: the loop yields them, files and consoles are made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """Something that happened; `kind` is what the JSON calls it."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        """One line of JSON: `event` first, then the fields."""
        return json.dumps({"event": self.kind, **asdict(self)}, ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True)
class Noted(Event):
    """Something that the person should know."""

    kind = "note"
    message: str


@dataclass(frozen=True)
class LeftOutRows(Event):
    """Rows that are not trained, one sentence a row with its file:line and reason."""

    kind = "left_out"
    rows: list[str]


@dataclass(frozen=True)
class Started(Event):
    """A run begins, or goes on after `step` steps. `ledger`: rows by what became of them."""

    kind = "start"
    model: str
    backend: str
    device: str
    step: int
    total_steps: int
    epochs: float
    parameters: int
    trainable_parameters: int
    ledger: dict[str, int]
    template: str
    time: str
    ranks: int = 1


@dataclass(frozen=True)
class Restarted(Event):
    """A training process died of `cause`; another one goes on after `step` steps, the `restart`-th of this command."""

    kind = "restart"
    step: int
    cause: str
    restart: int
    micro_batch_tokens: int


@dataclass(frozen=True)
class TrunkCached(Event):
    """What the frozen lower layers give is being kept, in memory or on disk; `done` is the share (0 to 1) so far."""

    kind = "trunk"
    layers: int
    place: str
    bytes: int
    done: float


@dataclass(frozen=True)
class Stepped(Event):
    """One update was made, or skipped because loss or gradient was not finite (then those are null).

    `loss` is in nats a trained token; `trained_tokens` and `tokens` (with the prompts) are those of this step;
    `computed_tokens` counts the padding too.
    """

    kind = "step"
    step: int
    epoch: float
    loss: float | None
    gradient_norm: float | None
    learning_rate: float
    trained_tokens: int
    tokens: int
    computed_tokens: int
    seconds: float
    peak_bytes: int
    skipped: bool = False


@dataclass(frozen=True)
class Evaluated(Event):
    """The loss, in nats a trained token, over all held-out rows (null: not finite).

    `best`: the lowest so far after step 0, which is the model before training.
    """

    kind = "eval"
    step: int
    loss: float | None
    tokens: int
    rows: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class Overfitted(Event):
    """Training and validation part: losses of the last evaluations, with the mean of the steps before each."""

    kind = "overfitting"
    step: int
    steps: list[int]
    training_losses: list[float]
    valid_losses: list[float]


@dataclass(frozen=True)
class Sampled(Event):
    """What the model answers to a prompt of `eval.samples`."""

    kind = "sample"
    step: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Saved(Event):
    """Adapter and checkpoint are on disk."""

    kind = "save"
    step: int
    path: str


@dataclass(frozen=True)
class RolledBack(Event):
    """The run diverged at `step`: it goes on from the good state of `to_step`, at `rate_factor` of the rate."""

    kind = "rolled_back"
    step: int
    to_step: int
    rate_factor: float
    reason: str


@dataclass(frozen=True)
class Finished(Event):
    """The run is over: `reason` is done, interrupted, or patience.

    `padding_share` (0 to 1) is the share of all tokens computed in training that was padding. `valid_loss_before` is
    that of step 0; `best_valid_loss`, `best_step` and `evaluations` are of the steps after it. `adapter_step` is the
    step whose adapter lies in the run folder.
    """

    kind = "end"
    reason: str
    step: int
    total_steps: int
    skipped_steps: int
    trained_tokens: int
    seconds: float
    loss: float | None
    valid_loss: float | None
    best_valid_loss: float | None
    padding_share: float | None = None
    valid_loss_before: float | None = None
    best_step: int | None = None
    evaluations: int = 0
    evaluations_since_best: int = 0
    adapter_step: int | None = None


KINDS: dict[str, type[Event]] = {c.kind: c for c in Event.__subclasses__()}


def read_events(path: Path) -> tuple[list[Event], int]:
    """The events of an events.jsonl, and how many of its lines are none (a kill or a run at work leaves half a one)."""
    events: list[Event] = []
    unread = 0
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                events += [from_json(line)] if line else []
            except ValueError:
                unread += 1
    return events, unread


def lasting(events: Sequence[Event]) -> list[Event]:
    """The events but for what a run took back when it diverged: steps, evaluations and answers behind `to_step`."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, RolledBack):
            taken = (Stepped, Evaluated, Overfitted, Sampled, Saved)
            kept = [e for e in kept if not (isinstance(e, taken) and e.step > event.to_step)]
        kept.append(event)
    return kept


def from_json(line: str) -> Event:
    """The event of one line of events.jsonl. Raises ValueError for a line that is none."""
    fields: dict[str, Any] = json.loads(line)
    try:
        return KINDS[fields.pop("event")](**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an event: {line[:80]}") from error
