"""Tables → rows: CSV and TSV with a header line, Parquet and Arrow a batch at a time."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mlxsft.data.json_rows import Rows
from mlxsft.data.places import LeftOut, Origin
from mlxsft.errors import InputRefused

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024
LONGEST_CELL = 1 << 24  # characters; more means a quote that never closes
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def delimited_rows(file: Path, stream: IO[bytes], delimiter: str) -> Rows:
    """Each record as an object with the names of the header; its line is the one on which it begins.

    Quoted cells may hold line breaks. A record with more or fewer cells than the header is a broken row.
    """
    # The limit is the csv module's own and counts for the process, so it is only ever raised.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    with io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        yield from _records(file, text, delimiter)


def _records(file: Path, text: Iterable[str], delimiter: str) -> Rows:
    lines = iter(text)
    first = next(lines, "")
    # Spreadsheets write semicolons where the comma is the decimal sign, and tabs.
    delimiter = next((d for d in (delimiter, ";", "\t") if d in first), delimiter)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        origin = Origin(str(file), reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield LeftOut(origin, "bad CSV", str(error), broken=True)
            if header is None or "limit" in str(error):
                return
            continue
        if not cells or cells == [""]:
            continue
        if header is None:
            header = cells
            if problem := _header_problem(header):
                yield LeftOut(origin, "bad header", f"{problem}; nothing after it is read", broken=True)
                return
            continue
        yield _record(header, cells, origin)


def _header_problem(header: list[str]) -> str:
    if "" in header:
        return f"column {header.index('') + 1} has no name"
    twice = next((name for name in header if header.count(name) > 1), None)
    return f"two columns are called {twice!a}" if twice is not None else ""


def _record(header: list[str], cells: list[str], origin: Origin) -> tuple[Origin, object] | LeftOut:
    if len(cells) != len(header):
        detail = f"got {len(cells)} cells, expected {len(header)} as in the header"
        return LeftOut(origin, "ragged row", detail, broken=True)
    for name, cell in zip(header, cells, strict=True):
        if found := _ESCAPED_BYTE.search(cell):
            detail = f"column {name!a} holds the byte 0x{ord(found[0]) - 0xDC00:02x}; save the file as UTF-8"
            return LeftOut(origin, "not UTF-8", detail, broken=True)
    return origin, dict(zip(header, cells, strict=True))


def parquet_rows(file: Path) -> Rows:
    """Each row of a Parquet file as an object; its line is its number, from 1."""
    _need_pyarrow(file)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            yield from _batch_rows(file, table.iter_batches(batch_size=BATCH_ROWS))
    except ArrowException as error:
        raise _damaged(file, error) from error


def parquet_count(file: Path) -> int:
    """The number of rows of a Parquet file, as its footer says."""
    _need_pyarrow(file)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            return int(table.metadata.num_rows)
    except ArrowException as error:
        raise _damaged(file, error) from error


def arrow_rows(file: Path) -> Rows:
    """Each row of an Arrow file or stream (Feather is such a file) as an object; its line is its number, from 1."""
    _need_pyarrow(file)
    from pyarrow import ArrowException, ArrowInvalid, OSFile, ipc

    try:
        with OSFile(str(file)) as source:
            try:
                table = ipc.open_file(source)
            except ArrowInvalid:  # what the datasets library caches is a stream
                source.seek(0)
                yield from _batch_rows(file, ipc.open_stream(source))
            else:
                yield from _batch_rows(file, (table.get_batch(i) for i in range(table.num_record_batches)))
    except ArrowException as error:
        raise _damaged(file, error) from error


def _batch_rows(file: Path, batches: Iterable[pyarrow.RecordBatch]) -> Rows:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):  # a batch may be the whole file
            for row in batch.slice(start, BATCH_ROWS).to_pylist():
                number += 1
                yield Origin(str(file), number), row


def _need_pyarrow(file: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise InputRefused(
            f"{file}: reading it takes pyarrow, which is not installed", "Run: pip install 'mlxsft[hf-data]'"
        ) from None


def _damaged(file: Path, error: Exception) -> InputRefused:
    return InputRefused(f"{file}: cannot be read: {str(error).splitlines()[0]}", "Fetch or write the file again.")
