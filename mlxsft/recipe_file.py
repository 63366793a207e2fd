"""A recipe file as it is written → plain values, each with the place it came from.

YAML in the way of version 1.2, whatever other libraries do to PyYAML's own loader: `1e-5` is a number, and `NO`, `on`,
`2024-01-01`, `12:30` and `010` are text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mlxsft.errors import UsageError

KeyPath = tuple[str | int, ...]

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
MAX_PROBLEMS = 50
_AFTER_THE_FILE = MAX_BYTES  # the rank of an override is higher than any line number

_TAG = "tag:yaml.org,2002:"
_PLAIN = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


class _Loader(yaml.SafeLoader):
    """Nodes with the types of YAML 1.2; no aliases (a small file can unfold to a huge one), no deep nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name; filled below)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise self._refusal("aliases (*name) are not taken; write the value out")
        if self.depth == MAX_DEPTH:
            raise self._refusal("nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refusal(self, reason: str) -> yaml.MarkedYAMLError:
        event = self.peek_event()  # type: ignore[no-untyped-call]  # the stubs leave it bare
        return yaml.MarkedYAMLError(None, None, reason, event.start_mark)


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where either YAML 1.1 or 1.2 would read something else in it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Line breaks of every kind survive as escapes only.
    return dumper.represent_scalar(_TAG + "str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
for _name, _pattern, _first in _PLAIN:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Place:
    """Where a value was written: what messages call it, the folder its paths count from, its rank among problems."""

    label: str
    folder: Path
    rank: int
    key: KeyPath = ()  # what the label names by itself

    def says(self, path: KeyPath, sentence: str) -> str:
        return f"{self.label}: {sentence}" if path == self.key else f"{self.label}: {dotted(path)}: {sentence}"


class Sheet:
    """The values of a file and of the overrides laid over it, their places, and all that was found wrong so far."""

    def __init__(self, file: Place) -> None:
        self.values: dict[str | int, Any] = {}
        self.places: dict[KeyPath, Place] = {(): file}
        self._overrides = 0
        self.problems: list[tuple[int, KeyPath | None, str]] = []

    def place(self, path: KeyPath) -> Place:
        """Where the value at a path was written, or else the nearest section around it."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def complain(self, path: KeyPath, sentence: str) -> None:
        """Keep a problem for `refuse_if_wrong`; the first one about a value, or about something inside it, stands."""
        if not any(other is not None and other[: len(path)] == path for _, other, _ in self.problems):
            place = self.place(path)
            self.problems.append((place.rank, path, place.says(path, sentence)))

    def refuse_if_wrong(self, hint: str | None = None) -> None:
        """UsageError with every problem, one a line, in the order of the file and then of the overrides."""
        problems = [text for _, _, text in sorted(self.problems, key=lambda problem: problem[0])]
        if len(problems) > MAX_PROBLEMS:
            problems[MAX_PROBLEMS:] = [f"... and {len(problems) - MAX_PROBLEMS} more"]
        if problems:
            raise UsageError("\n".join(problems), hint)

    def read(self, node: yaml.Node, path: KeyPath, place_of: Callable[[yaml.Node], Place]) -> Any:
        """What a YAML node says, as plain Python; the place of everything inside it is kept."""
        self.places.setdefault(path, place_of(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path, place_of)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self.read(item, (*path, index), place_of) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            return self._text(node.value, path)
        pattern = next((pattern for name, pattern, _ in _PLAIN if node.tag == _TAG + name), None)
        if isinstance(node, yaml.ScalarNode) and pattern is not None and re.fullmatch(pattern, node.value):
            return self._plain(node.tag.removeprefix(_TAG), node.value, path)
        self.complain(path, f"the tag {shown(node.tag)} is not taken here; a recipe holds plain values")
        return None

    def _mapping(
        self, node: yaml.MappingNode, path: KeyPath, place_of: Callable[[yaml.Node], Place]
    ) -> dict[str | int, Any]:
        values: dict[str | int, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.complain(path, "a key must be a plain name")
                continue
            inner = (*path, key.value)
            if key.value in values:
                first, second = self.place(inner), place_of(key)
                self.complain(inner, f"given twice: {first.label} and {second.label}")
                continue
            self.places[inner] = place_of(key)
            values[key.value] = self.read(value, inner, place_of)
        return values

    def _text(self, text: str, path: KeyPath) -> str:
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            self.complain(path, f"{shown(text)} has a character that no file can hold")
        return text

    def _plain(self, kind: str, text: str, path: KeyPath) -> float | bool | None:
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        if len(text) > 18:  # 64 bits hold every shorter one
            self.complain(path, f"got {shown(text)}, too large a number")
            return 0
        return int(text)

    def override(self, text: str, folder: Path, instead: Mapping[KeyPath, KeyPath]) -> None:
        """Lay `key.path=value` over the values, the value read as YAML.

        Where the path is one of `instead`, what the file says of the other one is taken away.
        """
        key, equals, written = text.partition("=")
        path: KeyPath = tuple(part.strip() for part in key.split("."))
        self._overrides += 1
        place = Place(f"--set {printable(text)}", folder, _AFTER_THE_FILE + self._overrides, path)
        try:
            if not equals or not all(path):
                raise ValueError("expected KEY=VALUE, such as train.learning_rate=1e-4")
            section = self._section(path[:-1], place)
            node = _compose(written)
        except (ValueError, NotYamlError) as error:
            self.problems.append((place.rank, None, place.says(path, str(error))))
            return
        self._forget(path)
        section[path[-1]] = None if node is None else self.read(node, path, lambda _: place)
        self.places[path] = place
        other = instead.get(path)
        if other and section[path[-1]] is not None and self.place(other).rank < _AFTER_THE_FILE:
            section.pop(other[-1], None)

    def _section(self, path: KeyPath, place: Place) -> dict[str | int, Any]:
        """The mapping at a path, made where there is none; ValueError where there is something else."""
        section: dict[str | int, Any] = self.values
        for depth, part in enumerate(path, start=1):
            if section.get(part) is None:
                section[part] = {}
                self.places[path[:depth]] = place
            inner = section[part]
            if not isinstance(inner, dict):
                raise ValueError(f"{dotted(path[:depth])} is {shown(inner)}, not a section")
            section = inner
        return section

    def _forget(self, path: KeyPath) -> None:
        """Drop the places and problems of a value that is about to be replaced."""
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.problems = [problem for problem in self.problems if (problem[1] or ())[: len(path)] != path]


def read_sheet(path: Path) -> Sheet:
    """The values of a YAML file whose top is a mapping; UsageError where there is no reading it at all."""
    text = _text(path)
    name = printable(str(path))
    folder = Path(os.path.abspath(path)).parent
    sheet = Sheet(Place(name, folder, 0))
    try:
        node = _compose(text)
    except NotYamlError as error:
        raise UsageError(f"{name}:{error.line}:{error.column}: {error}") from None
    if node is None:
        return sheet
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{name}:{node.start_mark.line + 1}: expected settings such as `model: NAME`, one a line")

    def place_of(node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(f"{name}:{line}", folder, line)

    values = sheet.read(node, (), place_of)
    sheet.values = values if isinstance(values, dict) else {}
    return sheet


def to_yaml(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, in their order."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31))


def dotted(path: KeyPath) -> str:
    """A key path as a person writes it: `data.train[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}"
    return text.removeprefix(".")


def shown(value: object) -> str:
    """A value as it would stand in the file, at most 60 characters of it."""
    text = printable(json.dumps(value, ensure_ascii=False, default=str))
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """The text with what could steer a terminal written as \\u escapes."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in text)


class NotYamlError(Exception):
    """The text has no YAML in it; line and column count from 1."""

    def __init__(self, line: int, column: int, reason: str) -> None:
        super().__init__(f"not YAML: {printable(reason)}")
        self.line, self.column = line, column


def _compose(text: str) -> yaml.Node | None:
    """The one YAML document in a text, None where it is empty."""
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        raise _at(text, error.position, f"the character \\u{error.character:04x} may not stand here") from None
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        raise NotYamlError(mark.line + 1, mark.column + 1, error.problem or error.context or "cannot be read") from None
    except (ValueError, OverflowError):  # PyYAML's own slip on "\UFFFFFFFF" and the like
        mark = loader.get_mark()
        raise NotYamlError(mark.line + 1, mark.column + 1, "an escape names no character") from None
    finally:
        loader.dispose()


def _at(text: str, position: int, reason: str) -> NotYamlError:
    before = text[:position].splitlines() or [""]
    return NotYamlError(len(before), len(before[-1]) + 1, reason)


def _text(path: Path) -> str:
    """The text of a file, of whatever it is; UsageError where it is not a text of a sensible size."""
    name = printable(str(path))
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{name}: a folder, expected a YAML file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UsageError(f"{name}: cannot be read: {error}") from None
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES:,} bytes, which no recipe is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{name}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x})", "Save it as UTF-8.") from None
