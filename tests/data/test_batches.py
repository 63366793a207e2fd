"""Batches: every row once an epoch, always the same for the same arguments, few shapes, little padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxsft.data.batches import (
    Batch,
    epoch_order,
    micro_batches,
    padding_share,
    stack,
    validation_batches,
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
    assert validation_batches([], 4096) == []


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
    assert groups == [[2], [0], [5, 4], [3, 1]]  # widths 3072; 100 (two would be 200); 92; 60


@given(LENGTHS, st.integers(1, 8192))
def test_validation_is_all_rows_in_one_order(lengths: list[int], budget: int) -> None:
    groups = validation_batches(lengths, budget)
    assert sorted(row for group in groups for row in group.tolist()) == list(range(len(lengths)))
    assert [g.tolist() for g in groups] == [g.tolist() for g in validation_batches(np.array(lengths), budget)]


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


@pytest.mark.parametrize(
    ("name", "rows", "at_most", "shapes"),
    [("alpaca_roleplay.json", 3146, 0.035, 60), ("prompt_completion_train.jsonl", 1800, 0.045, 70)],
)
def test_padding_on_real_rows(real: Path, name: str, rows: int, at_most: float, shapes: int) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real / "tokenizers/smollm/tokenizer.json"))
    texts = [
        "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in row.turns)
        for row in read_conversations([real / "data/instruction" / name])
        if isinstance(row, Conversation)
    ]
    lengths = [len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    assert len(lengths) == rows
    seen = set()
    for epoch in range(3):
        updates = epoch_order(lengths, 8, seed=0, epoch=epoch)
        groups = [group for update in updates for group in micro_batches(update, lengths, 4096)]
        assert padding_share(groups, lengths) < at_most
        seen |= {(len(group), width(max(lengths[i] for i in group))) for group in groups}
    assert len(seen) <= shapes
