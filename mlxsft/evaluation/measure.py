"""A model in memory → what it does on the chosen rows: losses and answers. The same before and after."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Backend, Sampling
from mlxsft.chat.generate import Answer, Memory, continue_prompt, room_for_answer
from mlxsft.data.batches import micro_batches, stack
from mlxsft.data.render import Example, Renderer
from mlxsft.evaluation.rows import NONE, Asked, RowSet

TEMPERATURE = 0.8  # of the sampled answers, by which variety is judged

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]  # passes (items, what is done with them, how many) through


def unwatched(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """Watch, without anybody who does."""
    return items


@dataclass(frozen=True)
class Work:
    """What both models do; every set is empty where there is nothing of its kind."""

    heldout: RowSet = NONE
    training: RowSet = NONE
    probe: RowSet = NONE
    instructions: Sequence[Asked] = ()

    @property
    def losses(self) -> dict[str, RowSet]:
        return {"heldout": self.heldout, "training": self.training, "probe": self.probe}

    @property
    def asked(self) -> dict[str, Sequence[Asked]]:
        return {name: rows.asked for name, rows in self.losses.items()} | {"instructions": self.instructions}

    @property
    def sampled(self) -> Sequence[Asked]:
        """The prompts whose answers are sampled to see how unlike each other they are."""
        return self.heldout.asked or self.training.asked


@dataclass(frozen=True)
class Losses:
    """Summed loss in nats and trained tokens of each row, both float64 [rows]."""

    nats: NDArray[np.float64]
    tokens: NDArray[np.float64]

    @property
    def mean(self) -> float:
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class Measured:
    """What one model did: losses and greedy answers by set, and sampled answers."""

    losses: Mapping[str, Losses]
    answers: Mapping[str, Sequence[Answer]]
    sampled: Sequence[Answer]

    @property
    def all_answers(self) -> list[Answer]:
        return [answer for answers in self.answers.values() for answer in answers] + list(self.sampled)


@dataclass(frozen=True)
class Observer:
    """Measures models, one after the other, with the same settings."""

    renderer: Renderer
    work: Work
    micro_batch_tokens: int
    max_tokens: int
    seed: int
    watch: Watch = field(default=unwatched)

    def measure(self, backend: Backend, name: str) -> Measured:
        """Everything that the work asks for; `name` is what the progress calls the model."""
        losses = {
            kind: self._losses(backend, rows.examples, f"{name}: loss, {kind}")
            for kind, rows in self.work.losses.items()
            if rows.examples
        }
        answers = {
            kind: self._answers(backend, asked, Sampling(), f"{name}: answers, {kind}")
            for kind, asked in self.work.asked.items()
        }
        drawn = Sampling(temperature=TEMPERATURE, seed=self.seed)
        return Measured(losses, answers, self._answers(backend, self.work.sampled, drawn, f"{name}: sampled answers"))

    def _losses(self, backend: Backend, rows: Sequence[Sequence[Example]], what: str) -> Losses:
        return row_losses(
            backend, rows, self.micro_batch_tokens, self.renderer.positions, lambda g: self.watch(g, what, len(g))
        )

    def _answers(self, backend: Backend, asked: Sequence[Asked], sampling: Sampling, what: str) -> list[Answer]:
        answers = []
        for i, row in enumerate(self.watch(asked, what, len(asked))):
            answer, memory = Answer(), Memory(backend)
            drawn = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + i)
            room = min(self.max_tokens, room_for_answer(row.tokens, self.renderer.positions, self.max_tokens))
            steps = continue_prompt(
                backend, self.renderer, row.tokens, drawn, room,
                memory=memory, answer=answer, opening=self.renderer.opening,
            )  # fmt: skip
            with closing(steps):
                deque(steps, maxlen=0)
            answers.append(answer)
        return answers


def row_losses(
    backend: Backend,
    rows: Sequence[Sequence[Example]],
    micro_batch_tokens: int,
    positions: int | None,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Losses:
    """The loss of rows of one example or several; `watch` passes the micro-batches through."""
    examples = [example for row in rows for example in row]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    groups = micro_batches(np.arange(len(examples)), [len(e.tokens) for e in examples], micro_batch_tokens)
    nats, tokens = np.zeros(len(rows)), np.zeros(len(rows))
    for group in watch(groups):
        batch = stack([examples[i] for i in group], limit=positions)
        np.add.at(nats, row_of[group], backend.losses(batch).sum(axis=1, dtype=np.float64))
        np.add.at(tokens, row_of[group], batch.mask.sum(axis=1))
    return Losses(nats, tokens)
