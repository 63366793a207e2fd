"""The progress of rows that go by, as a terminal shows it."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
from rich.console import Console

from mlxsft.cli.watching import watched
from mlxsft.data.formats import read_conversations
from mlxsft.data.hub import HubRows
from mlxsft.data.rows import line_count
from mlxsft.data.sources import whole_files

ROWS = [{"prompt": f"q {i}", "completion": "a"} for i in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def shown(files: list[Path], *, terminal: bool = True, known: bool = True) -> str:
    """What is written while all rows go by; they must come through as they are."""
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=120)
    passed = list(watched("checking", console)(read_conversations(files), files if known else []))
    assert passed == list(read_conversations(files))
    return stream.getvalue()


def test_rows_rate_share_and_time_left_of_several_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(LINES)
    written = shown([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"])
    assert "checking: 600 rows, " in written
    assert " a second" in written
    assert "100%" in written
    assert "0:00:0" in written


def test_without_a_terminal_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    assert shown([tmp_path / "a.jsonl"], terminal=False) == ""


def test_where_the_end_is_not_known_there_is_no_share(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{**row, "completion": "a" * 999} for row in ROWS]))  # on one line
    (tmp_path / "b.jsonl").write_text(LINES)
    for written in (shown([tmp_path / "a.json"]), shown([tmp_path / "b.jsonl"], known=False)):
        assert "checking: 300 rows, " in written
        assert "100%" not in written
    assert whole_files([HubRows("org/rows", stop="5")]) == []


def test_lines_and_rows_are_counted_without_reading_them(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "a.feather")
    (tmp_path / "a.csv").write_text('prompt,completion\n"two\nlines",a')
    (tmp_path / "broken.csv.gz").write_bytes(b"\x1f\x8b no gzip")
    counted = {file.name: line_count(file) for file in tmp_path.iterdir()}
    assert counted == {"a.parquet": 300, "a.feather": None, "a.csv": 3, "broken.csv.gz": None}


def test_an_array_over_many_lines_has_a_share(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    assert "100%" in shown([tmp_path / "a.json"])
