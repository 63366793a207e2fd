"""Training itself: a generator that makes one update after another and yields what happens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mlxsft.data.batches import batches, epoch_order, share
from mlxsft.errors import Diverged
from mlxsft.training.checkpoints import Progress
from mlxsft.training.events import Evaluated, Event, Finished, Noted, Sampled, Stepped
from mlxsft.training.schedule import in_steps, learning_rate

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.batches import Batch
    from mlxsft.data.render import Example
    from mlxsft.recipe import Recipe

MAX_SKIPPED_IN_A_ROW = 10
POWER_SECONDS = 0.5  # between two looks at the battery


@dataclass(frozen=True)
class Plan:
    """How many updates a run makes, and after which of them it evaluates and saves."""

    steps_per_epoch: int
    total_steps: int
    eval_every: int
    save_every: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int) -> Plan:
        per_epoch = math.ceil(rows / recipe.train.batch_size)
        epochs = recipe.train.epochs if recipe.train.epochs is not None else 3.0
        total = recipe.train.steps or max(1, round(epochs * per_epoch))
        return cls(
            per_epoch,
            total,
            max(1, in_steps(recipe.eval.every, total)),
            max(1, in_steps(recipe.save.every, total)),
        )

    def evaluates(self, step: int) -> bool:
        return step % self.eval_every == 0 or step == self.total_steps

    def saves(self, step: int) -> bool:
        return step % self.save_every == 0 or step == self.total_steps


@dataclass
class Training:
    """One stretch of training: from `progress` to the end of the run, or until `stop()`.

    The rows of a step are a pure function of seed and step, so that a resumed run sees what it would have seen.
    No batch is padded beyond the model's `positions`; `packed` says that this model takes packed rows. While
    `plugged_in()` is False no step begins.
    """

    backend: Backend
    recipe: Recipe
    rows: Sequence[Example]
    held_out: Sequence[Example]
    progress: Progress
    save: Callable[[Progress], Event]
    answer: Callable[[str], str]
    stop: Callable[[], bool]
    positions: int | None = None
    packed: bool = False
    plugged_in: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        self.plan = Plan.of(self.recipe, len(self.rows))
        self.lengths = np.array([len(e.tokens) for e in self.rows])
        self.order: tuple[int, list[np.ndarray]] | None = None  # the epoch, and its steps' rows
        self.began = time.perf_counter() - self.progress.seconds
        self.saved_at = self.progress.step
        self.loss: float | None = None
        self.valid_loss: float | None = None
        self.skipped_in_a_row = 0

    def events(self) -> Iterator[Event]:
        """Everything that happens; the state is saved before the generator ends.

        Raises Diverged when loss or gradient stay non-finite.
        """
        while True:
            if self._evaluation_is_due() and not self._stopped():
                yield from self._evaluate()
            if self.plan.saves(self.progress.step) and self.saved_at != self.progress.step:
                yield self._save()
            yield from self._wait_for_power()
            if (reason := self._ended()) is not None:
                break
            yield self._update()
            self._refuse_divergence()
        if self.saved_at != self.progress.step:
            yield self._save()
        yield self._finished(reason)

    def _ended(self) -> str | None:
        """Why there is no next step, or None."""
        if self.progress.step >= self.plan.total_steps:
            return "done"
        patience = self.recipe.eval.patience
        if patience is not None and self.progress.evaluations_since_best >= patience:
            return "patience"
        return "interrupted" if self._stopped() else None

    def _stopped(self) -> bool:
        """Whether any rank was asked to stop; all of them find the same, and at the same place."""
        return bool(self.backend.ranks.sum(np.array([self.stop()], dtype=np.float64))[0])

    def _wait_for_power(self) -> Iterator[Event]:
        """Nothing while the machine is plugged in; else what was trained is saved, and the next step waits."""
        if self.progress.step >= self.plan.total_steps or self.stop() or self.plugged_in():
            return
        if self.saved_at != self.progress.step:
            yield self._save()
        yield Noted(f"on battery after step {self.progress.step}: waiting until the machine is plugged in")
        began = time.perf_counter()
        while not self.plugged_in() and not self.stop():
            time.sleep(POWER_SECONDS)
        self.began += time.perf_counter() - began
        if not self.stop():
            yield Noted("plugged in again: going on")

    # --- one update ------------------------------------------------------------------------------------------------

    def _rows_of(self, step: int) -> np.ndarray:
        """The rows of a step (1-based)."""
        epoch, position = divmod(step - 1, self.plan.steps_per_epoch)
        if self.order is None or self.order[0] != epoch:
            train = self.recipe.train
            self.order = epoch, epoch_order(self.lengths, train.batch_size, seed=train.seed, epoch=epoch)
        return self.order[1][position]

    def _update(self) -> Event:
        train, step = self.recipe.train, self.progress.step + 1
        began = time.perf_counter()
        rows = self._rows_of(step)
        loss, trained, computed = self._accumulate([self.rows[i] for i in self._share(rows, self.lengths)])
        rate = learning_rate(step, self.plan.total_steps, train)
        norm = self.backend.apply(rate, train.clip_norm)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        tokens = int(self.lengths[rows].sum())
        self._count(step, trained, tokens, computed, skipped)
        self.loss = self.loss if skipped else loss / trained
        return Stepped(
            step=step,
            epoch=step / self.plan.steps_per_epoch,
            loss=None if skipped else loss / trained,
            gradient_norm=None if skipped else norm,
            learning_rate=rate,
            trained_tokens=trained,
            tokens=tokens,
            computed_tokens=computed,
            seconds=time.perf_counter() - began,
            peak_bytes=self.backend.peak_bytes(),
            skipped=skipped,
        )

    def _accumulate(self, rows: Sequence[Example]) -> tuple[float, int, int]:
        """Summed loss in nats, trained and computed tokens of an update, of which these rows are this rank's share."""
        sums = np.zeros(3)
        for batch in self._batches(rows):
            sums += [*self.backend.accumulate(batch), batch.tokens.size]
        loss, trained, computed = self.backend.ranks.sum(sums).tolist()
        return loss, int(trained), int(computed)

    def _share(self, rows: Sequence[int] | np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return share(rows, lengths, self.backend.ranks.rank, self.backend.ranks.count)

    def _batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        budget = self.recipe.train.micro_batch_tokens
        return batches(rows, budget, packed=self.packed, positions=self.positions)

    def _count(self, step: int, trained: int, tokens: int, computed: int, skipped: bool) -> None:
        self.progress = replace(
            self.progress,
            step=step,
            trained_tokens=self.progress.trained_tokens + (0 if skipped else trained),
            tokens=self.progress.tokens + tokens,
            computed_tokens=self.progress.computed_tokens + computed,
            skipped_steps=self.progress.skipped_steps + skipped,
            seconds=time.perf_counter() - self.began,
        )
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def _refuse_divergence(self) -> None:
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise Diverged(
                f"step {self.progress.step}: loss or gradient was not finite {self.skipped_in_a_row} times in a row",
                "Lower train.learning_rate.",
            )

    # --- evaluation and saving ---------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        return self.progress.evaluated_at != step and (step == 0 or self.plan.evaluates(step))

    def _evaluate(self) -> Iterator[Event]:
        step = self.progress.step
        if self.held_out:
            if (event := self._validated(step)) is None:
                return  # stopped on the way; the resumed run evaluates
            yield event
        self.progress = replace(self.progress, evaluated_at=step)
        for prompt in self.recipe.eval.samples if self.backend.ranks.rank == 0 else ():
            if not self.stop():
                yield Sampled(step, prompt, self.answer(prompt))

    def _validated(self, step: int) -> Event | None:
        began = time.perf_counter()
        lengths = np.array([len(e.tokens) for e in self.held_out])
        rows = [self.held_out[i] for i in self._share(np.arange(len(lengths)), lengths)]
        judged = validation_loss(self.backend, self._batches(rows), stop=self.stop)
        if judged is None:
            return None
        loss, tokens = judged
        best = math.isfinite(loss) and (self.progress.best_valid_loss is None or loss < self.progress.best_valid_loss)
        self.valid_loss = loss if math.isfinite(loss) else None
        self.progress = replace(
            self.progress,
            best_valid_loss=loss if best else self.progress.best_valid_loss,
            evaluations_since_best=0 if best else self.progress.evaluations_since_best + 1,
        )
        return Evaluated(step, self.valid_loss, tokens, len(self.held_out), best, time.perf_counter() - began)

    def _save(self) -> Event:
        self.saved_at = self.progress.step
        return self.save(self.progress)

    def _finished(self, reason: str) -> Event:
        return Finished(
            reason=reason,
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            skipped_steps=self.progress.skipped_steps,
            trained_tokens=self.progress.trained_tokens,
            seconds=time.perf_counter() - self.began,
            loss=self.loss,
            valid_loss=self.valid_loss,
            best_valid_loss=self.progress.best_valid_loss,
            padding_share=1 - self.progress.tokens / computed if (computed := self.progress.computed_tokens) else None,
        )


def validation_loss(
    backend: Backend, rows: Iterable[Batch], *, stop: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """The loss in nats a trained token over the rows of all ranks, each once; and how many trained tokens they have.

    None when `stop()` says so, on any rank, before all rows are judged.
    """
    sums = np.zeros(3)  # nats, trained tokens, ranks that stopped
    for batch in rows:
        if stop():
            sums[2] = 1
            break
        sums[:2] += [backend.losses(batch).sum(dtype=np.float64), batch.mask.sum()]
    nats, tokens, stopped = backend.ranks.sum(sums).tolist()
    return None if stopped else (nats / tokens, int(tokens))
