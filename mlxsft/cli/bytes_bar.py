"""Bars on stderr, with rate and time to go: of bytes, and of steps; nothing where stderr is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


@contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function that hears (bytes more, bytes in all); the bar begins with its first call."""
    with _bars() as bar:
        yield _of_bytes(bar, what)


@contextmanager
def bytes_and_steps(
    what: str,
) -> Iterator[tuple[Callable[[int, int], None], Callable[[Iterable[Any], str, int], Iterator[Any]]]]:
    """As `bytes_bar`, and a function that passes (items, what is done with them, how many they are) through."""
    with _bars() as bar:

        def watch(items: Iterable[Any], verb: str, count: int) -> Iterator[Any]:
            task = bar.add_task(verb, total=count, bytes=False)
            try:
                for item in items:
                    yield item
                    bar.advance(task)
            finally:
                bar.remove_task(task)

        yield _of_bytes(bar, what), watch


@contextmanager
def rows_bar(what: str, rows: int, there: int) -> Iterator[Callable[[Any], None]]:
    """A function that hears a `chat.answers.Progress`; `there` rows of all `rows` need not be done any more."""
    console = Console(stderr=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=rows, completed=there, rate="")

        def watch(progress: Any) -> None:
            spent = time.monotonic() - began
            rate = f"{progress.tokens / spent:.0f} tokens/s"
            bar.update(task, completed=progress.rows, rate=rate)

        yield watch


def _bars() -> Progress:
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _of_bytes(bar: Progress, what: str) -> Callable[[int, int], None]:
    task = bar.add_task(what, total=None, visible=False, bytes=True)
    return lambda size, total: bar.update(task, advance=size, total=total, visible=True)


class _Amount(ProgressColumn):
    """How much of how much is done, and of bytes how fast."""

    def __init__(self) -> None:
        super().__init__()
        self._steps, self._bytes, self._speed = MofNCompleteColumn(), DownloadColumn(), TransferSpeedColumn()

    def render(self, task: Task) -> Text:
        if not task.fields["bytes"]:
            return self._steps.render(task)
        return Text.assemble(self._bytes.render(task), " ", self._speed.render(task))
