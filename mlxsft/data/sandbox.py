"""Jinja's sandbox as transformers sets it up, with bounds on what one operation may make.

The sandbox keeps a chat template from Python, not from memory: `'a' * 10**10`, or a list of ten times a list of ten
times a list, is made in one step in C, which no time limit can end. So strings, lists and numbers are bounded here
before they are made; loops are bounded by `mlxsft.data.time_limit`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from jinja2 import Template, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS, do_batch, do_indent, do_join, sync_do_slice
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

LIMIT = 1 << 24  # characters of a string, or of all that a list holds
ITEMS = 1 << 20  # of a list, with those of the lists in it
BITS = 1 << 12  # of a whole number; 4300 digits are the most that Python spells out
WIDTHS = {"center", "ljust", "rjust", "zfill", "expandtabs"}  # methods of a string that take the size of the result
# Filters that take a size or time of their own, and that no chat template needs.
LEFT_OUT = ("center", "filesizeformat", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


class _Generator(CodeGenerator):
    """Compiles lists, dictionaries and `~` to what `Sandbox.bounded` looks at."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802 - Jinja's names
        self._bounded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self._bounded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        if node.ctx == "load":
            self._bounded(super().visit_Tuple, node, frame)
        else:  # the names that a loop sets
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat(map(str, ")
        super().visit_Tuple(nodes.Tuple(node.nodes, "load"), frame)
        self.write("))")

    def _bounded(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.bounded(")
        visit(node, frame)
        self.write(")")


def _concat(pieces: Iterable[str]) -> str:
    """The pieces as one string."""
    made, length = [], 0
    for piece in pieces:
        length += len(piece)
        _refuse_over(LIMIT, length)
        made.append(piece)
    return "".join(made)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates; its operations raise SecurityError for what would be too large."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    concat = staticmethod(_concat)

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template("").environment
        extensions = [type(extension) for extension in theirs.extensions.values()]
        super().__init__(trim_blocks=theirs.trim_blocks, lstrip_blocks=theirs.lstrip_blocks, extensions=extensions)
        self.globals = {name: value for name, value in theirs.globals.items() if name != "lipsum"}
        self.filters = {name: function for name, function in theirs.filters.items() if name not in LEFT_OUT}
        own = {"batch": _batch, "format": _format, "indent": _indent, "join": _join, "replace": _replace}
        self.filters |= own | {"slice": _slice, "tojson": _tojson(self.filters["tojson"])}

    def bounded(self, value: object) -> object:
        """The value, where all that is in it is no more than LIMIT and ITEMS."""
        _refuse_over(LIMIT, _size(value))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            _refuse_over(LIMIT, _formatted(left, "%", right if isinstance(right, tuple) else (right,)))
        elif operator == "%":
            pass
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"+": 1, "*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            _refuse_over(BITS, bits[operator])
        elif operator == "*":
            many, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int):
                _refuse_over(LIMIT, _size(many) * max(times, 0))
        elif operator == "+" and not isinstance(left, (int, float)):
            _refuse_over(LIMIT, _size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # str.format comes wrapped
        text, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(text, str):
            if name == "join" and args and not isinstance(args[0], str):
                args = (list(args[0]), *args[1:])
            _refuse_over(LIMIT, _after_method(text, name, [*args, *kwargs.values()]))
        return self.bounded(super().call(context, function, *args, **kwargs))


@cache
def _sandbox() -> Sandbox:
    """The one of this process."""
    return Sandbox()


@lru_cache(maxsize=16)
def compiled(text: str) -> Template:
    """The template of a text. Raises what Jinja raises."""
    return _sandbox().from_string(text)


# --- sizes ---------------------------------------------------------------------------------------------------------


def _refuse_over(limit: int, size: int) -> None:
    if size > limit:
        raise SecurityError("it makes something too large")


def _size(value: object) -> int:
    """Characters and items in a value; what is in it several times counts as often. Over ITEMS it is over LIMIT."""
    size, items, waiting = 0, 0, [value]
    while waiting and size <= LIMIT:
        one = waiting.pop()
        items += 1
        if items > ITEMS:
            return LIMIT + 1
        if isinstance(one, str):
            size += len(one)
        elif isinstance(one, Mapping):
            waiting += [*one, *one.values()]
        elif isinstance(one, (list, tuple, set, frozenset)):
            waiting += one
        size += 1
    return size


def _after_method(text: str, name: str, arguments: list[Any]) -> int:
    """How long what a method makes of a string can be."""
    if name in ("format", "format_map"):
        return _formatted(text, "{", arguments)
    if name in WIDTHS:
        width = sum(a for a in arguments if isinstance(a, int))
        return len(text) + width * (text.count("\t") if name == "expandtabs" else 1)
    if name == "replace" and len(arguments) > 1:
        return _replaced(text, str(arguments[0]), str(arguments[1]))
    if name == "join" and arguments:
        return _size(arguments[0]) + len(text) * len(arguments[0])
    return len(text)


def _replaced(text: str, old: str, new: str) -> int:
    return len(text) + (text.count(old) if old else len(text) + 1) * len(new)


def _formatted(text: str, sign: str, arguments: Iterable[Any]) -> int:
    """How long a format can become: every field as wide as the widest number in it, and holding all arguments."""
    given = list(arguments)
    widths = [int(digits[:9]) for digits in re.findall(r"\d+", text)]
    if "*" in text or re.search(r"\{[^}]*\{", text):  # widths that are arguments
        widths += [abs(a) for a in given if isinstance(a, int)]
    return len(text) + text.count(sign) * (max(widths, default=0) + sum(map(_size, given)))


# --- filters -------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    _refuse_over(LIMIT, _size(value))
    return str(value)


@pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    found = list(value)
    if attribute is None:
        _refuse_over(LIMIT, _size(found) + len(d) * len(found))
    return _text(do_join(context, found, d, attribute))


def _replace(value: object, old: str, new: str, count: int | None = None) -> str:
    text = _text(value)
    _refuse_over(LIMIT, _replaced(text, old, new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text = _text(value)
    _refuse_over(LIMIT, len(text) + (text.count("\n") + 1) * (width if isinstance(width, int) else len(width)))
    return do_indent(text, width, first, blank)


def _format(value: object, *args: Any, **kwargs: Any) -> str:
    text = _text(value)
    _refuse_over(LIMIT, _formatted(text, "%", [*args, *kwargs.values()]))
    return str(FILTERS["format"](text, *args, **kwargs))


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> list[list[Any]]:
    _refuse_over(ITEMS, linecount)
    return list(do_batch(value, linecount, fill_with))


def _slice(value: Any, slices: int, fill_with: Any = None) -> list[list[Any]]:
    _refuse_over(ITEMS, slices)
    return list(sync_do_slice(value, slices, fill_with))


def _tojson(theirs: Callable[..., str]) -> Callable[..., str]:
    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | str | None = None, *args: Any, **kwargs: Any
    ) -> str:
        size = indent if isinstance(indent, int) else len(indent or "")
        _refuse_over(LIMIT, _size(value) * (1 + size))
        return theirs(value, ensure_ascii, indent, *args, **kwargs)

    return tojson
