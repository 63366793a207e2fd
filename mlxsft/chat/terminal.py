"""A conversation in a terminal: lines edited with prompt_toolkit, answers as Markdown with rich.

Of an answer that comes, the paragraphs that are whole are printed once; only the last one, which grows, is drawn again.
So nothing flickers, and what has scrolled away is as it should be.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.filters import is_searching
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from mlxsft.chat.session import COMMANDS, is_open
from mlxsft.terminal import colours_wanted, printable

REDRAWS = 12  # a second
_BEGINS = re.compile(r"[^\s\d*+-]|[*+-]{2}|\d+[^\s.)\d]")  # a line that cannot be part of a list before it


class TerminalFace:
    """A `Face` for a person. History is kept in a file that only its owner can read; Ctrl-R searches it."""

    def __init__(self, history: Path | None) -> None:
        self.console = Console(highlight=False, no_color=not colours_wanted())
        self._notes = Console(stderr=True, highlight=False, no_color=not colours_wanted())
        completer = WordCompleter([command.split()[0] for command in COMMANDS], sentence=True)
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory() if history is None else _History(str(history)),
            completer=completer,
            complete_while_typing=False,
            key_bindings=_keys(marks=True),
            multiline=True,  # Enter sends nevertheless
            prompt_continuation="  ",
            enable_open_in_editor=True,  # Ctrl-X Ctrl-E
        )

    def lines(self) -> Iterator[str]:
        """Messages until Ctrl-D; Ctrl-C clears the line."""
        while True:
            try:
                yield self._session.prompt("> ")
            except KeyboardInterrupt:
                self.note("(/bye or Ctrl-D leaves)")
            except EOFError:
                return

    def show(self, texts: Iterable[str]) -> None:
        growing = ""
        with without_echo(sys.stdin), Live(console=self.console, refresh_per_second=REDRAWS, transient=True) as live:
            for text in texts:
                growing += printable(text)
                end = end_of_whole(growing)
                if end:
                    live.console.print(_markdown(growing[:end]))
                    growing = growing[end:]
                live.update(_Tail(growing))
        if growing.strip():
            self.console.print(_markdown(growing))

    def beside(self, titles: Sequence[str], pieces: Iterable[tuple[int, str]]) -> None:
        texts = [""] * len(titles)
        empty: list[RenderableType] = [""] * len(titles)
        growing = Live(_columns(titles, empty), console=self.console, refresh_per_second=REDRAWS, transient=True)
        with without_echo(sys.stdin), growing as live:
            for which, text in pieces:
                texts[which] += printable(text)
                live.update(_columns(titles, [_Tail(text, frame=2) for text in texts]))
        self.console.print(_columns(titles, [_markdown(text) for text in texts]))

    def note(self, text: str) -> None:
        self._notes.print(Text(printable(text), "dim"))

    def ask(self, question: str, text: str = "", choices: Sequence[str] = ()) -> str | None:
        asking: PromptSession[str] = PromptSession(key_bindings=_keys(), multiline=True)
        try:
            return asking.prompt(question, default=text)
        except (KeyboardInterrupt, EOFError):
            return None


class _History(FileHistory):
    """A history that also takes bytes that are no text, which a terminal may send: as question marks."""

    def store_string(self, string: str) -> None:
        super().store_string(string.encode("utf-8", "replace").decode("utf-8"))


class _Tail:
    """The last lines of a Markdown text, as many as the terminal has room for beside the lines of a `frame`."""

    def __init__(self, text: str, frame: int = 0) -> None:
        self._text, self._frame = text, frame

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(_markdown(self._text), options, pad=False)
        for line in lines[-max(1, console.height - 2 - self._frame) :]:
            yield from line
            yield Segment.line()


def _columns(titles: Sequence[str], answers: Sequence[RenderableType]) -> Table:
    """Answers side by side, each in a frame with its title."""
    table = Table.grid(expand=True)
    for _ in titles:
        table.add_column(ratio=1, overflow="fold")
    table.add_row(*(Panel(a, title=Text(printable(title))) for title, a in zip(titles, answers, strict=True)))
    return table


def _markdown(text: str) -> Markdown:
    return Markdown(text.strip("\n"), hyperlinks=False)  # an address is shown, not hidden behind words


def end_of_whole(text: str) -> int:
    """Where the last paragraph of a text begins that may still grow: behind an empty line, not inside code or a list.

    What follows an empty line with an indent, or as an item, belongs to what stands before.
    """
    end, fence, position, empty = 0, "", 0, False
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if fence:
            fence = "" if bare.startswith(fence) and not bare.strip(fence[0]) else fence
        else:
            if empty and _BEGINS.match(line):
                end = position
            if bare.startswith(("```", "~~~")):
                fence = bare[0] * (len(bare) - len(bare.lstrip(bare[0])))
        empty = not bare
        position += len(line)
    return end


@contextmanager
def without_echo(terminal: TextIO) -> Iterator[None]:
    """What is typed meanwhile is not written into an answer that comes; it stands in the next line."""
    if sys.platform == "win32" or not terminal.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(terminal)
    quiet = termios.tcgetattr(terminal)
    quiet[3] &= ~termios.ECHO  # of [iflag, oflag, cflag, lflag, ...]
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def _keys(marks: bool = False) -> KeyBindings:
    """Enter sends, but for a message that begins with `marks` and has no end yet; Alt-Enter begins another line."""
    keys = KeyBindings()

    @keys.add("enter", filter=~is_searching)  # there it takes what was found
    def _(event: KeyPressEvent) -> None:
        if marks and is_open(event.current_buffer.text):
            event.current_buffer.newline(copy_margin=False)
        else:
            event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def history_file() -> Path | None:
    """The history, made readable for its owner alone; None where it cannot be written.

    It is in $XDG_STATE_HOME, otherwise in ~/.local/state, on Windows in %LOCALAPPDATA%.
    """
    local = os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None
    state = os.environ.get("XDG_STATE_HOME") or local or Path.home() / ".local" / "state"
    file = Path(state) / "mlxsft" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if hasattr(os, "fchmod"):
                os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except OSError:
        return None
    return file
