"""Calls of tools in the text of an answer, read back as the template writes them.

How a template writes a call is found by rendering one. Every template that writes it as a JSON object, alone, in a list
or between markers, is understood: Hermes, Qwen, SmolLM3, Mistral, Llama and others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from mlxsft.chat.generate import Ending
from mlxsft.data.formats import ToolCall, Turn
from mlxsft.data.render import Renderer
from mlxsft.data.template import Tools
from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused

_NAME, _KEY, _VALUE = "mlxsftname", "mlxsftkey", "mlxsftvalue"
_PROBE = ToolCall(_NAME, {_KEY: _VALUE}, "0" * 9)
_TOOL: Mapping[str, object] = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_number)


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls: what stands before the first, and the names of a call's two parts."""

    opening: str  # empty: an answer that calls is JSON from its first character on
    name: str
    arguments: str
    special: bool  # whether the opening is a special token, which answers are shown without

    def calls(self, text: str, names: Collection[str]) -> list[ToolCall]:
        """The calls in a text that begins with the opening; none where anything in it calls no tool of these names."""
        found = []
        for value in _objects(text.removeprefix(self.opening)):
            call = value if isinstance(value, dict) else {}
            name, arguments = call.get(self.name), call.get(self.arguments)
            if not (isinstance(name, str) and name in names and isinstance(arguments, dict)):
                return []
            found.append(ToolCall(name, arguments))
        return found


class CallReader:
    """The text of an answer in which calls may stand: text comes out as it comes in, calls at the end.

    `several` False keeps the first call alone.
    """

    def __init__(self, format: CallFormat, tools: Tools, tokenizer: Tokenizer, *, several: bool = True) -> None:
        self._several = several
        functions = [tool["function"] for tool in tools]
        self._names = {str(function.get("name")) for function in functions if isinstance(function, dict)}
        self._format, self._special = format, tokenizer.special_pattern
        self._end = Ending([format.opening] if format.opening else [])
        self._held = ""  # where calls have no opening: what may be one
        self._begun = bool(format.opening)

    def push(self, text: str) -> str:
        """What of the answer is known to be text."""
        if self._begun:
            return self._shown(self._end.push(text))
        self._held += text
        if not self._held.strip() or self._held.lstrip()[0] in "{[":
            return ""
        self._begun, held, self._held = True, self._held, ""
        return self._shown(held)

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The rest of the text, and the calls."""
        held = self._held + self._end.after
        calls = self._format.calls(held, self._names)
        rest = "" if calls else self._shown(held + self._end.finish())
        return rest, calls if self._several else calls[:1]

    def _shown(self, text: str) -> str:
        return self._special.sub("", text) if self._format.special else text


def call_format(renderer: Renderer) -> CallFormat:
    """How this renderer's template writes calls. Raises InputRefused where it has none, or not as JSON."""
    called = Turn("assistant", "", tool_calls=(_PROBE,))
    text = renderer.answer_text([Turn("user", "hi"), called], [_TOOL])
    for start in (i for i, c in enumerate(text) if c == "{"):
        try:
            value, _ = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        names = [key for key, item in value.items() if item == _NAME]
        arguments = [key for key, item in value.items() if item == {_KEY: _VALUE}]
        if names and arguments:
            opening = text[:start].strip().removesuffix("[").rstrip()
            special = renderer.tokenizer.special_pattern.search(opening) is not None
            return CallFormat(opening, names[0], arguments[0], special)
    raise InputRefused(
        f"chat template {renderer.template.name}: it writes calls of tools in a form that is not JSON, "
        "which mlxsft cannot read back",
        "Ask without tools.",
    )


def _objects(text: str) -> Iterator[object]:
    """The JSON objects in a text, those in lists one by one, with any markers between them; None for bad JSON."""
    at = 0
    while (start := min((i for c in "[{" if (i := text.find(c, at)) >= 0), default=-1)) >= 0:
        try:
            value, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            yield None
            return
        yield from value if isinstance(value, list) else [value]
