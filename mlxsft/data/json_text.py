"""A stream of JSON → the values in it, one after another, while only the stretch that is being read is held."""

from __future__ import annotations

import codecs
import json
import re
from typing import IO, TypeAlias

from mlxsft.data.places import LeftOut, Origin

Row: TypeAlias = tuple[Origin, object] | LeftOut
SPACE = " \t\r\n"  # what JSON calls white space
_SPACES = re.compile(f"[{SPACE}]*")
_CHUNK = 1 << 20  # bytes read at a time, more where one value is longer
_TOKEN = 16  # characters: what is cut off this near to the end, such as -Infinity or 1e, may be whole with more text


class Broken(Exception):
    """The text is no JSON from here on; `row` says where and why."""

    def __init__(self, row: LeftOut) -> None:
        super().__init__(row)
        self.row = row


class JsonText:
    """A place in JSON text that moves forward; lines and columns are counted from the start of the file."""

    def __init__(self, file: str, stream: IO[bytes]) -> None:
        self._file, self._stream, self._reader = file, stream, JsonReader(file)
        self._text, self._at = "", 0
        self._line, self._column = 1, 0  # of the first character held: its line, and what stood before it there
        self._counted, self._line_here = 0, 1  # how far lines are counted, and the line there
        self._pending, self._line_bytes = b"", 0  # bytes of half a character; bytes of the last line decoded
        self._ended = False
        self._bad: LeftOut | None = None  # what ended the text early

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            self._at = _SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def takes(self, character: str) -> bool:
        """Whether this character comes next; if so, the place moves behind it."""
        found = self.peek() == character
        self._at += found
        return found

    def expect(self, character: str, what: str) -> None:
        """Move behind this character, or behind nothing at the end of the text. Raises Broken where it is not next."""
        if self.peek() != character or (self._bad is not None and not character):
            raise Broken(self._error(what))
        self._at += len(character)

    def value(self) -> Row:
        """The next value with its line, or why it is none although the text goes on behind it. Raises Broken."""
        self.peek()
        while True:
            origin_line = self._line_at()
            row, end = self._reader.value(
                self._text, self._at, line=origin_line, first_line=self._line, first_column=self._column
            )
            cut = (self._reader.stopped if end is None else end) > len(self._text) - _TOKEN
            if cut and self._more():
                continue
            if end is None:
                assert isinstance(row, LeftOut)  # what has no end is none
                raise Broken(self._bad if cut and self._bad is not None else row)
            self._at = end
            return row

    def _line_at(self) -> int:
        self._line_here += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line_here

    def _error(self, what: str) -> LeftOut:
        if self._bad is not None and self._at == len(self._text):
            return self._bad
        error = json.JSONDecodeError(what, self._text, self._at)
        column = error.colno + (self._column if error.lineno == 1 else 0)
        place = Origin(self._file, self._line + error.lineno - 1)
        return LeftOut(place, "bad JSON", f"{what}; nothing after it is read", broken=True, column=column)

    def _more(self) -> bool:
        """Read on, and forget what lies behind; False where nothing was left the last time."""
        if self._ended:
            return False
        self._line = self._line_at()
        last = self._text.rfind("\n", 0, self._at)
        self._column = self._at - last - 1 + (self._column if last < 0 else 0)
        kept = self._text[self._at :]
        data = self._stream.read(max(_CHUNK, len(kept)))
        self._text, self._at, self._counted = kept + self._decoded(self._pending + data, final=not data), 0, 0
        self._ended = not data or self._bad is not None
        return True

    def _decoded(self, data: bytes, *, final: bool) -> str:
        """The text of these bytes as far as it is whole, and as far as it is UTF-8."""
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError as error:
            used = error.start
            text = data[:used].decode()
            before = self._line_bytes if b"\n" not in data[:used] else 0
            line = self._line + self._text.count("\n", self._at) + text.count("\n")
            self._bad = not_utf8(Origin(self._file, line), before + used - data.rfind(b"\n", 0, used), data[used])
        last = data.rfind(b"\n", 0, used)
        self._line_bytes = used - last - 1 + (self._line_bytes if last < 0 else 0)
        self._pending = data[used:]
        return text


class JsonReader:
    """Strict JSON, value by value: refuses NaN and Infinity, names given twice, half characters and endless nesting."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._wrong: list[str] = []  # collected, not raised, so that an array can be read on
        self._decoder = json.JSONDecoder(parse_constant=self._constant, object_pairs_hook=self._object)
        self.stopped = 0  # where the last value without an end could not be read on

    def value(
        self, text: str, start: int, *, line: int, first_line: int, first_column: int = 0
    ) -> tuple[Row, int | None]:
        """The value at `start`, on `line`, and where it ends; no end when that cannot be known.

        `first_line` is the line on which `text` begins, and `first_column` how much of it stands before.
        """
        origin = Origin(self._file, line)
        self._wrong.clear()
        self.stopped = start
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            self.stopped = len(text) if error.msg.startswith("Unterminated string") else error.pos
            place = Origin(self._file, first_line + error.lineno - 1)
            column = error.colno + (first_column if error.lineno == 1 else 0)
            return LeftOut(place, "bad JSON", error.msg, broken=True, column=column), None
        except RecursionError:
            return LeftOut(origin, "bad JSON", "nested too deeply", broken=True), None
        except ValueError as error:  # an integer of more than 4,300 digits
            return LeftOut(origin, "bad JSON", str(error), broken=True), None
        if self._wrong:
            return LeftOut(origin, "bad JSON", self._wrong[0], broken=True), end
        if _HALF_CHARACTER.search(text, start, end) and (half := _half_character(value)):
            detail = f"{half} is half of a character and its other half is missing"
            return LeftOut(origin, "unpaired surrogate", detail, broken=True), end
        return (origin, value), end

    def _constant(self, name: str) -> None:
        self._wrong.append(f"{name} is not JSON; write a text or null")

    def _object(self, members: list[tuple[str, object]]) -> dict[str, object]:
        made = dict(members)
        if len(made) < len(members):  # of which json would keep the last in silence
            twice = next(name for i, (name, _) in enumerate(members) if any(name == other for other, _ in members[:i]))
            self._wrong.append(f"{twice[:40]!a} is there twice in one object")
        return made


def not_utf8(origin: Origin, place: int, byte: int) -> LeftOut:
    """The row for a byte that is not UTF-8, the `place`-th of its line."""
    detail = f"byte {place} of the line is 0x{byte:02x}; save the file as UTF-8"
    return LeftOut(origin, "not UTF-8", detail, broken=True)


_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def _half_character(value: object) -> str:
    """The escape of a surrogate that stands alone somewhere in the value, or nothing."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return ""
