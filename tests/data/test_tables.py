"""Tables and compressed files: every record with its line, every broken one with its reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsft.data.places import LeftOut
from mlxsft.data.rows import read_rows
from mlxsft.data.sources import files_of
from mlxsft.errors import InputRefused


def read(path: Path) -> list[tuple[int, Mapping[str, Any]] | tuple[int, str]]:
    """Line and row, or line and reason."""
    return [
        (row.origin.line, row.reason) if isinstance(row, LeftOut) else (row[0].line, row[1])
        for row in read_rows([path])
    ]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("a,b\n1,2\n", [(2, {"a": "1", "b": "2"})]),
        ("\ufeffa,b\r\n1,2\r\n", [(2, {"a": "1", "b": "2"})]),
        ('a,b\n"1\n1",2\n3,"x, ""y"""\n', [(2, {"a": "1\n1", "b": "2"}), (4, {"a": "3", "b": 'x, "y"'})]),
        ("\na,b\n\n1,2\n\n", [(4, {"a": "1", "b": "2"})]),
        ("a,b\n1\n1,2,3\n1,2", [(2, "ragged row"), (3, "ragged row"), (4, {"a": "1", "b": "2"})]),
        ('a,b\n"1"x,2\n3,4\n', [(2, "bad CSV"), (3, {"a": "3", "b": "4"})]),
        ('a,b\n1,2\n"3,4\n5,6\n', [(2, {"a": "1", "b": "2"}), (3, "bad CSV")]),
        (b"a,b\n1,\xff\n3,4\n", [(2, "not UTF-8"), (3, {"a": "3", "b": "4"})]),
        ("a,a\n1,2\n", [(1, "bad header")]),
        ('a;b\n"1;1";2,5\n', [(2, {"a": "1;1", "b": "2,5"})]),
        ("a\tb\n1;2\t3,4\n", [(2, {"a": "1;2", "b": "3,4"})]),
        ("a,b;c\n1,2;3\n", [(2, {"a": "1", "b;c": "2;3"})]),
        ("a,\n1,2\n", [(1, "bad header")]),
    ],
)
def test_csv(tmp_path: Path, content: str | bytes, rows: list[object]) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read(path) == rows


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.text(st.characters(exclude_categories=["Cs"]), min_size=1)] * 2), min_size=1),
    delimiter=st.sampled_from([",", "\t"]),
)
def test_what_the_csv_module_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    path = tmp_path / ("rows.csv" if delimiter == "," else "rows.tsv")
    path.write_bytes(text.getvalue().encode())
    assert [row for _, row in read(path)] == [{"a": a, "b": b} for a, b in rows]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from([b"a", b",", b'"', b"\n", b"\r", b"\xff", b"\0", b"\xef\xbb\xbf"]), max_size=20))
def test_any_table_is_rows_or_a_refusal(tmp_path: Path, content: list[bytes]) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"".join(content))
    lines = len(io.StringIO(b"".join(content).decode(errors="replace"), newline="").readlines())
    try:
        rows = read(path)
    except InputRefused:
        rows = []
    assert all(1 <= line <= lines for line, _ in rows)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.ndjson.GZ", "rows.json.gz", "rows.csv.gz", "rows.tsv.gz"])
def test_gzip(tmp_path: Path, name: str) -> None:
    content = {"csv": "text\na\nb\n", "tsv": "text\na\nb\n", "json": '[{"text":"a"},\n{"text":"b"}]'}
    text = content.get(name.split(".")[1], '{"text":"a"}\n{"text":"b"}\n')
    (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    assert [row for _, row in read(tmp_path / name)] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: b"x" + data, lambda d: d[:12] + b"zz" + d[14:]]
)
def test_a_damaged_gzip_is_refused(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "rows.jsonl.gz").write_bytes(damage(gzip.compress(b'{"text": "a"}\n' * 50)))
    with pytest.raises(InputRefused, match=r"rows\.jsonl\.gz: cannot be read: "):
        read(tmp_path / "rows.jsonl.gz")


@pytest.mark.parametrize("name", ["data", "train", "rows"])
@pytest.mark.parametrize(("indent", "lines"), [(None, [1, 1]), (1, [7, 10])])
def test_rows_inside_an_object(tmp_path: Path, name: str, indent: int | None, lines: list[int]) -> None:
    value = {"version": [1, 2], "licence": None, name: [{"text": "a"}, {"text": "b"}], "end": {}}
    (tmp_path / "rows.json").write_text(json.dumps(value, indent=indent))
    rows = read(tmp_path / "rows.json")
    assert [row for _, row in rows] == [{"text": "a"}, {"text": "b"}]
    assert [line for line, _ in rows] == (lines if indent is None else [rows[0][0], rows[0][0] + 3])


def test_an_object_whose_data_is_no_array_of_objects_is_a_row(tmp_path: Path) -> None:
    for value in ({"text": "a", "data": [1]}, {"text": "data", "train": "b"}):
        (tmp_path / "rows.json").write_text(json.dumps(value, indent=1))
        assert read(tmp_path / "rows.json") == [(1, value)]


ROWS = [{"text": f"row {i}", "parts": [{"n": i}], "none": None} for i in range(3000)]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream.arrow"])
def test_parquet_and_arrow(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist(ROWS)
    path = tmp_path / f"train.{kind}"
    if kind == "parquet":
        from pyarrow.parquet import write_table

        write_table(table, path, row_group_size=700)
    else:
        make = pyarrow.ipc.new_stream if kind.startswith("stream") else pyarrow.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=1900)
    assert read(path) == [(i + 1, row) for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow", "rows.feather"])
def test_a_damaged_table_is_refused(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(b"PAR1" + b"no table at all" * 9)
    with pytest.raises(InputRefused, match=rf"{name}: cannot be read: "):
        read(tmp_path / name)


def test_without_pyarrow_the_install_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputRefused, match="takes pyarrow, which is not installed") as refused:
        read(tmp_path / "rows.parquet")
    assert refused.value.hint == "Run: pip install 'mlxsft[hf-data]'"


def test_folders_hold_their_splits_in_any_ending(tmp_path: Path) -> None:
    shards = [f"test-0000{i}-of-00002.parquet" for i in (0, 1)]
    for name in ("train.csv.gz", "validation.tsv", *shards, "x.csv"):
        (tmp_path / name).touch()
    assert files_of([tmp_path]) == [tmp_path / "train.csv.gz"]
    assert files_of([tmp_path], "valid") == [tmp_path / "validation.tsv"]
    assert files_of([tmp_path], "test") == [tmp_path / shard for shard in shards]


def test_a_data_set_of_the_hub_keeps_its_files_in_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    assert files_of([tmp_path]) == [tmp_path / "data" / "train-00000-of-00001.parquet"]
