"""Files of rows → the examples that are trained, those that are held out, and an account of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsft.data.formats import Conversation, raise_for_broken, read_conversations
from mlxsft.data.holdout import hold_out, normalise
from mlxsft.data.phrasings import is_file, load_phrasings
from mlxsft.data.render import Example, Renderer
from mlxsft.data.rows import LeftOut, files_of
from mlxsft.data.sources import WeightedPath, sources_of
from mlxsft.errors import InputRefused

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe


@dataclass(frozen=True)
class _Row:
    """One row with what it gave."""

    key: str  # rows with an equal key are held out together
    examples: list[Example]
    copies: int = 1  # how often an epoch has it, where it is trained
    phrased: bool = False


@dataclass(frozen=True)
class Dataset:
    """`train` and `valid` examples, `left_out` rows, and `ledger`: rows by what became of them; `read` is their sum.

    A row counts once in the ledger, however often its source's weight has it in `train`.
    """

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
    read = {split: _read(sources, data, renderer, split, seed) for split, sources in sources_of(data).items()}
    train, left_out = read["train"]
    valid, more_left_out = read.get("valid", ([], []))
    left_out = left_out + more_left_out
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
    if data.templates is not None:
        phrased = sum(row.phrased for row in (*train, *valid))
        rest = len(train) + len(valid) - phrased
        notes.append(f"data.templates: {phrased} rows phrased, {rest} as they stand (no single question)")
    repeated = [row for row in train for _ in range(row.copies)]
    if len(repeated) > len(train):
        notes.append(f"data.train: weights add {len(repeated) - len(train)} repeated rows to the {len(train)} trained")
    return Dataset(_examples(repeated), _examples(valid), left_out, ledger, notes)


def data_hashes(data: DataRecipe) -> dict[str, str]:
    """SHA-256 of every file that is read, by its path. Raises InputRefused for one that is not there."""
    files = [file for split, sources in sources_of(data).items() for file in files_of([s.path for s in sources], split)]
    if data.templates is not None and is_file(data.templates):
        files.append(Path(data.templates))
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _read(
    sources: Sequence[WeightedPath], data: DataRecipe, renderer: Renderer, split: str, seed: int
) -> tuple[list[_Row], list[LeftOut]]:
    """The rows of the sources and those that are left out. Each keeps the key of the question as its file has it."""
    files_of([source.path for source in sources], split)  # every missing file is named at once
    phrasings = load_phrasings(data.templates) if data.templates is not None else None
    rows, left_out = [], []
    for source in sources:
        for row in read_conversations(
            [source.path], format=data.format, columns=data.columns, fill=data.fill, split=split
        ):
            if isinstance(row, LeftOut):
                left_out.append(row)
                continue
            copies = source.copies(row, seed=seed)
            if not copies:
                left_out.append(LeftOut(row.origin, "left out by weight", f"the weight is {source.weight:g}"))
                continue
            phrased = row if phrasings is None else phrasings.phrase(row, seed=seed)
            made = list(renderer.examples(phrased, data))
            refused = sorted((m for m in made if isinstance(m, LeftOut)), key=lambda m: not m.broken)
            examples = [m for m in made if isinstance(m, Example)]
            if examples and not any(m.broken for m in refused):
                rows.append(_Row(_key(row), examples, copies, phrased is not row))
            else:
                left_out += refused[:1]
    return rows, left_out


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
