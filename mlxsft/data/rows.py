"""Files → JSON values, each with the place where it was read; what cannot be read is a LeftOut that says why."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlxsft.errors import InputRefused


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

    def __str__(self) -> str:
        place = f"{self.origin}" if self.column is None else f"{self.origin}:{self.column}"
        return f"{place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


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
