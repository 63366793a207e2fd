"""Rows as they go by: how many, how fast, how far and how long still, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from mlxsft.data.places import Origin

EVERY = 100  # rows


def watched(verb: str, console: Console | None = None) -> Callable[[Iterable[Any], Sequence[Path]], Iterator[Any]]:
    """Passes rows of files through and shows their progress, where stderr (or the console) is a terminal."""

    def watch(rows: Iterable[Any], files: Sequence[Path]) -> Iterator[Any]:
        import time

        from rich import progress
        from rich.console import Console

        shown = console or Console(stderr=True)
        if not shown.is_terminal:
            yield from rows
            return
        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        before, total = _extent(files)
        with progress.Progress(*columns, console=shown, transient=True) as bar:
            task = bar.add_task(verb, total=total)
            begun = time.monotonic()
            for count, row in enumerate(rows, start=1):
                yield row
                if count % EVERY == 0:
                    rate = count / (time.monotonic() - begun)
                    origin = _origin(row)
                    done = before.get(origin.file, 0) + origin.line
                    bar.update(task, completed=done, description=f"{verb}: {count:,} rows, {rate:,.0f} a second")

    return watch


def _extent(files: Sequence[Path]) -> tuple[dict[str, int], int | None]:
    """Lines before each file, and lines of all; None where lines do not tell how far a reader is."""
    from mlxsft.data.rows import line_count

    before: dict[str, int] = {}
    total = 0
    for file in files:
        lines = line_count(file)
        if lines is None or file.stat().st_size > 100_000 * lines:  # such as an array on a single line
            return {}, None
        before[str(file)] = total
        total += lines
    return before, total or None


def _origin(row: Any) -> Origin:
    """Where a row was read, whatever it is by now."""
    origin: Origin = row[0] if isinstance(row, tuple) else row.origin
    return origin
