"""Rows of any layout written as OpenAI messages, and read back as the same conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsft.cli import call
from mlxsft.data.convert import convert_files, messages_row
from mlxsft.data.formats import Conversation, Origin, ToolCall, Turn, conversations_of, read_conversations

HERE = Origin("rows.jsonl", 7)

said = st.text().filter(str.strip)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# No arguments are read as {}, so that templates can go through them.
calls = st.builds(ToolCall, st.text(min_size=1), json_values.filter(lambda value: value is not None), st.text())
answers = st.builds(
    Turn,
    st.just("assistant"),
    said,
    trained=st.booleans(),
    reasoning=st.text(),
    tool_calls=st.lists(calls, max_size=2).map(tuple),
) | st.builds(Turn, st.just("assistant"), st.text(), tool_calls=st.lists(calls, min_size=1, max_size=2).map(tuple))
others = st.builds(Turn, st.just("user"), said) | st.builds(
    Turn, st.just("tool"), st.text(), name=st.text(), call_id=st.text()
)
tools = st.builds(
    lambda name, parameters: {"type": "function", "function": {"name": name, "parameters": parameters}},
    st.text(min_size=1),
    st.dictionaries(st.text(), json_values, max_size=2),
)
chats = st.builds(
    lambda system, turns, tools, category: Conversation((*system, *turns), HERE, tuple(tools), category),
    st.lists(st.builds(Turn, st.just("system"), st.text()), max_size=1),
    st.lists(answers | others, min_size=1, max_size=5),
    st.lists(tools, max_size=2),
    st.text(),
)
texts = st.builds(lambda text, category: Conversation((Turn("text", text),), HERE, category=category), said, st.text())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(chats | texts)
def test_a_written_conversation_reads_as_itself(row: Conversation) -> None:
    line = json.dumps(messages_row(row), ensure_ascii=False, allow_nan=False)
    assert "\n" not in line
    assert conversations_of(json.loads(line), HERE, unanswered=True) == [row]


def convert(*arguments: object) -> int:
    return call(["data", "convert", *map(str, arguments)])


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def rows_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    called = {"name": "f", "arguments": {"x": 1}}
    source = write(
        tmp_path / "rows.jsonl",
        {"instruction": "Q", "output": "A", "category": "qa", "system": "S"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "function_call", "value": json.dumps(called)}]},
        {"messages": [{"role": "assistant", "content": "A", "train": False, "thinking": "R"}]},
        {"text": "T"},
        {"prompt": "Q", "completion": ""},
    )
    assert convert(source, "--out", tmp_path / "out.jsonl") == 0
    written = capsys.readouterr()
    assert written.out == f"{tmp_path}/out.jsonl: 5 read, 4 written, 1 empty answer\n"
    assert written.err == f"left out: {source}:5: empty answer: turn 2 of 2 has no text\n"
    user, answer = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    call_ = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    assert rows_in(tmp_path / "out.jsonl") == [
        {"messages": [{"role": "system", "content": "S"}, user, answer], "category": "qa"},
        {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call_]}]},
        {"messages": [{**answer, "reasoning_content": "R", "weight": 0}]},
        {"text": "T"},
    ]


def test_columns_and_a_ledger_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.csv").write_text("Frage,Antwort\nQ,A\n")
    out = tmp_path / "new" / "out.jsonl"
    columns = ["--columns", "prompt=Frage", "--columns", "response=Antwort"]
    assert convert(tmp_path / "rows.csv", "--out", out, "--json", *columns) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "ledger": {"read": 1, "written": 1}}
    assert rows_in(out)[0]["messages"][0] == {"role": "user", "content": "Q"}


def test_broken_rows_are_listed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "rows.jsonl", {"text": "T"}, "{", {"prompt": 3, "completion": "A"})
    out = tmp_path / "out.jsonl"
    assert convert(source, "--out", out) == 3
    message = capsys.readouterr().err
    assert "2 broken rows" in message
    assert f"{source}:2:2: bad JSON" in message
    assert f"{source}:3: wrong type: prompt: got a number, expected text" in message
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert convert(source, "--out", out, "--skip-broken") == 0
    assert capsys.readouterr().out == f"{out}: 3 read, 1 written, 1 bad JSON, 1 wrong type\n"
    assert rows_in(out) == [{"text": "T"}]


def test_a_file_is_replaced_only_by_force_and_never_by_itself(tmp_path: Path) -> None:
    source, out = write(tmp_path / "rows.jsonl", {"text": "T"}), write(tmp_path / "out.jsonl", "mine")
    assert convert(source, "--out", out) == 2
    assert out.read_text() == "mine\n"
    assert convert(source, "--out", out, "--force") == 0
    assert rows_in(out) == [{"text": "T"}]
    assert convert(source, "--out", source, "--force") == 2
    assert convert(source, "--out", tmp_path) == 2
    assert convert(source, "--out", tmp_path / "new", "--columns", "prompt") == 2
    assert convert(tmp_path / "absent.jsonl", "--out", tmp_path / "new") == 3


def test_what_only_a_table_can_hold_is_a_broken_row(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": x}}]}]}
        for x in (1.5, float("nan"))
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    out = tmp_path / "out.jsonl"
    ledger, left_out = convert_files([tmp_path / "rows.parquet"], out, columns={}, skip_broken=True)
    assert ledger == {"read": 2, "written": 1, "not JSON": 1}
    assert left_out[0].origin == Origin(str(tmp_path / "rows.parquet"), 2)


def test_real_files_are_the_same_after_conversion(real: Path, tmp_path: Path) -> None:
    files = sorted((real / "data").rglob("*.json*"))
    ledger, left_out = convert_files(files, tmp_path / "out.jsonl", columns={})
    assert (ledger, left_out) == ({"read": 8647, "written": 8647}, [])
    before, after = (
        read_conversations(files, unanswered=True),
        read_conversations([tmp_path / "out.jsonl"], unanswered=True),
    )
    for old, new in zip(before, after, strict=True):
        assert isinstance(old, Conversation)
        assert isinstance(new, Conversation)
        assert (old.turns, old.tools, old.category) == (new.turns, new.tools, new.category)
    convert_files([tmp_path / "out.jsonl"], tmp_path / "again.jsonl", columns={})
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "again.jsonl").read_bytes()
