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
from mlxsft.training.checkpoints import Progress, adapter_step
from mlxsft.training.events import Evaluated, Event, Finished, Noted, RolledBack, Sampled, Stepped
from mlxsft.training.ranks import any_of
from mlxsft.training.schedule import in_steps, learning_rate, loss_limit

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.batches import Batch
    from mlxsft.data.render import Example
    from mlxsft.recipe import Recipe

MAX_SKIPPED_IN_A_ROW = 3
RATE_FACTOR = 0.5  # of the learning rate, after the run has diverged
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
    go_back: Callable[[int], tuple[Progress | None, list[str]]]  # to the newest planned checkpoint up to a step; notes
    answer: Callable[[str], str]
    stop: Callable[[], bool]
    positions: int | None = None
    packed: bool = False
    saved_at: int | None = None  # the step whose state is on disk
    plugged_in: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        self.plan = Plan.of(self.recipe, len(self.rows))
        self.lengths = np.array([len(e.tokens) for e in self.rows])
        self.order: tuple[int, list[np.ndarray]] | None = None  # the epoch, and its steps' rows
        self.began = time.perf_counter() - self.progress.seconds
        self.loss: float | None = None
        self.valid_loss: float | None = None

    def events(self) -> Iterator[Event]:
        """Everything that happens; the state is saved before the first step and before the generator ends.

        Raises Diverged, with the last good state on disk, when the run diverges a second time.
        """
        while True:
            if self._evaluation_is_due() and not self._stopped():
                yield from self._evaluate()
            yield from self._wait_for_power()
            reason = self._ended()
            if reason or self._saving_is_due():
                yield from self._save()
            if reason and (reason := self._ended()):  # unless the state could not be saved, and the run went back
                break
            yield self._update()
            if (trouble := self._trouble()) is not None:
                yield from self._roll_back(*trouble)
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
        return any_of(self.backend.ranks, self.stop())

    def _wait_for_power(self) -> Iterator[Event]:
        """Nothing while the machine is plugged in; else what was trained is saved, and the next step waits."""
        if self.progress.step >= self.plan.total_steps:
            return
        if not any_of(self.backend.ranks, not (self.stop() or self.plugged_in())):
            return
        yield from self._save()
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
        mine = [replace(self.rows[i], number=int(i)) for i in self._share(rows, self.lengths)]
        loss, trained, computed = self._accumulate(mine)
        rate = self.progress.rate_factor * learning_rate(step, self.plan.total_steps, train)
        norm = self.backend.apply(rate, train.clip_norm)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        tokens = int(self.lengths[rows].sum())
        self.loss = self.loss if skipped else loss / trained
        self._count(step, trained, tokens, computed, skipped)
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
            skipped_in_a_row=self.progress.skipped_in_a_row + 1 if skipped else 0,
            first_loss=self.loss if self.progress.first_loss is None else self.progress.first_loss,
            seconds=time.perf_counter() - self.began,
        )

    # --- divergence ------------------------------------------------------------------------------------------------

    def _trouble(self) -> tuple[str, int] | None:
        """Why the run counts as diverged, and the last step whose state is known to be good; None as long as it goes.

        A state is known to be good when the step after it was: that step's loss is the first that it gives.
        """
        skipped, limit = self.progress.skipped_in_a_row, loss_limit(self.recipe.train, self.progress.first_loss)
        if skipped >= MAX_SKIPPED_IN_A_ROW:
            return f"loss or gradient was not finite {skipped} times in a row", self.progress.step - skipped - 1
        if not skipped and limit is not None and self.loss is not None and self.loss > limit:
            return f"the loss is {self.loss:.4g}, over the limit of {limit:.4g}", self.progress.step - 2
        return None

    def _roll_back(self, reason: str, good: int) -> Iterator[Event]:
        """To the last good checkpoint, and on at half the rate. Raises Diverged the second time, or without one."""
        step, again = self.progress.step, self.progress.rate_factor < 1
        progress, notes = self.go_back(good)
        yield from map(Noted, notes)
        if progress is None:
            raise Diverged(
                f"step {step}: {reason}, and no checkpoint is known to be good",
                "The model gives such losses before it is trained: check it with `mlxsft generate`."
                if good < 0
                else "Lower train.learning_rate, and begin anew with --force.",
            )
        if again:
            raise Diverged(
                f"step {step}: {reason}, again and at half the learning rate; what is saved is the state of step "
                f"{progress.step}",
                "Lower train.learning_rate; --resume --allow-change learning_rate goes on from there. Where the base "
                "itself gives such losses, for texts that it never saw, raise train.loss_limit and begin anew.",
            )
        self.progress = replace(progress, rate_factor=RATE_FACTOR)
        self.saved_at = progress.step
        yield RolledBack(step, progress.step, RATE_FACTOR, reason)

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
        self.saved_at = None  # what an interrupted run saved at this step does not know of the evaluation
        for prompt in self.recipe.eval.samples if self.backend.ranks.rank == 0 else ():
            if not self.stop():
                yield Sampled(step, prompt, self.answer(prompt))
        if self.progress.trunk_cached and self.recipe.eval.samples:
            self.backend.release_trunk()  # the answers needed the whole model

    def _validated(self, step: int) -> Event | None:
        began = time.perf_counter()
        lengths = np.array([len(e.tokens) for e in self.held_out])
        rows = [self.held_out[i] for i in self._share(np.arange(len(lengths)), lengths)]
        judged = validation_loss(self.backend, self._batches(rows), stop=self.stop)
        if judged is None:
            return None
        loss, tokens = judged
        self.valid_loss = loss if math.isfinite(loss) else None
        before = self.progress
        best = step > 0 and math.isfinite(loss) and (before.best_valid_loss is None or loss < before.best_valid_loss)
        if step == 0:
            self.progress = replace(before, valid_loss_before=self.valid_loss)
        else:
            self.progress = replace(
                before,
                best_valid_loss=loss if best else before.best_valid_loss,
                best_step=step if best else before.best_step,
                evaluations=before.evaluations + 1,
                evaluations_since_best=0 if best else before.evaluations_since_best + 1,
            )
        return Evaluated(step, self.valid_loss, tokens, len(self.held_out), best, time.perf_counter() - began)

    def _saving_is_due(self) -> bool:
        """At the steps of the plan, unless they were skipped; and where an evaluation was the best of the run."""
        step = self.progress.step
        best = self.recipe.save.adapter == "best" and self.progress.best_step == step
        return best or (self.plan.saves(step) and not self.progress.skipped_in_a_row)

    def _save(self) -> Iterator[Event]:
        """The state on disk, where it is not yet; a state that is not finite is none, and the run goes back."""
        if self.saved_at == self.progress.step:
            return
        try:
            yield self.save(self.progress)
        except Diverged as error:
            yield from self._roll_back(error.message, self.progress.step - 1)
        self.saved_at = self.progress.step

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
            valid_loss_before=self.progress.valid_loss_before,
            best_step=self.progress.best_step,
            evaluations=self.progress.evaluations,
            evaluations_since_best=self.progress.evaluations_since_best,
            adapter_step=adapter_step(self.progress, self.recipe.save.adapter),
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
