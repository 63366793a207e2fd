"""A conversation through a pipe: lines in, answers alone on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from mlxsft.terminal import printable


class PipeFace:
    """A `Face` for scripts and tests. What goes to a terminal all the same has its control characters spelled out."""

    def __init__(self, lines: Iterable[str], out: TextIO = sys.stdout, notes: TextIO = sys.stderr) -> None:
        self._lines, self._out, self._notes = iter(lines), out, notes

    def lines(self) -> Iterator[str]:
        return self._lines

    def show(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._write(text)
        self._write("\n")

    def beside(self, answers: Sequence[tuple[str, str]]) -> None:
        for title, text in answers:
            self._write(f"--- {title}\n{text}\n")

    def note(self, text: str) -> None:
        self._notes.write(f"{printable(text)}\n")
        self._notes.flush()

    def ask(self, question: str, text: str = "") -> str | None:
        if text:
            return None  # nobody can change it
        self._notes.write(question)
        self._notes.flush()
        answer = next(self._lines, None)
        return None if answer is None else answer.rstrip("\r\n")

    def _write(self, text: str) -> None:
        self._out.write(printable(text) if self._out.isatty() else text)
        self._out.flush()
