"""What a set of rows is like: which languages, formats, openings and categories, how often, and where first."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from mlxsft.data.findings import EXAMPLES, Shown, shortened
from mlxsft.data.places import Origin
from mlxsft.data.scratch import Scratch

OTHERS = "(others)"  # what a profile calls all that it does not name
SHOWN = 20  # values that a profile names
NAMES = ("language", "format", "opening", "category")
_WAITING = 1000  # values that are counted in memory before they go to disk

_TABLES = (
    "CREATE TABLE profile (name TEXT, value TEXT, count INTEGER, shown TEXT, PRIMARY KEY (name, value)) WITHOUT ROWID",
    # What says something: no opening, and no category where there is none at all, is not there either.
    """CREATE VIEW known AS SELECT name, value, count FROM profile
    WHERE value <> '' OR name NOT IN ('opening', 'category')
    OR (name = 'category' AND (SELECT count(*) FROM profile WHERE name = 'category') > 1)""",
)
_ADD = f"""INSERT INTO profile VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count,
shown = CASE WHEN count < {EXAMPLES} THEN shown || excluded.shown ELSE shown END"""
_SMALL = """SELECT value, count FROM known WHERE name = ?1 AND value <> ''
AND count * 10 * (SELECT count(*) FROM known WHERE name = ?1) < (SELECT sum(count) FROM known WHERE name = ?1)
ORDER BY count, value"""


class Profile:
    """Counts of values by what they are values of, and the first rows that have each: exact, and on disk."""

    def __init__(self, scratch: Scratch) -> None:
        self._database = scratch.database
        for table in _TABLES:
            self._database.execute(table)
        self._counts = Counter[tuple[str, str]]()
        self._shown: dict[tuple[str, str], str] = {}  # the first rows of each, a line of JSON each

    def add(self, name: str, value: str, origin: Origin, excerpt: str) -> None:
        """One more of a value."""
        key = name, value
        self._counts[key] += 1
        if self._counts[key] <= EXAMPLES:
            self._shown[key] = self._shown.get(key, "") + json.dumps([str(origin), shortened(excerpt)]) + "\n"
        if len(self._counts) > _WAITING:
            self._write()

    def _write(self) -> None:
        added = ((n, v.encode(errors="replace").decode(), c, self._shown[n, v]) for (n, v), c in self._counts.items())
        self._database.executemany(_ADD, sorted(added))
        self._counts.clear()
        self._shown.clear()

    def total(self, name: str) -> int:
        """How many values were added, those that say nothing included."""
        self._write()
        return int(self._database.execute("SELECT total(count) FROM profile WHERE name = ?", (name,)).fetchone()[0])

    def commonest(self, name: str, most: int = SHOWN) -> Counter[str]:
        """How often the commonest values are there that say something, the commonest first."""
        self._write()
        query = "SELECT value, count FROM known WHERE name = ? ORDER BY count DESC, value LIMIT ?"
        return Counter(dict(self._database.execute(query, (name, most))))

    def small(self, name: str) -> Iterable[tuple[str, int]]:
        """Values with less than a tenth of an even share, and how often they are there, the rarest first."""
        self._write()
        return self._database.execute(_SMALL, (name,))

    def summary(self) -> dict[str, dict[str, int]]:
        """The commonest values, and the others together, so that shares are those of all rows."""
        made = {}
        for name in NAMES:
            if shown := dict(self.commonest(name)):
                made[name] = shown
                if others := self.total(name) - sum(shown.values()):
                    shown[OTHERS] = others
        return made

    def examples(self, name: str, *values: str) -> list[Shown]:
        """The first rows with the first of these values that has any, then with the next."""
        self._write()
        query = "SELECT shown FROM profile WHERE name = ? AND value = ?"
        kept = (shown for value in values for (shown,) in self._database.execute(query, (name, value)))
        return [Shown(*json.loads(line)) for lines in kept for line in lines.splitlines()[:EXAMPLES]][:EXAMPLES]
