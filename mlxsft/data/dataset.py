"""Files of rows → the examples that are trained, those that are held out, and an account of every row."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsft.data.formats import raise_for_broken
from mlxsft.data.holdout import hold_out
from mlxsft.data.phrasings import is_file
from mlxsft.data.render import Example, Renderer
from mlxsft.data.rendered import RenderedRow, render_files
from mlxsft.data.rows import LeftOut
from mlxsft.data.sources import files_of, sources_of
from mlxsft.errors import InputRefused

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe


@dataclass(frozen=True)
class Dataset:
    """`train` and `valid` examples, `left_out` rows, and `ledger`: rows by what became of them; `read` is their sum.

    A row counts once in the ledger, however often its source's weight has it in `train`. `rows` are the same rows
    before that, those of `train` and those of `valid`.
    """

    train: list[Example]
    valid: list[Example]
    left_out: list[LeftOut]
    ledger: dict[str, int]
    notes: list[str] = field(default_factory=list)
    rows: Mapping[str, list[RenderedRow]] = field(default_factory=dict)


def load_dataset(data: DataRecipe, renderer: Renderer, *, seed: int) -> Dataset:
    """Every row that the recipe names, rendered, judged and counted.

    No row is longer than the model's `positions`, whatever `data.max_tokens` says. Raises InputRefused with the
    file:line of every broken row, and when no row is left to train on.
    """
    notes: list[str] = []
    if renderer.positions is not None and renderer.positions < data.max_tokens:
        data = data.model_copy(update={"max_tokens": renderer.positions})
    hashes = data_hashes(data)
    read = {
        split: render_files(sources, data, renderer, split, seed=seed, hashes=hashes)
        for split, sources in sources_of(data).items()
    }
    train, valid = read["train"].rows, read["valid"].rows if "valid" in read else []
    left_out = [row for rendered in read.values() for row in rendered.left_out]
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
    if repeats := sum(row.copies - 1 for row in train):
        notes.append(f"data.train: weights add {repeats} repeated rows to the {len(train)} trained")
    examples = [example for row in train for example in row.repeated()]
    held_out = [example for row in valid for example in row.examples]
    return Dataset(examples, held_out, left_out, ledger, notes, {"train": train, "valid": valid})


def data_hashes(data: DataRecipe) -> dict[str, str]:
    """SHA-256 of every file that is read, by its path. Raises InputRefused for one that is not there."""
    files = [file for split, sources in sources_of(data).items() for file in files_of([s.rows for s in sources], split)]
    if data.templates is not None and is_file(data.templates):
        files.append(Path(data.templates))
    return {str(file): _sha256(file) for file in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _length_notes(rows: Iterable[RenderedRow]) -> list[str]:
    """What was done to rows so that they fit, with the first places."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in sorted({e.note for e in row.examples if e.note}):
            by_note.setdefault(note, []).append(str(row.examples[0].origin))
    return [
        f"{note}: {len(where)} rows ({', '.join(where[:3])}{', …' * (len(where) > 3)})"
        for note, where in by_note.items()
    ]
