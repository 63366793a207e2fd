"""Rows that were read → found again by what they say or by their number, in a database on disk."""

from __future__ import annotations

from mlxsft.data.findings import shortened
from mlxsft.data.rows import Origin
from mlxsft.data.scratch import Scratch

_TABLES = (
    "texts (number INTEGER PRIMARY KEY, file INTEGER, line INTEGER, words TEXT)",
    "rows (fingerprint INTEGER PRIMARY KEY, number INTEGER)",
    "prompts (fingerprint INTEGER PRIMARY KEY, number INTEGER, answer INTEGER)",
    "leaks (number INTEGER PRIMARY KEY, how TEXT, other INTEGER)",
)


class Remembered:
    """Rows by number: where each was read, its first words, the fingerprints of the whole, the prompt, the answer."""

    def __init__(self, scratch: Scratch) -> None:
        self._database = scratch.database
        for table in _TABLES:
            self._database.execute(f"CREATE TABLE {table}")
        self._files: dict[str, int] = {}

    def place(self, number: int, origin: Origin, text: str) -> None:
        """Keep where a row was read, and the beginning of a text of it."""
        words = shortened(text, 50).encode("utf-8", "replace").decode("utf-8")
        file = self._files.setdefault(origin.file, len(self._files))
        self._database.execute("INSERT INTO texts VALUES (?, ?, ?, ?)", (number, file, origin.line, words))

    def origin(self, number: int) -> Origin:
        file, line = self._one("SELECT file, line FROM texts WHERE number = ?", number)
        return Origin(list(self._files)[file], line)

    def excerpt(self, number: int) -> str:
        return str(self._one("SELECT words FROM texts WHERE number = ?", number)[0])

    def beside(self, number: int, file: str) -> str:
        """The place as it is told beside another one in `file`."""
        origin = self.origin(number)
        return f"line {origin.line}" if origin.file == file else f"{origin}"

    def first_row(self, fingerprint: int, number: int) -> int:
        """The number of the first row with this fingerprint; this one's, which is kept, where none was before it."""
        new = self._database.execute(
            "INSERT INTO rows VALUES (?, ?) ON CONFLICT DO NOTHING", (_signed(fingerprint), number)
        ).rowcount
        return number if new else self._one("SELECT number FROM rows WHERE fingerprint = ?", _signed(fingerprint))[0]

    def first_prompt(self, fingerprint: int, number: int, answer: int) -> tuple[int, int]:
        """The number of the first row that asks this and the fingerprint of its answer, as `first_row` has it."""
        key = _signed(fingerprint)
        new = self._database.execute(
            "INSERT INTO prompts VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (key, number, _signed(answer))
        ).rowcount
        if new:
            return number, answer
        first, given = self._one("SELECT number, answer FROM prompts WHERE fingerprint = ?", key)
        return first, given - _SIGN

    def row(self, fingerprint: int) -> int | None:
        """The number of the first row with this fingerprint, where there is one."""
        return self._found("SELECT number FROM rows WHERE fingerprint = ?", _signed(fingerprint))

    def asked_by(self, fingerprint: int) -> int | None:
        """The number of the first row whose prompt has this fingerprint, where there is one."""
        return self._found("SELECT number FROM prompts WHERE fingerprint = ?", _signed(fingerprint))

    def leak(self, number: int, how: str, other: int) -> None:
        """Keep that a held-out row is like another row; of several ways the first stays."""
        self._database.execute("INSERT INTO leaks VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (number, how, other))

    def leaks(self) -> int:
        return int(self._database.execute("SELECT count(*) FROM leaks").fetchone()[0])

    def first_leaks(self, count: int) -> list[tuple[int, str, int]]:
        """Number, how and from which row, of the first held-out rows that leak."""
        return self._database.execute("SELECT * FROM leaks ORDER BY number LIMIT ?", (count,)).fetchall()

    def _one(self, query: str, key: int) -> tuple[int, ...]:
        found: tuple[int, ...] = self._database.execute(query, (key,)).fetchone()
        return found

    def _found(self, query: str, key: int) -> int | None:
        found = self._database.execute(query, (key,)).fetchone()
        return None if found is None else int(found[0])


_SIGN = -(1 << 63)


def _signed(fingerprint: int) -> int:
    """As SQLite keeps 64 bits."""
    return fingerprint + _SIGN
