"""The fields of a row: each of the type it must have, or the sentence that says what was found instead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from mlxsft.data.conversation import Task, Turn

Row: TypeAlias = Mapping[str, object]


class Unusable(Exception):
    """A row that becomes no Conversation."""

    def __init__(self, reason: str, detail: str, *, broken: bool = True) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.broken = reason, detail, broken


@dataclass(frozen=True, slots=True)
class Draft:
    """What a format makes of a row, before it is judged."""

    turns: list[Turn]
    tools: tuple[Mapping[str, object], ...] = ()
    task: Task | None = None


def text(row: Row, key: str, where: str = "") -> str:
    """The text under a key that must be there."""
    value = row.get(key)
    if isinstance(value, str):
        return value
    found = kind(value) if key in row else "nothing"
    raise Unusable("wrong type", f"{where}{key}: got {found}, expected text")


def optional_text(row: Row, key: str, where: str = "") -> str:
    """The text under a key; absent and null are no text."""
    return "" if row.get(key) is None else text(row, key, where)


def array(row: Row, key: str, where: str = "") -> list[object]:
    """The array under a key, also where it was written as JSON text, as tables hold it; absent and null are empty."""
    value = row.get(key)
    if isinstance(value, str) and (not value.strip() or value.lstrip().startswith("[")):
        value = parsed(value, f"{where}{key}") if value.strip() else []
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unusable("wrong type", f"{where}{key}: got {kind(value)}, expected an array")
    return value


def parsed(written: str, where: str) -> object:
    """The value of JSON that stands as text inside a row."""
    try:
        value: object = json.loads(written, parse_constant=_no_constant)
        if "\\u" in written:
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a character
        return value
    except (ValueError, RecursionError) as error:
        raise Unusable("bad JSON", f"{where}: {error}") from None


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON; write a text or null")


def system_turn(row: Row) -> list[Turn]:
    """The turn that a `system` key opens a conversation with, or none."""
    system = optional_text(row, "system")
    return [Turn("system", system)] if system.strip() else []


def category(row: Row) -> str:
    """What the row says it belongs to; what is no text is named by its JSON."""
    value = row.get("category")
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, default=str)


def kind(value: object) -> str:
    """What JSON calls this value, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {"str": "text", "list": "an array", "dict": "an object", "int": "a number", "float": "a number"}
    return kinds.get(type(value).__name__, f"a {type(value).__name__}")


def shown(value: object) -> str:
    """A name from a file as it may stand in a message: short, and without what steers a terminal."""
    written = json.dumps(value, default=str)
    return written if len(written) <= 40 else f"{written[:37]}..."
