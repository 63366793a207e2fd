"""Batches: every row once an epoch, always the same for the same arguments, few shapes, little padding."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsft.data.batches import (
    MICRO_BATCH_COST,
    PACKED_TOKENS,
    Batch,
    batches,
    epoch_order,
    micro_batches,
    micro_packs,
    pack,
    packed_width,
    padding_share,
    stack,
    width,
)
from mlxsft.data.formats import Conversation, Origin, read_conversations
from mlxsft.data.render import Example

LENGTHS = st.lists(st.integers(1, 3000), max_size=120)


def example(tokens: list[int], trained: list[int]) -> Example:
    mask = np.zeros(len(tokens), dtype=np.bool_)
    mask[trained] = True
    return Example(np.array(tokens, dtype=np.int32), mask, Origin("rows.jsonl", 1))


# ---- widths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "padded"),
    [(0, 4), (1, 4), (4, 4), (5, 8), (63, 64), (64, 64), (65, 68), (128, 128), (129, 136), (500, 512), (512, 512),
     (513, 544), (1025, 1088), (2000, 2048), (2049, 2176), (8192, 8192)],
)  # fmt: skip
def test_width(n: int, padded: int) -> None:
    assert width(n) == padded


def test_widths_are_few_and_close() -> None:
    widths = [width(n) for n in range(1, 8193)]
    assert all(n <= w for n, w in enumerate(widths, start=1))
    assert widths == sorted(widths)
    assert all(w == width(w) for w in widths)
    assert len(set(widths)) == 128
    assert max(w / n for n, w in enumerate(widths, start=1) if n > 64) < 1.0625


# ---- order ---------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 40), st.integers(0, 2**32), st.integers(0, 1000))
def test_every_row_once_an_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    updates = epoch_order(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(row for update in updates for row in update.tolist()) == list(range(len(lengths)))
    full, short = divmod(len(lengths), batch_size)
    assert sorted(len(update) for update in updates) == [short] * (short > 0) + [batch_size] * full
    again = epoch_order(np.array(lengths, dtype=np.int32), batch_size, seed=seed, epoch=epoch)
    assert [u.tolist() for u in again] == [u.tolist() for u in updates]


@pytest.mark.parametrize("count", [2000, 2003])  # several parts are sorted apart
def test_many_rows_once_an_epoch(count: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, count)
    updates = epoch_order(lengths, 4, seed=3, epoch=1)
    assert sorted(np.concatenate(updates).tolist()) == list(range(count))
    assert sorted({len(update) for update in updates}) == [4] if count == 2000 else [3, 4]
    assert padding_share(updates, lengths) < 0.07  # in the order of the file it is 36 %


def test_epochs_and_seeds_differ() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 100)
    orders = [epoch_order(lengths, 8, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(np.concatenate(order).tolist()) for order in orders}) == 9


def test_the_smaller_update_is_not_always_made_of_the_longest_rows() -> None:
    lengths = np.arange(1, 20)
    smaller = [
        next(update for update in epoch_order(lengths, 4, seed=0, epoch=epoch) if len(update) == 3).tolist()
        for epoch in range(40)
    ]
    assert {min(update) // 4 for update in smaller} == {0, 1, 2, 3, 4}


def test_no_rows_no_updates() -> None:
    assert epoch_order([], 8, seed=0, epoch=0) == []
    assert list(batches([], 4096)) == list(batches([], 4096, packed=True)) == []


def test_an_update_without_rows_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="at least 1 row"):
        epoch_order([3], 0, seed=0, epoch=0)


# ---- micro-batches -------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 8192), st.randoms(use_true_random=False))
def test_micro_batches_keep_the_rows_and_the_budget(lengths: list[int], budget: int, random: Any) -> None:
    rows = random.sample(range(len(lengths)), k=len(lengths) // 2)
    groups = micro_batches(rows, lengths, budget)
    assert sorted(row for group in groups for row in group.tolist()) == sorted(rows)
    for group in groups:
        widest = width(max(lengths[row] for row in group))
        assert len(group) == 1 or len(group) * widest <= budget
    in_order = [lengths[row] for group in groups for row in group]
    assert in_order == sorted(in_order, reverse=True)


def test_micro_batches_literally() -> None:
    lengths = [100, 10, 3000, 60, 61, 90]
    groups = [group.tolist() for group in micro_batches([5, 0, 2, 4, 1, 3], lengths, 199)]
    assert groups == [[2], [0], [5], [4, 3, 1]]  # widths 3072; 100 (two would be 200); 92; 64


def test_rows_are_computed_apart_where_that_saves_more_padding_than_it_costs() -> None:
    def sizes(*lengths: int) -> list[int]:
        return [len(group) for group in micro_batches(range(len(lengths)), lengths, 4096)]

    assert sizes(256, 128) == [2]  # 128 saved, 128 for one more micro-batch: the same, so not
    assert sizes(256, 124) == [1, 1]  # 132 saved
    assert sizes(256, 192, 192) == [3]  # 64 saved twice: the same
    assert sizes(256, 192, 192, 192) == [1, 3]
    assert sizes(256, 250, 100, 96, 40, 36) == [2, 4]


@given(LENGTHS, st.integers(1, 8192))
def test_no_cut_costs_less_than_filling_the_budget(lengths: list[int], budget: int) -> None:
    def cost(groups: list[list[int]]) -> int:
        return sum(len(g) * width(max(g)) + MICRO_BATCH_COST for g in groups)

    ours = [[lengths[i] for i in group] for group in micro_batches(range(len(lengths)), lengths, budget)]
    filled: list[list[int]] = []
    for n in sorted(lengths, reverse=True):
        if filled and (len(filled[-1]) + 1) * width(filled[-1][0]) <= budget:
            filled[-1].append(n)
        else:
            filled.append([n])
    assert cost(ours) <= cost(filled)


# ---- packs ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=80),
    st.integers(1, 8192),
    st.none() | st.integers(3000, 5000),
    st.randoms(use_true_random=False),
)
def test_packs_keep_the_rows_the_budget_and_the_limit(
    lengths: list[int], budget: int, positions: int | None, random: Any
) -> None:
    rows = random.sample(range(len(lengths)), k=max(1, len(lengths) // 2))
    groups = micro_packs(rows, lengths, budget, positions=positions)
    assert sorted(row for group in groups for together in group for row in together.tolist()) == sorted(rows)
    for group in groups:
        loads = [sum(lengths[row] for row in together) for together in group]
        longest = max(lengths[row] for together in group for row in together)
        assert all(len(together) > 0 for together in group)
        assert max(loads) <= max(longest, min(PACKED_TOKENS, budget))
        assert len(group) * packed_width(max(loads)) <= budget or sum(map(len, group)) == 1
    again = micro_packs(np.array(rows), np.array(lengths), budget, positions=positions)
    assert [[p.tolist() for p in g] for g in again] == [[p.tolist() for p in g] for g in groups]


def test_packs_literally() -> None:
    lengths = [100, 90, 60, 50, 30, 30]
    groups = [[together.tolist() for together in group] for group in micro_packs(range(6), lengths, 4096)]
    assert groups == [[[0, 3, 4], [1, 2, 5]]]  # 180 and 180 tokens
    assert [[p.tolist() for p in g] for g in micro_packs([0, 1], [3000, 10], 4096)] == [[[0]], [[1]]]


def test_packs_are_as_short_as_little_padding_allows() -> None:
    """Eight equal rows need no packing; pairs of a long and a short row make four equal packs, not one of all."""
    equal = micro_packs(range(8), [100] * 8, 4096)
    assert [len(together) for together in equal[0]] == [1] * 8
    paired = micro_packs(range(8), [102, 112, 122, 132, 90, 80, 70, 60], 4096)
    assert [len(together) for together in paired[0]] == [2] * 4


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 1000), st.booleans(), st.booleans())
def test_batches_hold_every_example_once(lengths: list[int], budget: int, packed: bool, tight: bool) -> None:
    rows = [example([number] * n, [n - 1] if n > 1 else []) for number, n in enumerate(lengths, start=1)]
    positions = max(lengths) if tight else None
    found: list[tuple[int, int]] = []
    for batch in batches(rows, budget, packed=packed, positions=positions):
        assert batch.tokens.size <= budget or len(batch.tokens) == 1
        assert positions is None or batch.tokens.shape[1] <= positions
        assert (batch.segments is not None) == packed
        for line in range(len(batch.tokens)):
            runs = segments_of(batch, line)
            found += runs
            assert int(batch.mask[line].sum()) == sum(n > 1 for _, n in runs)
    assert sorted(found) == list(enumerate(lengths, start=1))


def segments_of(batch: Batch, line: int) -> list[tuple[int, int]]:
    """(the one token, length) of every row of a sequence; the segments are contiguous and numbered from 1."""
    tokens = batch.tokens[line]
    segments = np.minimum(tokens, 1) if batch.segments is None else batch.segments[line]
    assert np.array_equal(segments == 0, tokens == 0)
    inside = segments[segments > 0]
    assert np.array_equal(segments[: len(inside)], inside)  # padding at the end alone
    assert set(np.diff(inside).tolist()) <= {0, 1}
    assert inside[0] == 1
    runs = []
    for number in range(1, int(inside[-1]) + 1):
        (token,) = set(tokens[segments == number].tolist())
        runs.append((token, int((segments == number).sum())))
    return runs


def test_pack_literally() -> None:
    batch = pack([[example([5, 6, 7], [2]), example([8, 9], [1])], [example([1, 2, 3, 4], [1, 3])]])
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [1, 2, 3, 4, 0, 0, 0, 0]]
    assert batch.mask.astype(int).tolist() == [[0, 0, 1, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]]
    assert batch.segments is not None
    assert batch.segments.dtype == np.int32
    assert batch.segments.tolist() == [[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]
    assert pack([[example([5, 6, 7], [2]), example([8, 9], [1])]], limit=5).tokens.shape == (1, 5)


def test_a_trained_first_token_in_a_pack_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="first token"):
        pack([[example([5, 6], [1]), example([5, 6], [0, 1])]])


# ---- stacking ------------------------------------------------------------------------------------------------------


def test_stack_literally() -> None:
    batch = stack([example([5, 6, 7], [2]), example([8, 9, 1, 2, 3], [1, 4])])
    assert batch.tokens.dtype == np.int32
    assert batch.mask.dtype == np.bool_
    assert batch.tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 9, 1, 2, 3, 0, 0, 0]]
    assert batch.mask.astype(int).tolist() == [[0, 0, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0]]


def test_padding_never_passes_the_positions_of_the_model() -> None:
    row = example(list(range(1, 10)), [8])
    assert stack([row]).tokens.shape == (1, 12)
    assert stack([row], limit=10).tokens.shape == (1, 10)
    assert stack([row], limit=9).tokens.shape == (1, 9)
    assert stack([row], limit=100).tokens.shape == (1, 12)


def test_a_trained_first_token_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="first token"):
        stack([example([5, 6], [0, 1])])


@settings(deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=60), st.integers(1, 9), st.integers(1, 1000), st.data())
def test_every_trained_token_is_computed_once_an_epoch(
    lengths: list[int], batch_size: int, budget: int, data: st.DataObject
) -> None:
    rows, first = [], 1
    for n in lengths:  # every token of the set has its own id
        trained = data.draw(st.sets(st.integers(1, n - 1), max_size=6)) if n > 1 else set()
        rows.append(example(list(range(first, first + n)), sorted(trained)))
        first += n
    seen: list[int] = []
    trained_seen: list[int] = []
    for update in epoch_order(lengths, batch_size, seed=1, epoch=2):
        for group in micro_batches(update, lengths, budget):
            batch: Batch = stack([rows[i] for i in group])
            seen += batch.tokens[batch.tokens > 0].tolist()
            trained_seen += batch.tokens[batch.mask].tolist()
    assert sorted(seen) == list(range(1, first))
    assert sorted(trained_seen) == sorted(t for row in rows for t in row.tokens[row.mask].tolist())


# ---- padding -------------------------------------------------------------------------------------------------------


def test_padding_share_literally() -> None:
    assert padding_share([np.array([0, 1]), np.array([2])], [4, 2, 3]) == 1 - 9 / 12
    assert padding_share([], []) == 0.0


def tokens_of(real: Path, name: str) -> list[Example]:
    """The rows of a file as ChatML, in tokens of SmolLM, all but the first trained."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real / "tokenizers/smollm/tokenizer.json"))
    texts = [
        "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in row.turns)
        for row in read_conversations([real / "data/instruction" / name])
        if isinstance(row, Conversation)
    ]
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [example(encoding.ids, list(range(1, len(encoding.ids)))) for encoding in encodings]


def padding_of(computed: Iterable[Batch], tokens: int) -> tuple[float, set[tuple[int, ...]]]:
    """The share of padding in batches with `tokens` tokens, and their shapes."""
    shapes = [batch.tokens.shape for batch in computed]
    return 1 - tokens / sum(rows * columns for rows, columns in shapes), set(shapes)


@pytest.mark.parametrize(
    ("name", "rows", "buckets", "packed", "shapes", "packed_shapes"),
    [
        ("alpaca_roleplay.json", 3146, 0.035, 0.006, 60, 260),
        ("prompt_completion_train.jsonl", 1800, 0.045, 0.006, 70, 240),
    ],
)
def test_padding_on_real_rows(
    real: Path, name: str, rows: int, buckets: float, packed: float, shapes: int, packed_shapes: int
) -> None:
    examples = tokens_of(real, name)
    assert len(examples) == rows
    lengths = [len(e.tokens) for e in examples]
    for in_packs, at_most, kinds in ((False, buckets, shapes), (True, packed, packed_shapes)):
        seen: set[tuple[int, ...]] = set()
        for epoch in range(3):
            updates = epoch_order(lengths, 8, seed=0, epoch=epoch)
            computed = [b for u in updates for b in batches([examples[i] for i in u], 4096, packed=in_packs)]
            share, found = padding_of(computed, sum(lengths))
            assert share < at_most
            seen |= found
        assert len(seen) <= kinds
    for in_packs, at_most in ((False, 0.05), (True, 0.01)):  # validation
        assert padding_of(batches(examples, 4096, packed=in_packs), sum(lengths))[0] < at_most


@pytest.mark.parametrize(
    ("rows", "batch_size", "at_most"), [(40, 8, 0.10), (40, 16, 0.10), (64, 8, 0.08), (200, 8, 0.05)]
)
def test_padding_of_small_sets(real: Path, rows: int, batch_size: int, at_most: float) -> None:
    """Updates of few rows hold rows of unlike length; filled to the budget they had 15, 21, 10 and 5 % padding."""
    examples = tokens_of(real, "alpaca_roleplay.json")
    for seed in range(3):
        some = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:rows]]
        lengths = [len(e.tokens) for e in some]
        updates = epoch_order(lengths, batch_size, seed=seed, epoch=0)
        computed = [b for u in updates for b in batches([some[i] for i in u], 4096)]
        assert padding_of(computed, sum(lengths))[0] < at_most
        assert len(computed) <= 2.2 * len(updates)


@pytest.mark.parametrize(("name", "theirs"), [("alpaca_roleplay.json", 0.27), ("prompt_completion_train.jsonl", 0.44)])
def test_padding_of_mlx_lms_own_batches(real: Path, name: str, theirs: float) -> None:
    """mlx-lm's batches of four, as it makes them in training: of the same tokens, wrapped in its own CacheDataset."""
    from mlxsft.backends.mlx_models import mlx_lm

    examples = tokens_of(real, name)
    lengths = [len(e.tokens) for e in examples]
    dataset = mlx_lm("tuner.datasets").CacheDataset(Rows(examples))
    given = used = 0
    for tokens, spans in mlx_lm("tuner.trainer").iterate_batches(dataset, 4, 2048, seed=0):
        given += tokens.size
        used += int(np.array(spans)[:, 1].sum())
    assert 1 - used / given == pytest.approx(theirs, abs=0.01)
    updates = epoch_order(lengths, 4, seed=0, epoch=0)
    for packed, at_most in ((False, 0.05), (True, 0.01)):
        ours = [b for u in updates for b in batches([examples[i] for i in u], 4096, packed=packed)]
        assert padding_of(ours, sum(lengths))[0] < at_most


class Rows:
    """What mlx-lm's CacheDataset wraps: rows as they stand in the file, two keys each, and `process` to tokens."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": None, "completion": index}

    def process(self, row: dict[str, Any]) -> tuple[list[int], int]:
        return self.examples[row["completion"]].tokens.tolist(), 0
