"""Files of rows → train, valid and test files whose rows ask different things."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import numpy as np

from mlxsft.data.duplicates import Texts, fingerprint, groups, sharing
from mlxsft.data.formats import Conversation, conversations_of, raise_for_broken
from mlxsft.data.holdout import normalise, position
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.scratch import AT_ONCE, Scratch, open_scratch
from mlxsft.data.sources import RowSource, files_of, rows_of, whole_files
from mlxsft.errors import UsageError
from mlxsft.outputs import refuse_existing

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
    and not written. Raises InputRefused for broken rows, UsageError for files that are there already.
    """
    _refuse_to_overwrite(files_of(sources), out, force)
    files = whole_files(sources)
    with open_scratch() as scratch:
        rows = _Rows(scratch)
        for raw in watch(rows_of(sources), files):
            rows.add(raw, format, columns)
        raise_for_broken(rows.broken)
        found = _Groups(scratch, rows)
        for name, share, salt in (("test", test, seed), ("valid", valid, seed + 1)):
            found.draw(name, share, salt)
        written = _write(out, watch(rows_of(sources), files), found.sides(), rows.kept)
        ledger = {"read": len(rows.kept)} | {name: written[name] for name in SPLITS} | rows.left_out
        return Split(ledger, len(found))


class _Rows:
    """What a split needs to know of each row, on disk: what it asks, what it is like, its category."""

    def __init__(self, scratch: Scratch) -> None:
        self.kept = bytearray()  # of every row read, whether it is written
        self.left_out = Counter[str]()  # by reason
        self.broken: list[LeftOut] = []
        self.prompts = scratch.spill(np.uint64)
        self._waiting = array("Q")  # prompts that are not on disk yet
        self._asked, self._whole = Texts(scratch), Texts(scratch)
        self._database = scratch.database
        self._database.execute("CREATE TABLE categories (number INTEGER PRIMARY KEY, category TEXT)")

    def add(self, raw: Raw, format: str, columns: Mapping[str, str]) -> None:
        told = [raw] if isinstance(raw, LeftOut) else conversations_of(raw[1], raw[0], format, columns=columns)
        rows = [row for row in told if isinstance(row, Conversation)]  # several where a row holds several tasks
        self.kept.append(bool(rows))
        if not rows:
            self._leave_out(next(row for row in told if isinstance(row, LeftOut)))
            return
        asked = _question(rows[0])
        number = self._asked.add(asked)
        self._whole.add("\n".join(turn.content for row in rows for turn in row.turns))
        self._waiting.append(fingerprint(normalise(asked)))
        if len(self._waiting) == AT_ONCE:
            self._write()
        if rows[0].category:
            kept = rows[0].category.encode(errors="replace").decode()
            self._database.execute("INSERT INTO categories VALUES (?, ?)", (number, kept))

    def _leave_out(self, row: LeftOut) -> None:
        self.left_out[row.reason] += 1
        if row.broken:
            self.broken.append(row)

    def _write(self) -> None:
        self.prompts.append(np.frombuffer(self._waiting, dtype=np.uint64))
        self._waiting = array("Q")

    def leaders(self) -> array[int]:
        """For each kept row the first one that it must stay with."""
        self._write()
        equal = ((pair >> 32, pair & 0xFFFFFFFF) for pairs in sharing(self.prompts) for pair in pairs.tolist())
        near = chain.from_iterable((self._asked.pairs(), self._whole.pairs()))
        return groups(len(self.prompts), chain(equal, near))

    def facts(self) -> Iterator[tuple[int, str]]:
        """Of each kept row the fingerprint of its prompt, and its category."""
        named = iter(self._database.execute("SELECT number, category FROM categories ORDER BY number"))
        next_one = next(named, None)
        for start, prompts in self.prompts.pieces():
            for number, prompt in enumerate(prompts.tolist(), start=start):
                if next_one is not None and next_one[0] == number:
                    yield prompt, next_one[1]
                    next_one = next(named, None)
                else:
                    yield prompt, ""


class _Groups:
    """Rows that stay together, and the side that each such group is on.

    A group is called by the least fingerprint of its prompts, which does not depend on the order of the rows.
    """

    def __init__(self, scratch: Scratch, rows: _Rows) -> None:
        self._leaders = rows.leaders()  # of each row
        self._database = scratch.database
        self._database.create_function("position", 2, position, deterministic=True)
        self._database.execute(
            "CREATE TABLE groups (leader INTEGER PRIMARY KEY, name TEXT, category TEXT, size INTEGER, side TEXT)"
        )
        facts = zip(self._leaders, rows.facts(), strict=True)
        self._database.executemany(_ADD, ((leader, f"{prompt:016x}", kind) for leader, (prompt, kind) in facts))

    def __len__(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM groups").fetchone()[0])

    def draw(self, side: str, share: float, seed: int) -> None:
        """Put about `share` of the rows on a side, the same share of every category; a mixed group has its first one.

        Groups are walked category by category, each owing its share, and one is drawn whenever what is owed covers it:
        small categories are served as often as their size says, where rounding each by itself would hold out half of a
        category of two. Groups that are drawn already are passed over, but owe as well. At least one group is drawn and
        one is left, where there are enough.
        """
        (free,) = self._database.execute("SELECT count(*) FROM groups WHERE side IS NULL").fetchone()
        if share == 0 or free < 2:
            return
        drawn = array("I")
        owed = 0.5
        order = "SELECT leader, size, side FROM groups ORDER BY category, position(name, ?)"
        for leader, size, gone in self._database.execute(order, (seed,)):
            owed += share * size
            if gone is None and owed >= size and len(drawn) < free - 1:
                drawn.append(leader)
                owed -= size
        if not drawn:
            least = "SELECT leader FROM groups WHERE side IS NULL ORDER BY size, position(name, ?) LIMIT 1"
            drawn.append(self._database.execute(least, (seed,)).fetchone()[0])
        self._database.executemany("UPDATE groups SET side = ? WHERE leader = ?", ((side, leader) for leader in drawn))

    def sides(self) -> Iterator[str]:
        """Of each row the split it is in."""
        codes = bytearray(len(self._leaders))
        for leader, side in self._database.execute("SELECT leader, side FROM groups WHERE side IS NOT NULL"):
            codes[leader] = SPLITS.index(side)
        return (SPLITS[codes[leader]] for leader in self._leaders)


_ADD = """INSERT INTO groups VALUES (?, ?, ?, 1, NULL) ON CONFLICT DO UPDATE
SET size = size + 1, name = min(name, excluded.name), category = min(category, excluded.category)"""


def _question(row: Conversation) -> str:
    """The first question, or the plain text: the system turn is the same for many rows and asks nothing."""
    return next((t.content for t in row.turns if t.role in ("user", "text")), row.turns[0].content)


def _refuse_to_overwrite(files: Sequence[Path], out: Path, force: bool) -> None:
    targets = [out / f"{name}.jsonl" for name in SPLITS]
    if same := [t for t in targets if any(t.exists() and t.samefile(f) for f in files if f.exists())]:
        raise UsageError(f"{same[0]}: would be read and written at once", "Name another folder with --out.")
    for target in targets:
        refuse_existing(target, force=force, instead="Name another folder with --out")


def _write(out: Path, rows: Iterable[Raw], names: Iterator[str], kept: Sequence[int]) -> Counter[str]:
    """Every kept row into the file of its split, and how many each got; the files appear when all are whole."""
    out.mkdir(parents=True, exist_ok=True)
    aside = {name: out / f".{name}.jsonl.{os.getpid()}" for name in SPLITS}
    written = Counter[str]()
    try:
        streams = {name: path.open("w", encoding="utf-8", newline="\n") for name, path in aside.items()}
        try:
            for raw, keep in zip(rows, kept, strict=True):
                if keep and not isinstance(raw, LeftOut):
                    written[name := next(names)] += 1
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
        return written
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
