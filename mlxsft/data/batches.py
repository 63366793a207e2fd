"""Examples → Batches: which rows make one update, which are computed at once, and how wide they are padded.

Everything here is a pure function of row lengths and of (seed, epoch): two backends, two machines and a resumed run
see the same batches. An update is what the optimizer sees; micro-batches only cut it to what memory holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from mlxsft.data.render import Example

Rows = NDArray[np.int64]  # indices into the examples

# Sorting all rows at once pads least but makes the same rows neighbours in every epoch; within about a hundred updates
# the padding is nearly as small and the neighbours change.
UPDATES_SORTED_TOGETHER = 100


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows computed at once: `mask[b, t]` says that predicting `tokens[b, t]` is trained; `mask[:, 0]` is False."""

    tokens: NDArray[np.int32]  # [B, T], padded on the right with id 0
    mask: NDArray[np.bool_]  # [B, T], False on padding


def epoch_order(lengths: ArrayLike, batch_size: int, *, seed: int, epoch: int) -> list[Rows]:
    """The updates of one epoch, each an array of `batch_size` row indices; every row stands in exactly one.

    Rows are shuffled, rows of similar length are put together, and the updates are shuffled again. When the rows do
    not divide evenly, one update is smaller.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; an update needs at least 1 row")
    sizes = np.asarray(lengths, dtype=np.int64)
    if not len(sizes):
        return []
    random = np.random.default_rng([seed, epoch])
    updates = []
    for part in _parts(random.permutation(len(sizes)), batch_size):
        by_length = part[np.argsort(sizes[part], kind="stable")]
        updates += _cut(by_length, batch_size, random)
    return [updates[i] for i in random.permutation(len(updates))]


def _parts(rows: Rows, batch_size: int) -> list[Rows]:
    """The shuffled rows in parts that are sorted together, of equal numbers of updates as far as that goes."""
    updates = -(-len(rows) // batch_size)
    parts = max(1, round(updates / UPDATES_SORTED_TOGETHER))
    return np.split(rows, [batch_size * (updates * i // parts) for i in range(1, parts)])


def _cut(rows: Rows, batch_size: int, random: np.random.Generator) -> list[Rows]:
    """Sorted rows in updates; the smaller one falls on a random place, so that it is not always the longest rows."""
    ends = np.arange(batch_size, len(rows), batch_size)
    short = len(rows) % batch_size
    if short:
        ends[random.integers(len(ends) + 1) :] -= batch_size - short
    return np.split(rows, ends)


def micro_batches(rows: ArrayLike, lengths: ArrayLike, micro_batch_tokens: int) -> list[Rows]:
    """The rows of one update in groups of at most `micro_batch_tokens` padded tokens, or of one row; longest first.

    Longest first, because what does not fit in memory then fails at once, and because the number of rows in a group
    depends on its width alone: few distinct shapes.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    indices = np.asarray(rows, dtype=np.int64)
    longest_first = indices[np.argsort(-sizes[indices], kind="stable")]
    groups = []
    start = 0
    while start < len(longest_first):
        fitting = max(1, micro_batch_tokens // width(int(sizes[longest_first[start]])))
        groups.append(longest_first[start : start + fitting])
        start += fitting
    return groups


def validation_batches(lengths: ArrayLike, micro_batch_tokens: int) -> list[Rows]:
    """All rows, grouped as `micro_batches` does, in an order that never changes."""
    return micro_batches(np.arange(len(np.asarray(lengths))), lengths, micro_batch_tokens)


def width(n: int) -> int:
    """The padded width of n tokens: a multiple of 4 up to 64, above that one of sixteen steps to the next power of two.

    So n > 64 grows by less than 1/16, and all lengths up to 8,192 share 128 widths.
    """
    below = 1 << (max(n - 1, 1).bit_length() - 1)  # the largest power of two that is smaller than n
    step = max(4, below // 16)
    return max(1, -(-n // step)) * step


def stack(examples: Sequence[Example], *, limit: int | None = None) -> Batch:
    """One Batch of all examples, in their order, as wide as the longest needs.

    `limit` is the model's number of positions: padding never goes past it, since a learned position that does not
    exist would be read from foreign memory.
    """
    longest = max(len(example.tokens) for example in examples)
    columns = width(longest) if limit is None else max(longest, min(width(longest), limit))
    tokens = np.zeros((len(examples), columns), dtype=np.int32)
    mask = np.zeros((len(examples), columns), dtype=np.bool_)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        mask[row, : len(example.mask)] = example.mask
    if mask[:, 0].any():
        raise ValueError("the mask of a first token is True, but nothing stands before it that could predict it")
    return Batch(tokens, mask)


def padding_share(groups: Iterable[Rows], lengths: ArrayLike) -> float:
    """The share (0 to 1) of computed tokens that are padding, when every group is stacked."""
    sizes = np.asarray(lengths, dtype=np.int64)
    used = computed = 0
    for group in groups:
        used += int(sizes[group].sum())
        computed += len(group) * width(int(sizes[group].max()))
    return 1 - used / computed if computed else 0.0
