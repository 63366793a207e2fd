"""Files of rows → train, valid and test files whose rows ask different things."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mlxsft.data.duplicates import Texts, fingerprint, groups
from mlxsft.data.formats import Conversation, conversations_of, raise_for_broken
from mlxsft.data.holdout import draw, normalise
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.sources import RowSource, files_of, rows_of, whole_files
from mlxsft.errors import InputRefused

SPLITS = ("train", "valid", "test")
Raw = tuple[Origin, object] | LeftOut
Watch = Callable[[Iterable[Raw], Sequence[Path]], Iterable[Raw]]  # the rows, and the files they are read from


@dataclass(frozen=True)
class Split:
    """`ledger`: rows by where they went, adding up to `read`; `groups`: how many sets of rows were kept together."""

    ledger: dict[str, int]
    groups: int


def split_files(
    sources: Sequence[RowSource],
    out: Path,
    *,
    valid: float,
    test: float,
    seed: int = 0,
    format: str = "auto",
    columns: Mapping[str, str] = MappingProxyType({}),
    force: bool = False,
    watch: Watch = lambda rows, files: rows,
) -> Split:
    """The rows of the files written to train.jsonl, valid.jsonl and test.jsonl in `out`, each as it was.

    Rows with equal or nearly equal prompts, and near-duplicates, are on one side. Each category gives its share. Which
    rows are held out depends on what they say and on the seed, not on their order. Rows that train nothing are counted
    and not written. Raises InputRefused for broken rows and for files that are there already.
    """
    _refuse_to_overwrite(files_of(sources), out, force)
    rows, files = _Rows(), whole_files(sources)
    for raw in watch(rows_of(sources), files):
        rows.add(raw, format, columns)
    raise_for_broken([row for row in rows.left_out if row.broken])
    keys = rows.keys()
    held = {"test": draw(keys, rows.categories, test, seed=seed)}
    held["valid"] = draw(keys, rows.categories, valid, seed=seed + 1, taken=held["test"])
    names = np.full(len(keys), "train", dtype=object)
    for name, mask in held.items():
        names[mask] = name
    _write(out, watch(rows_of(sources), files), iter(names.tolist()), rows.kept)
    ledger = {"read": len(rows.kept)} | {name: int((names == name).sum()) for name in SPLITS}
    ledger |= Counter(row.reason for row in rows.left_out)
    return Split(ledger, len(set(keys)))


class _Rows:
    """What a split needs to know of each row: what it asks, what it is like, its category."""

    def __init__(self) -> None:
        self.kept: list[bool] = []  # of every row read, whether it is written
        self.left_out: list[LeftOut] = []
        self.categories: list[str] = []
        self._prompts: list[int] = []
        self._asked, self._whole = Texts(), Texts()

    def add(self, raw: Raw, format: str, columns: Mapping[str, str]) -> None:
        told = [raw] if isinstance(raw, LeftOut) else conversations_of(raw[1], raw[0], format, columns=columns)
        rows = [row for row in told if isinstance(row, Conversation)]  # several where a row holds several tasks
        self.kept.append(bool(rows))
        if not rows:
            self.left_out += [row for row in told[:1] if isinstance(row, LeftOut)]
            return
        asked = _question(rows[0])
        self.categories.append(rows[0].category)
        self._prompts.append(fingerprint(normalise(asked)))
        self._asked.add(asked)
        self._whole.add("\n".join(turn.content for row in rows for turn in row.turns))

    def keys(self) -> list[str]:
        """For each kept row the name of its group, which does not depend on the order of the rows."""
        first: dict[int, int] = {}
        equal = [(first.setdefault(prompt, i), i) for i, prompt in enumerate(self._prompts)]
        leaders = groups(len(self._prompts), [*equal, *self._asked.pairs(), *self._whole.pairs()])
        names: dict[int, int] = {}
        for leader, prompt in zip(leaders.tolist(), self._prompts, strict=True):
            names[leader] = min(prompt, names.get(leader, prompt))
        return [f"{names[leader]:016x}" for leader in leaders.tolist()]


def _question(row: Conversation) -> str:
    """The first question, or the plain text: the system turn is the same for many rows and asks nothing."""
    return next((t.content for t in row.turns if t.role in ("user", "text")), row.turns[0].content)


def _refuse_to_overwrite(files: Sequence[Path], out: Path, force: bool) -> None:
    targets = [out / f"{name}.jsonl" for name in SPLITS]
    if same := [t for t in targets if any(t.exists() and t.samefile(f) for f in files if f.exists())]:
        raise InputRefused(f"{same[0]}: would be read and written at once", "Give another folder with --out.")
    if not force and (there := [t for t in targets if t.exists()]):
        raise InputRefused(f"{there[0]}: is there already", "Give another folder with --out, or --force.")


def _write(out: Path, rows: Iterable[Raw], names: Iterator[str], kept: Sequence[bool]) -> None:
    """Every kept row into the file of its split; the files appear under their names when all are whole."""
    out.mkdir(parents=True, exist_ok=True)
    aside = {name: out / f".{name}.jsonl.{os.getpid()}" for name in SPLITS}
    written: set[str] = set()
    try:
        streams = {name: path.open("w", encoding="utf-8", newline="\n") for name, path in aside.items()}
        try:
            for raw, keep in zip(rows, kept, strict=True):
                if keep and not isinstance(raw, LeftOut):
                    written.add(name := next(names))
                    streams[name].write(json.dumps(raw[1], ensure_ascii=False) + "\n")
        finally:
            for stream in streams.values():
                stream.close()
        for name, path in aside.items():
            # An empty file would be refused by training; one of an earlier split would leak into this one.
            if name in written:
                path.replace(out / f"{name}.jsonl")
            else:
                (out / f"{name}.jsonl").unlink(missing_ok=True)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
