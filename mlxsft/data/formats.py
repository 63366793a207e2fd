"""JSON values → Conversation: every known layout of a row.

No row is dropped: what is not a Conversation is a LeftOut that says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from mlxsft.data.rows import LeftOut, Origin, files_of, read_rows
from mlxsft.errors import InputRefused, UsageError

Role = Literal["system", "user", "assistant", "tool", "text"]
Row: TypeAlias = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: its name and its arguments, a JSON value (mostly an object)."""

    name: str
    arguments: object
    id: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one role says. The role `text` stands alone in a conversation: plain text, no template, all trained.

    `trained` False takes an answer out of training; `reasoning` is what the assistant thought before `content`;
    `name` and `call_id` say which tool a `tool` turn answers for.
    """

    role: Role
    content: str
    trained: bool = True
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""
    call_id: str = ""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row: its turns in order, the tools that it offers (JSON Schema objects, as OpenAI's API takes them), and
    the category it belongs to, where it names one."""

    turns: tuple[Turn, ...]
    origin: Origin
    tools: tuple[Mapping[str, object], ...] = ()
    category: str = ""


class _Unusable(Exception):
    """A row that becomes no Conversation."""

    def __init__(self, reason: str, detail: str, *, broken: bool = True) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail, self.broken = reason, detail, broken


def read_conversations(
    paths: Sequence[Path],
    *,
    format: str = "auto",
    fill: Mapping[str, str] = MappingProxyType({}),
    split: str = "train",
) -> Iterator[Conversation | LeftOut]:
    """Every row of the files as a Conversation, or as the LeftOut that says why not, in the order of the files.

    Missing files and unknown formats are refused before the first row is read. `fill` gives the values of `{{name}}`
    placeholders; `split` is the file that is meant where a path is a folder.
    """
    if format != "auto" and format not in FORMATS:
        raise UsageError(f"data.format: got {_shown(format)}", f"formats: auto, {', '.join(FORMATS)}")
    rows = read_rows(files_of(paths, split))
    return (row if isinstance(row, LeftOut) else conversation_of(row[1], row[0], format, fill) for row in rows)


def conversation_of(
    row: object, origin: Origin, format: str = "auto", fill: Mapping[str, str] = MappingProxyType({})
) -> Conversation | LeftOut:
    """The Conversation that one JSON value stands for, or the LeftOut that says why it is none."""
    try:
        if not isinstance(row, dict):
            raise _Unusable("not an object", f"got {_kind(row)}, expected an object with named fields")
        turns = _format_of(row, format).turns(row)
        filled = tuple(Turn(turn.role, _filled(turn.content, fill)) for turn in turns)
        _check_turns(filled)
    except _Unusable as problem:
        return LeftOut(origin, problem.reason, problem.detail, problem.broken)
    return Conversation(filled, origin)


def raise_for_broken(rows: Sequence[LeftOut]) -> None:
    """Nothing when no row is broken; otherwise one InputRefused with their number and the first 20."""
    broken = [row for row in rows if row.broken]
    if not broken:
        return
    lines = [f"{len(broken)} broken {'row' if len(broken) == 1 else 'rows'}", *map(str, broken[:20])]
    if len(broken) > 20:
        lines.append(f"and {len(broken) - 20} more")
    raise InputRefused("\n  ".join(lines), "correct these rows or take them out of the file")


def _filled(text: str, fill: Mapping[str, str]) -> str:
    """The text with the placeholders that `fill` names replaced, once; everything else stays as it is."""
    if not fill or "{{" not in text:
        return text
    return _PLACEHOLDER.sub(lambda found: fill.get(found[1], found[0]), text)


_PLACEHOLDER = re.compile(r"\{\{[ \t]*([\w.-]+)[ \t]*\}\}")


def _check_turns(turns: Sequence[Turn]) -> None:
    """Refuses what cannot be trained on, whatever its format was."""
    for i, turn in enumerate(turns):
        if turn.role == "system" and i > 0:
            raise _Unusable("system turn not first", f"turn {i + 1} is the system's; it may only open a conversation")
    if not any(turn.role in ("assistant", "text") for turn in turns):
        raise _Unusable("no assistant turn", "nothing here could be trained", broken=False)
    for i, turn in enumerate(turns):
        if turn.role in _EMPTY and not turn.content.strip():
            raise _Unusable(_EMPTY[turn.role], f"turn {i + 1} of {len(turns)} has no text", broken=False)


_EMPTY: Mapping[str, str] = {"user": "empty prompt", "assistant": "empty answer", "text": "empty text"}


def _alpaca(row: Row) -> list[Turn]:
    _refuse_unread(row, ("history",))
    parts = [_text(row, "instruction"), _optional_text(row, "input")]
    return _one_answer(row, "\n\n".join(part for part in parts if part.strip()), "output")


def _prompt_completion(row: Row) -> list[Turn]:
    if "completion" in row and "response" in row:
        raise _Unusable("two answers", "both completion and response are there; keep the one to be trained")
    return _one_answer(row, _text(row, "prompt"), "completion" if "completion" in row else "response")


def _one_answer(row: Row, prompt: str, answer: str) -> list[Turn]:
    return [*_system(row), Turn("user", prompt), Turn("assistant", _text(row, answer))]


def _plain_text(row: Row) -> list[Turn]:
    return [Turn("text", _text(row, "text"))]


def _messages(row: Row) -> list[Turn]:
    _refuse_unread(row, ("tools", "functions"))
    messages = row["messages"]
    if not isinstance(messages, list):
        raise _Unusable("wrong type", f"messages: got {_kind(messages)}, expected an array")
    if not messages:
        raise _Unusable("no messages", "messages: got an empty array")
    return [*_system(row), *(_message(message, f"messages[{i}]") for i, message in enumerate(messages))]


def _message(message: object, where: str) -> Turn:
    """One turn of the messages format; what would be lost or trained differently than it says is refused."""
    if not isinstance(message, dict):
        raise _Unusable("wrong type", f"{where}: got {_kind(message)}, expected an object")
    _refuse_unread(message, _UNREAD_IN_MESSAGES, f"{where}.")
    role = _text(message, "role", f"{where}.")
    if role in ("tool", "function"):
        raise _Unusable("not read yet", f"{where}: turns of the role {role} are not read yet")
    if role not in _ROLES:
        raise _Unusable("unknown role", f"{where}.role: got {_shown(role)}, expected system, user or assistant")
    for key in ("weight", "loss_weight", "train"):
        if message.get(key) is not None and message[key] != (role == "assistant"):
            detail = f"{where}.{key}: assistant turns are trained (1), all others are not (0); nothing else is read yet"
            raise _Unusable("not read yet", detail)
    content = message.get("content")
    if not isinstance(content, list):
        return Turn(_ROLES[role], _text(message, "content", f"{where}."))
    return Turn(_ROLES[role], "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)))


_ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


_UNREAD_IN_MESSAGES = ("tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "thinking")


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise _Unusable("wrong type", f"{where}: got {_kind(part)}, expected an object with type and text")
    if part.get("type") != "text":
        raise _Unusable("not read yet", f"{where}: parts of type {_shown(part.get('type'))} are not read yet")
    return _text(part, "text" if "text" in part else "value", f"{where}.")


def _system(row: Row) -> list[Turn]:
    system = _optional_text(row, "system")
    return [Turn("system", system)] if system.strip() else []


def _refuse_unread(row: Row, keys: Sequence[str], where: str = "") -> None:
    for key in keys:
        if row.get(key):
            raise _Unusable("not read yet", f"{where}{key} is not read yet; training without it would change the row")


def _text(row: Row, key: str, where: str = "") -> str:
    value = row.get(key)
    if isinstance(value, str):
        return value
    found = _kind(value) if key in row else "nothing"
    raise _Unusable("wrong type", f"{where}{key}: got {found}, expected text")


def _optional_text(row: Row, key: str) -> str:
    return "" if row.get(key) is None else _text(row, key)


def _kind(value: object) -> str:
    """What JSON calls this value, with its article."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {"str": "text", "list": "an array", "dict": "an object"}
    return kinds.get(type(value).__name__, "a number")


def _shown(value: object) -> str:
    """A name from a file as it may stand in a message: short, and without what steers a terminal."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@dataclass(frozen=True, slots=True)
class _Format:
    needs: tuple[tuple[str, ...], ...]  # of each group one key is there
    looks: str
    turns: Callable[[Row], list[Turn]]

    def fits(self, row: Row) -> bool:
        return all(any(key in row for key in group) for group in self.needs)


# In the order in which a row is tried: the more particular first, since published sets carry a rendered `text` along.
FORMATS: Mapping[str, _Format] = {
    "messages": _Format((("messages",),), "messages: [{role, content}]", _messages),
    "alpaca": _Format((("instruction",), ("output",)), "instruction, output, maybe input, system", _alpaca),
    "prompt_completion": _Format(
        (("prompt",), ("completion", "response")), "prompt, completion or response, maybe system", _prompt_completion
    ),
    "text": _Format((("text",),), "text", _plain_text),
}


def _format_of(row: Row, name: str) -> _Format:
    """The named format, or for `auto` the first that the keys of the row fit."""
    candidates = list(FORMATS) if name == "auto" else [name]
    for candidate in candidates:
        if FORMATS[candidate].fits(row):
            return FORMATS[candidate]
    keys = ", ".join(_shown(key)[1:-1] for key in list(row)[:10]) + (", ..." if len(row) > 10 else "")
    known = "; ".join(f"{candidate} ({FORMATS[candidate].looks})" for candidate in candidates)
    detail = f"keys {keys or '(none)'} are none of the known formats: {known}"
    raise _Unusable("unknown format", detail if name == "auto" else f"keys {keys or '(none)'}, expected {known}")
