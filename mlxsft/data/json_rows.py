"""JSON text → values, each with the line on which it begins: a row a line, an array, or one object with an array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mlxsft.data.places import LeftOut, Origin

Rows = Iterator[tuple[Origin, object] | LeftOut]
WRAPPERS = ("data", "train", "rows", "examples")  # what publishers call the one array in a file that is an object
_SPACE = " \t\r\n"  # what JSON calls white space
_LINE_SPACE = _SPACE.encode()


def json_rows(file: Path, stream: IO[bytes]) -> Rows:
    """The rows of one file; its content decides between an array, one object over many lines, and lines.

    Lines are read one at a time. Anything else is held whole: JSON says where it ends only at its end.
    """
    start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stream.seek(start)
    first = next((line for line in stream if line.strip(_LINE_SPACE)), b"").strip(_LINE_SPACE)
    stream.seek(start)
    if first.startswith(b"["):
        yield from _array_rows(str(file), stream.read())
        return
    if first.startswith(b"{") and (_stops_early(first) or _wrapped_array(first.decode()) is not None):
        text = stream.read()
        stream.seek(start)
        if not _stops_early(text):
            yield from _whole_object(str(file), text)
            return
    yield from _line_rows(str(file), stream)


def _whole_object(file: str, data: bytes) -> Rows:
    """The rows of a file that is one object: those of the array it wraps, or itself as the only one."""
    start = _wrapped_array(data.decode("utf-8", errors="replace"))
    yield from _line_rows(file, [data.rstrip(_LINE_SPACE)]) if start is None else _array_rows(file, data, start)


def _wrapped_array(text: str) -> int | None:
    """Where the array of objects begins that stands under one of WRAPPERS, in a text that is one JSON object."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, _skip_space(text, 0) + 1)
    while text[position] != "}":
        name, position = decoder.raw_decode(text, position)
        position = _skip_space(text, _skip_space(text, position) + 1)
        begins = position
        value, position = decoder.raw_decode(text, position)
        if name in WRAPPERS and isinstance(value, list) and all(isinstance(row, dict) for row in value):
            return begins
        position = _skip_space(text, position)
        if text[position] == ",":
            position = _skip_space(text, position + 1)
    return None


def _stops_early(data: bytes) -> bool:
    """Whether this is not one whole JSON value, such as the first line of an object written over many lines."""
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return True
    return False


def _line_rows(file: str, lines: Iterable[bytes]) -> Rows:
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


def _array_rows(file: str, data: bytes, start: int | None = None) -> Rows:
    """One row an element, each with the line on which it begins; a syntax error ends the file.

    `start` is where the array begins inside an object, whose other members are no rows.
    """
    text = _decoded(data, Origin(file, 1))
    if isinstance(text, LeftOut):
        yield text
        return
    reader = _JsonReader(file)
    position = _skip_space(text, (_skip_space(text, 0) if start is None else start) + 1)
    line, counted = 1, 0
    closed = text.startswith("]", position)
    if closed:
        position = _skip_space(text, position + 1)
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
    if position < len(text) and start is None:
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
