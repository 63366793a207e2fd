"""JSON files → rows, each with the line on which it begins: a row a line, an array, or one object with an array.

Whatever the layout, rows come as the file is read; only a file that is a single row is held whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from mlxsft.data.json_text import SPACE, Broken, JsonReader, JsonText, Row, not_utf8
from mlxsft.data.places import LeftOut, Origin

Rows = Iterator[Row]
WRAPPERS = ("data", "train", "rows", "examples")  # what publishers call the one array in a file that is an object
_LINE_SPACE = SPACE.encode()
_LONG_LINE = 1 << 24  # bytes; of a longer first line no more is read to find out what the file is


def json_rows(file: Path, stream: IO[bytes]) -> Rows:
    """The rows of one file; its content decides between an array, one object over many lines, and lines."""
    start = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    layout = _layout(str(file), stream, start)
    stream.seek(start)
    if layout == "lines":
        yield from _line_rows(str(file), stream)
    elif layout == "object":
        yield from _line_rows(str(file), [stream.read().rstrip(_LINE_SPACE)])
    else:
        text = JsonText(str(file), stream)
        try:
            yield from _array_rows(text) if layout == "array" else _wrapped_rows(text)
        except Broken as broken:
            yield broken.row


def _layout(file: str, stream: IO[bytes], start: int) -> str:
    """`array`, `wrapped` for one object with an array of rows, `object` for one that is a row itself, or `lines`."""
    stream.seek(start)
    first = b"\n"
    while first and not first.strip(_LINE_SPACE):
        first = stream.readline(_LONG_LINE)
    if first.lstrip(_LINE_SPACE).startswith(b"["):
        return "array"
    if not first.lstrip(_LINE_SPACE).startswith(b"{"):
        return "lines"
    # A line that is an object is the whole file or the first of many rows; one that is none goes on behind it.
    if (len(first) == _LONG_LINE or _is_json(first)) and _lines_follow(first, stream):
        return "lines"
    stream.seek(start)
    text = JsonText(file, stream)
    try:
        for name in _members(text):
            if name in WRAPPERS and text.takes("["):
                if text.peek() in ("{", "]"):
                    return "wrapped"
                for _ in _elements(text):
                    pass
            else:
                text.value()
        text.expect("", "nothing more is expected")
    except Broken:
        return "lines"
    return "object"


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _lines_follow(part: bytes, stream: IO[bytes]) -> bool:
    """Whether something stands behind the line of which `part` has been read."""
    while part and not part.endswith(b"\n"):
        part = stream.readline(_LONG_LINE)
    while part := stream.readline(_LONG_LINE):
        if part.strip(_LINE_SPACE):
            return True
    return False


def _line_rows(file: str, lines: Iterable[bytes]) -> Rows:
    """One row a line; what is wrong with one line does not touch the next."""
    reader = JsonReader(file)
    for number, raw in enumerate(lines, start=1):
        if not raw.strip(_LINE_SPACE):
            continue
        text = _decoded(raw.rstrip(_LINE_SPACE), Origin(file, number))
        if isinstance(text, LeftOut):
            yield text
            continue
        start = len(text) - len(text.lstrip(SPACE))
        row, end = reader.value(text, start, line=number + text.count("\n", 0, start), first_line=number)
        if end is not None and end < len(text):
            row = LeftOut(Origin(file, number), "bad JSON", "more text after the row", broken=True, column=end + 1)
        yield row


def _decoded(data: bytes, origin: Origin) -> str | LeftOut:
    """The text of these bytes, which begin on the line of `origin`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        place = error.start - before.rfind(b"\n")
        return not_utf8(Origin(origin.file, origin.line + before.count(b"\n")), place, data[error.start])


def _array_rows(text: JsonText) -> Rows:
    """One row an element; a syntax error ends the file."""
    text.expect("[", "expected an array")
    yield from _elements(text)
    text.expect("", "more text after the array")


def _wrapped_rows(text: JsonText) -> Rows:
    """The elements of the array of objects under one of WRAPPERS; the other members are no rows."""
    found = False
    for name in _members(text):
        if not found and name in WRAPPERS and text.takes("["):
            found = text.peek() in ("{", "]")
            for row in _elements(text):
                if found:
                    yield row
        else:
            text.value()
    text.expect("", "more text after the object")


def _elements(text: JsonText) -> Rows:
    """The values of an array, from behind its bracket to behind its end."""
    if text.takes("]"):
        return
    yield text.value()
    while text.takes(","):
        yield text.value()
    text.expect("]", "expected a comma or the end of the array")


def _members(text: JsonText) -> Iterator[object]:
    """The names of an object's members, while the text stands at the value of each, which is to be read meanwhile."""
    text.expect("{", "expected an object")
    if text.takes("}"):
        return
    while True:
        name = text.value()
        text.expect(":", "expected a colon")
        yield name[1] if isinstance(name, tuple) else None
        if not text.takes(","):
            break
    text.expect("}", "expected a comma or the end of the object")
