"""Rows on disk → Conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool", "text"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row was read: `file:line`, the line (1-based) on which the row begins."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says. The role `text` stands alone in a conversation: plain text, no template, all of it trained."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its turns in order."""

    turns: tuple[Turn, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A row that is not trained, and why. `broken` rows stop a run; the others are counted."""

    origin: Origin
    reason: str
    detail: str = ""
    broken: bool = False
