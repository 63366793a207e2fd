"""Examples → Batches: which rows make one update, which are computed at once, and how wide they are padded.

Everything here is a pure function of row lengths and of (seed, epoch): two backends, two machines and a resumed run
see the same batches. An update is what the optimizer sees; micro-batches only cut it to what memory holds, and packing
only lays its rows one after another: neither changes which rows an update is made of.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from mlxsft.data.render import Example

Rows = NDArray[np.int64]  # indices into the examples

# Sorting all rows at once pads least but makes the same rows neighbours in every epoch; within about a hundred updates
# the padding is nearly as small and the neighbours change.
UPDATES_SORTED_TOGETHER = 100

# What one more micro-batch is taken to cost, in tokens computed: rows are computed apart where that saves more padding.
MICRO_BATCH_COST = 128

# The longest packed sequence, unless one row is longer. Attention takes time and memory by the square of the length.
PACKED_TOKENS = 2048
# Packs are made as short as this share of padding allows.
PACKED_PADDING = 0.01
PACKED_STEP = 4  # their widths are multiples of it


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows computed at once: `mask[b, t]` says that predicting `tokens[b, t]` is trained; `mask[:, 0]` is False.

    `segments` numbers the rows that are packed into one sequence; tokens of different numbers never attend to each
    other, and the mask is False where a number begins. None: every sequence is one row.
    """

    tokens: NDArray[np.int32]  # [B, T], padded on the right with id 0
    mask: NDArray[np.bool_]  # [B, T], False on padding
    segments: NDArray[np.int32] | None = None  # [B, T], 1, 2, 3 … from the left, 0 on padding
    trunk: NDArray[Any] | None = None  # [B, T, D], what the frozen layers give, where that is kept; 0 on padding
    numbers: NDArray[np.int64] | None = None  # [B, T], `Example.number` of each token, -1 on padding; None: the line's

    def part(self, lines: slice, columns: slice = slice(None)) -> Batch:
        """Some lines of it, and some columns of those."""
        arrays = (self.tokens, self.mask, self.segments, self.trunk, self.numbers)
        return Batch(*(None if array is None else array[lines, columns] for array in arrays))  # type: ignore[arg-type]  # in order


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


def share(rows: ArrayLike, lengths: ArrayLike, rank: int, ranks: int) -> Rows:
    """The rows of one update that a rank computes; every row stands in exactly one rank's share, which may be empty.

    The ranks take turns from the longest row down, so that they have about the same work.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    indices = np.asarray(rows, dtype=np.int64)
    return indices[np.argsort(-sizes[indices], kind="stable")][rank::ranks]


def micro_batches(rows: ArrayLike, lengths: ArrayLike, micro_batch_tokens: int) -> list[Rows]:
    """The rows of one update in groups of at most `micro_batch_tokens` padded tokens, or of one row; longest first.

    Of all ways to cut the rows, in the order of their length, the one that costs least: the padded tokens of every
    group and MICRO_BATCH_COST for each. Longest first, because what does not fit in memory then fails at once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    indices = np.asarray(rows, dtype=np.int64)
    longest_first = indices[np.argsort(-sizes[indices], kind="stable")]
    count = len(longest_first)
    cost = np.zeros(count + 1, dtype=np.int64)  # of the rows from here on
    ends = np.zeros(count, dtype=np.int64)  # where the group that begins here ends
    for start in range(count - 1, -1, -1):
        widest = width(int(sizes[longest_first[start]]))
        last = min(count, start + max(1, micro_batch_tokens // widest))
        costs = widest * np.arange(1, last - start + 1) + cost[start + 1 : last + 1]
        best = len(costs) - 1 - int(np.argmin(costs[::-1]))  # of equal costs the largest group
        cost[start], ends[start] = costs[best] + MICRO_BATCH_COST, start + 1 + best
    groups = []
    start = 0
    while start < count:
        groups.append(longest_first[start : ends[start]])
        start = int(ends[start])
    return groups


def micro_packs(
    rows: ArrayLike, lengths: ArrayLike, micro_batch_tokens: int, *, positions: int | None = None
) -> list[list[Rows]]:
    """The rows of one update in groups as `micro_batches` makes them, each group a list of packs: rows in sequence.

    A group has at most `micro_batch_tokens`, padding included, or one row; a pack at most PACKED_TOKENS and the model's
    `positions`, or the longest row's. Rows of similar length are packed together, in the shortest packs that waste
    little: all rows in one long sequence would take several times the memory and time in attention.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    indices = np.asarray(rows, dtype=np.int64)
    longest_first = indices[np.argsort(-sizes[indices], kind="stable")]
    limit = min(PACKED_TOKENS, micro_batch_tokens, PACKED_TOKENS if positions is None else positions)
    groups = []
    start = 0
    while start < len(longest_first):
        totals = np.cumsum(sizes[longest_first[start:]])
        taken = max(1, int(np.searchsorted(totals, micro_batch_tokens, side="right")))
        packs = _packs(longest_first[start : start + taken], sizes, limit)
        while taken > 1 and _computed(packs, sizes) > micro_batch_tokens:
            taken -= 1
            packs = _packs(longest_first[start : start + taken], sizes, limit)
        groups.append(packs)
        start += taken
    return groups


def _packs(rows: Rows, sizes: Rows, limit: int) -> list[Rows]:
    """Rows, the longest first, in the shortest packs with at most PACKED_PADDING, or in those with the least."""
    limit = max(limit, int(sizes[rows[0]]))
    used = int(sizes[rows].sum())
    best = [rows[i : i + 1] for i in range(len(rows))]
    least = _computed(best, sizes)
    for count in sorted({-(-len(rows) // per_pack) for per_pack in range(2, len(rows) + 1)}, reverse=True):
        if least - used <= PACKED_PADDING * least:
            break
        packs = _dealt(rows, sizes, count)
        if max(int(sizes[pack].sum()) for pack in packs) > limit:
            break  # fewer packs are longer still
        if (computed := _computed(packs, sizes)) < least:
            best, least = packs, computed
    return best


def _dealt(rows: Rows, sizes: Rows, count: int) -> list[Rows]:
    """Rows, the longest first, in `count` packs of nearly equal length: each goes to the shortest pack so far."""
    packs: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for row in rows.tolist():
        tokens, number = filled[0]
        packs[number].append(row)
        heapq.heapreplace(filled, (tokens + int(sizes[row]), number))
    return [np.array(pack, dtype=np.int64) for pack in packs]


def _computed(packs: Sequence[Rows], sizes: Rows) -> int:
    """Tokens computed, padding included, when these packs are computed at once."""
    return len(packs) * packed_width(max(int(sizes[pack].sum()) for pack in packs))


def width(n: int) -> int:
    """The padded width of n tokens: a multiple of 4 up to 64, above that one of sixteen steps to the next power of two.

    So n > 64 grows by less than 1/16, and all lengths up to 8,192 share 128 widths.
    """
    below = 1 << (max(n - 1, 1).bit_length() - 1)  # the largest power of two that is smaller than n
    step = max(4, below // 16)
    return max(1, -(-n // step)) * step


def packed_width(n: int) -> int:
    """The padded width of a pack of n tokens: finer steps than `width`, which alone would waste three in a hundred."""
    return max(1, -(-n // PACKED_STEP)) * PACKED_STEP


def batches(
    examples: Sequence[Example], micro_batch_tokens: int, *, packed: bool = False, positions: int | None = None
) -> Iterator[Batch]:
    """All examples once, in Batches of at most `micro_batch_tokens`, or of one row; longest first."""
    lengths = [len(example.tokens) for example in examples]
    everything = np.arange(len(examples))
    if packed:
        for packs in micro_packs(everything, lengths, micro_batch_tokens, positions=positions):
            yield pack([[examples[i] for i in rows] for rows in packs], limit=positions)
    else:
        for rows in micro_batches(everything, lengths, micro_batch_tokens):
            yield stack([examples[i] for i in rows], limit=positions)


def stack(examples: Sequence[Example], *, limit: int | None = None) -> Batch:
    """One Batch of all examples, in their order, as wide as the longest needs.

    `limit` is the model's number of positions: padding never goes past it, since a learned position that does not
    exist would be read from foreign memory.
    """
    longest = max(len(example.tokens) for example in examples)
    batch = _laid([[example] for example in examples], _within(limit, longest, width(longest)))
    return replace(batch, segments=None)


def pack(packs: Sequence[Sequence[Example]], *, limit: int | None = None) -> Batch:
    """One Batch with a sequence for every pack, its examples one after another; `limit` as for `stack`."""
    longest = max(sum(len(example.tokens) for example in rows) for rows in packs)
    return _laid(packs, _within(limit, longest, packed_width(longest)))


def _within(limit: int | None, longest: int, wanted: int) -> int:
    return wanted if limit is None else max(longest, min(wanted, limit))


def _laid(packs: Sequence[Sequence[Example]], columns: int) -> Batch:
    """The examples of each pack in a line of `columns`. Raises ValueError where the first token of a row is trained."""
    shape = (len(packs), columns)
    tokens, mask, segments = np.zeros(shape, np.int32), np.zeros(shape, np.bool_), np.zeros(shape, np.int32)
    numbers = np.full(shape, -1, np.int64)
    kept = packs[0][0].trunk
    trunk = None if kept is None else np.zeros((*shape, kept.shape[-1]), kept.dtype)
    for line, rows in enumerate(packs):
        start = 0
        for number, example in enumerate(rows, start=1):
            if example.mask[:1].any():
                raise ValueError(
                    "the mask of a first token is True, but nothing stands before it that could predict it"
                )
            place = slice(start, start + len(example.tokens))
            tokens[line, place], mask[line, place], segments[line, place] = example.tokens, example.mask, number
            numbers[line, place] = example.number
            if trunk is not None:
                trunk[line, place] = example.trunk
            start = place.stop
    return Batch(tokens, mask, segments, trunk, numbers)


def padding_share(groups: Iterable[Rows], lengths: ArrayLike) -> float:
    """The share (0 to 1) of computed tokens that are padding, when every group is stacked."""
    sizes = np.asarray(lengths, dtype=np.int64)
    used = computed = 0
    for group in groups:
        used += int(sizes[group].sum())
        computed += len(group) * width(int(sizes[group].max()))
    return 1 - used / computed if computed else 0.0
