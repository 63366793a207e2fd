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
        self._unread: str | None = None  # a line that was no answer to a question

    def lines(self) -> Iterator[str]:
        while (line := self._next()) is not None:
            yield line

    def show(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._write(text)
        self._write("\n")

    def beside(self, titles: Sequence[str], pieces: Iterable[tuple[int, str]]) -> None:
        texts = [""] * len(titles)
        for which, text in pieces:
            texts[which] += text
        for title, text in zip(titles, texts, strict=True):
            self._write(f"--- {title}\n{text}\n")

    def note(self, text: str) -> None:
        self._notes.write(f"{printable(text)}\n")
        self._notes.flush()

    def ask(self, question: str, text: str = "", choices: Sequence[str] = ()) -> str | None:
        if text:
            return None  # nobody can change it
        self._notes.write(f"{question}\n")
        self._notes.flush()
        line = self._next()
        if line is not None and choices and line.strip().upper() not in choices:
            self._unread = line
            return None
        return None if line is None else line.rstrip("\r\n")

    def _next(self) -> str | None:
        """The next line, None where there is no more."""
        line, self._unread = self._unread, None
        return next(self._lines, None) if line is None else line

    def _write(self, text: str) -> None:
        self._out.write(printable(text) if self._out.isatty() else text)
        self._out.flush()
