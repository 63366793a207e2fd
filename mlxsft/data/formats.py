"""Rows on disk → Conversation.

`read_rows` knows files and JSON, `conversation_of` knows the formats; between them goes one JSON value with its line.
No row is dropped: what is not a Conversation is a LeftOut that says why.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from mlxsft.errors import InputRefused, UsageError

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
    """What one role says. The role `text` stands alone in a conversation: plain text, no template, all trained."""

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
    reason: str  # a short slug that a ledger counts
    detail: str = ""
    broken: bool = False
    column: int | None = None  # 1-based, in characters, where one place in the line is meant

    def __str__(self) -> str:
        place = f"{self.origin}" if self.column is None else f"{self.origin}:{self.column}"
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


# ---- files ---------------------------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".json")
_SPACE = " \t\r\n"  # what JSON calls white space
_LINE_SPACE = _SPACE.encode()


def files_of(paths: Iterable[Path], split: str = "train") -> list[Path]:
    """The files to read, each there and of a known kind: a folder stands for its train.jsonl or train.json."""
    files, problems = [], []
    for path in paths:
        names = [path / f"{split}{suffix}" for suffix in SUFFIXES] if path.is_dir() else [path]
        found = [name for name in names if name.exists()]
        if not found:
            missing = f"holds no {split}.jsonl or {split}.json" if path.is_dir() else "no such file"
            problems.append(f"{path}: {missing}")
        elif len(found) > 1:
            problems.append(f"{path}: holds both {split}.jsonl and {split}.json; name the one that is meant")
        elif found[0].suffix.lower() not in SUFFIXES:
            problems.append(f"{path}: got {found[0].suffix or 'no ending'}; .jsonl and .json are read")
        files += found
    if problems:
        raise InputRefused("\n".join(problems), f"give .jsonl or .json files, or a folder with a {split}.jsonl")
    return files


def read_rows(files: Iterable[Path]) -> Iterator[tuple[Origin, object] | LeftOut]:
    """Every row of the files as the JSON value that stands there, or as the LeftOut that says why it is none."""
    for file in files:
        empty = True
        try:
            for row in _file_rows(file):
                empty = False
                yield row
        except OSError as error:
            problem = f"{file}: cannot be read: {error.strerror or error}"
            raise InputRefused(problem, "check what it is and who may read it") from error
        if empty:
            raise InputRefused(f"{file}: holds no rows", "one JSON object a line, or one array of objects, is expected")


def _file_rows(file: Path) -> Iterator[tuple[Origin, object] | LeftOut]:
    """The rows of one file; its content decides between an array, one object over many lines, and lines."""
    with file.open("rb") as stream:
        start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        stream.seek(start)
        first = next((line for line in stream if line.strip(_LINE_SPACE)), b"").strip(_LINE_SPACE)
        stream.seek(start)
        if first.startswith(b"["):
            yield from _array_rows(str(file), stream.read())
            return
        if first.startswith(b"{") and _stops_early(first):
            text = stream.read()
            stream.seek(start)
            if not _stops_early(text):
                yield from _line_rows(str(file), [text.rstrip(_LINE_SPACE)])
                return
        yield from _line_rows(str(file), stream)


def _stops_early(data: bytes) -> bool:
    """Whether this is not one whole JSON value, such as the first line of an object written over many lines."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return True
    return False


def _line_rows(file: str, lines: Iterable[bytes]) -> Iterator[tuple[Origin, object] | LeftOut]:
    """One row a line; what is wrong with one line does not touch the next."""
    reader = _JsonReader(file)
    for number, raw in enumerate(lines, start=1):
        if not raw.strip(_LINE_SPACE):
            continue
        text = _decoded(raw.rstrip(_LINE_SPACE), Origin(file, number))
        if isinstance(text, LeftOut):
            yield text
            continue
        start = _skip_space(text, 0)
        row, end = reader.value(text, start, line=number + text.count("\n", 0, start), first_line=number)
        if end is not None and end < len(text):
            row = LeftOut(Origin(file, number), "bad JSON", "more text after the row", broken=True, column=end + 1)
        yield row


def _array_rows(file: str, data: bytes) -> Iterator[tuple[Origin, object] | LeftOut]:
    """One row an element, each with the line on which it begins; a syntax error ends the file."""
    text = _decoded(data, Origin(file, 1))
    if isinstance(text, LeftOut):
        yield text
        return
    reader = _JsonReader(file)
    position = _skip_space(text, _skip_space(text, 0) + 1)
    line, counted = 1, 0
    closed = text.startswith("]", position)
    while not closed:
        line, counted = line + text.count("\n", counted, position), position
        row, end = reader.value(text, position, line=line, first_line=1)
        yield row
        if end is None:
            return
        position = _skip_space(text, end)
        if not text.startswith((",", "]"), position):
            yield _syntax_error(file, text, position, "expected a comma or the end of the array")
            return
        closed = text[position] == "]"
        position = _skip_space(text, position + 1)
    if position < len(text):
        yield _syntax_error(file, text, position, "more text after the array")


def _syntax_error(file: str, text: str, position: int, what: str) -> LeftOut:
    """The broken row for an error between the elements of an array, after which nothing more is read."""
    error = json.JSONDecodeError(what, text, position)
    detail = f"{what}; nothing after it is read"
    return LeftOut(Origin(file, error.lineno), "bad JSON", detail, broken=True, column=error.colno)


def _skip_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in _SPACE:
        start += 1
    return start


def _decoded(data: bytes, origin: Origin) -> str | LeftOut:
    """The text of these bytes, which begin on the line of `origin`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line = origin.line + before.count(b"\n")
        place = error.start - before.rfind(b"\n")
        detail = f"byte {place} of the line is 0x{data[error.start]:02x}; save the file as UTF-8"
        return LeftOut(Origin(origin.file, line), "not UTF-8", detail, broken=True)


_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


class _JsonReader:
    """Strict JSON, value by value: refuses NaN and Infinity, half characters and nesting without end."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._constants: list[str] = []  # collected, not raised, so that an array can be read on
        self._decoder = json.JSONDecoder(parse_constant=self._constants.append)

    def value(
        self, text: str, start: int, *, line: int, first_line: int
    ) -> tuple[tuple[Origin, object] | LeftOut, int | None]:
        """The value at `start`, on `line`, and where it ends; no end when that cannot be known.

        `first_line` is the line on which `text` begins.
        """
        origin = Origin(self._file, line)
        self._constants.clear()
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            place = Origin(self._file, first_line + error.lineno - 1)
            return LeftOut(place, "bad JSON", error.msg, broken=True, column=error.colno), None
        except RecursionError:
            return LeftOut(origin, "bad JSON", "nested too deeply", broken=True), None
        except ValueError as error:  # an integer of more than 4,300 digits
            return LeftOut(origin, "bad JSON", str(error), broken=True), None
        if self._constants:
            detail = f"{self._constants[0]} is not JSON; write a text or null"
            return LeftOut(origin, "bad JSON", detail, broken=True), end
        if _HALF_CHARACTER.search(text, start, end) and (half := _half_character(value)):
            detail = f"{half} is half of a character and its other half is missing"
            return LeftOut(origin, "unpaired surrogate", detail, broken=True), end
        return (origin, value), end


def _half_character(value: object) -> str:
    """The escape of a surrogate that stands alone somewhere in the value, or nothing."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""


# ---- formats -------------------------------------------------------------------------------------------------------

Row: TypeAlias = Mapping[str, object]


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
        raise _Unusable(
            "not read yet", f"{where}: got a part of type {_shown(part.get('type'))}, only text is read yet"
        )
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
