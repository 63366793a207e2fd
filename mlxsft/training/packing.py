"""Whether the rows of a run are packed: shown on some of them before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from mlxsft.data.batches import epoch_order, micro_packs, pack, stack

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.render import Example
    from mlxsft.recipe_training import TrainRecipe

UPDATES_TRIED = 20


def packs(
    backend: Backend, train: TrainRecipe, rows: Sequence[Example], positions: int | None
) -> tuple[bool, list[str]]:
    """Whether the rows are packed, and a note where they are not although `train.batching` asks for it.

    The longest pack of the first updates is computed packed and padded. It depends on the recipe and its rows alone,
    and is asked before a saved adapter is loaded: so a resumed run decides as it did when it began.
    """
    if train.batching != "packed":
        return False, []
    together = max(_first_packs(train, rows, positions), key=_tokens, default=None)
    if together is None:
        why: str | None = "no two rows of an update fit in one sequence"
    else:
        every = [_all_trained(row) for row in together]
        why = backend.why_not_packed(pack([every], limit=positions), stack(every, limit=positions))
    return why is None, [] if why is None else [f"train.batching: rows are padded in buckets, not packed: {why}"]


def _first_packs(train: TrainRecipe, rows: Sequence[Example], positions: int | None) -> Iterator[list[Example]]:
    """The packs of two rows or more in the first updates of a run."""
    lengths = np.array([len(row.tokens) for row in rows])
    for update in islice(epoch_order(lengths, train.batch_size, seed=train.seed, epoch=0), UPDATES_TRIED):
        for group in micro_packs(update, lengths, train.micro_batch_tokens, positions=positions):
            yield from ([rows[i] for i in together] for together in group if len(together) > 1)


def _tokens(rows: Sequence[Example]) -> int:
    return sum(len(row.tokens) for row in rows)


def _all_trained(row: Example) -> Example:
    """The row with every token trained that can be: more losses to compare."""
    return replace(row, mask=np.arange(len(row.tokens)) > 0)
