"""Files of rows → the examples that are trained, those that are held out, and an account of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsft.data.formats import Conversation, raise_for_broken, read_conversations
from mlxsft.data.holdout import hold_out, normalise
from mlxsft.data.render import Example, Renderer
from mlxsft.data.rows import LeftOut, files_of
from mlxsft.errors import InputRefused

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe


@dataclass(frozen=True)
class _Row:
    """One row with what it gave."""

    key: str  # rows with an equal key are held out together
    examples: list[Example]


@dataclass(frozen=True)
class Dataset:
    """`train` and `valid` examples, `left_out` rows, and `ledger`: rows by what became of them; `read` is their sum."""

    train: list[Example]
    valid: list[Example]
    left_out: list[LeftOut]
    ledger: dict[str, int]
    notes: list[str] = field(default_factory=list)


def load_dataset(data: DataRecipe, renderer: Renderer, *, seed: int) -> Dataset:
    """Every row that the recipe names, rendered, judged and counted.

    No row is longer than the model's `positions`, whatever `data.max_tokens` says. Raises InputRefused with the
    file:line of every broken row, and when no row is left to train on.
    """
    notes: list[str] = []
    if renderer.positions is not None and renderer.positions < data.max_tokens:
        data = data.model_copy(update={"max_tokens": renderer.positions})
    train, left_out = _read(data_paths(data)["train"], data, renderer, "train")
    valid: list[_Row] = []
    if isinstance(data.valid, str):
        valid, more_left_out = _read(data_paths(data)["valid"], data, renderer, "valid")
        left_out += more_left_out
    raise_for_broken([row for row in left_out if row.broken])
    if isinstance(data.valid, float) and train:
        held = hold_out([row.key for row in train], data.valid, seed=seed)
        valid = [row for row, out in zip(train, held, strict=True) if out]
        train = [row for row, out in zip(train, held, strict=True) if not out]
        if not valid:
            notes.append("no row can be held out: every row asks the same; there is no validation")
    if not train:
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(r.reason for r in left_out).most_common())
        raise InputRefused(
            f"data.train: no row is left to train on: {reasons or 'nothing was read'}",
            "`mlxsft data show FILE --model MODEL` shows what becomes of a row.",
        )
    ledger = {"read": len(train) + len(valid) + len(left_out), "trained": len(train), "held out": len(valid)}
    ledger |= Counter(row.reason for row in left_out)
    notes += _length_notes([*train, *valid])
    return Dataset(_examples(train), _examples(valid), left_out, ledger, notes)


def data_paths(data: DataRecipe) -> dict[str, list[Path]]:
    """The files and folders that the recipe names, by what they are for: `train`, and `valid` where it is no share."""
    named = {"train": data.train, "valid": data.valid}
    return {
        split: [Path(p) for p in ([paths] if isinstance(paths, str) else paths)]
        for split, paths in named.items()
        if isinstance(paths, str | tuple)
    }


def data_hashes(data: DataRecipe) -> dict[str, str]:
    """SHA-256 of every file that is read, by its path. Raises InputRefused for one that is not there."""
    files = [file for split, paths in data_paths(data).items() for file in files_of(paths, split)]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _read(paths: Sequence[Path], data: DataRecipe, renderer: Renderer, split: str) -> tuple[list[_Row], list[LeftOut]]:
    rows: list[_Row] = []
    left_out: list[LeftOut] = []
    for row, made in renderer.rendered(_readable(paths, data, split, left_out), data):
        refused = sorted((m for m in made if isinstance(m, LeftOut)), key=lambda m: not m.broken)
        examples = [m for m in made if isinstance(m, Example)]
        if examples and not any(m.broken for m in refused):
            rows.append(_Row(_key(row), examples))
        else:
            left_out += refused[:1]
    return rows, left_out


def _readable(paths: Sequence[Path], data: DataRecipe, split: str, left_out: list[LeftOut]) -> Iterator[Conversation]:
    """The rows that can be read; the others are added to `left_out`."""
    for row in read_conversations(paths, format=data.format, fill=data.fill, split=split):
        if isinstance(row, LeftOut):
            left_out.append(row)
        else:
            yield row


def _key(row: Conversation) -> str:
    """What a row asks: the question decides the side on which it lands, so that none is both trained and tested."""
    asked = next((t.content for t in row.turns if t.role in ("user", "text")), row.turns[0].content)
    return normalise(asked)


def _examples(rows: Iterable[_Row]) -> list[Example]:
    return [example for row in rows for example in row.examples]


def _length_notes(rows: Iterable[_Row]) -> list[str]:
    """What was done to rows so that they fit, with the first places."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in sorted({e.note for e in row.examples if e.note}):
            by_note.setdefault(note, []).append(str(row.examples[0].origin))
    return [
        f"{note}: {len(where)} rows ({', '.join(where[:3])}{', …' * (len(where) > 3)})"
        for note, where in by_note.items()
    ]
