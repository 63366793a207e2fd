"""Text that others wrote, as it may go to a terminal."""

from __future__ import annotations

import io
import os
import re
import sys
from typing import TextIO

# Everything that steers a terminal; line breaks and tabs are what they are meant to be.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with control characters spelled out, so that it can neither colour nor clear nor reorder the screen."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}" if ord(m[0]) < 256 else f"\\u{ord(m[0]):04x}", text)


def one_line(text: str) -> str:
    """The text with line breaks and tabs spelled out too: names in it could fake lines of ours."""
    return printable(text).translate({10: "\\n", 9: "\\t"})


def told(message: str) -> None:
    """Say something about what goes on, on stderr, where it is not in the way of results."""
    print(printable(message), file=sys.stderr, flush=True)


def utf8_stdin() -> TextIO:
    """stdin, read as UTF-8 in every locale; its other bytes become half characters, which no tokenizer takes."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def colours_wanted() -> bool:
    """Whether stdout is a terminal and nobody asked for no colour (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
