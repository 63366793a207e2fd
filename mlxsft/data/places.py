"""Where a row was read, and why one is not trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row was read: `file:line`, the line (1-based) on which the row begins."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained, and why. `broken` rows stop a run; the others are counted."""

    origin: Origin
    reason: str  # a short slug that a ledger counts
    detail: str = ""
    broken: bool = False
    column: int | None = None  # 1-based, in characters, where one place in the line is meant

    @property
    def place(self) -> str:
        return f"{self.origin}" if self.column is None else f"{self.origin}:{self.column}"

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f": {self.detail}" if self.detail else "")
