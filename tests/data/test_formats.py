"""What every file and every row becomes: literal rows in, literal conversations or reasons out."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsft.data.formats import FORMATS, Conversation, Turn, conversations_of, raise_for_broken, read_conversations
from mlxsft.data.json_rows import json_rows
from mlxsft.data.rows import LeftOut, Origin, read_rows
from mlxsft.errors import InputRefused, UsageError

HERE = Origin("rows.jsonl", 7)


def only(*given: Any, **options: Any) -> Conversation | LeftOut:
    """What one row becomes, where it becomes one."""
    (made,) = conversations_of(*given, **options)
    return made


def turns_of(row: object, **options: Any) -> list[tuple[str, str]]:
    made = only(row, HERE, **options)
    assert isinstance(made, Conversation), made
    assert made.origin == HERE
    return [(turn.role, turn.content) for turn in made.turns]


def reason_of(row: object, **options: Any) -> tuple[str, bool]:
    made = only(row, HERE, **options)
    assert isinstance(made, LeftOut), made
    assert made.origin == HERE
    return made.reason, made.broken


def detail_of(row: object, **options: Any) -> str:
    made = only(row, HERE, **options)
    assert isinstance(made, LeftOut), made
    return made.detail


def said(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def written(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> list[Conversation | LeftOut]:
    return list(read_conversations([path], **options))


# ---- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"instruction": "Hi", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"instruction": "Hi", "input": " \n", "output": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, [("user", "Add\n\n1 2"), ("assistant", "3")]),
        ({"instruction": "", "input": "1 2", "output": "3"}, [("user", "1 2"), ("assistant", "3")]),
        (
            {"instruction": "Hi", "output": "Ahoy", "system": "A pirate.", "history": [], "text": "rendered"},
            [("system", "A pirate."), ("user", "Hi"), ("assistant", "Ahoy")],
        ),
        ({"instruction": "Hi", "output": "Hello", "system": ""}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"prompt": "Hi", "completion": "Hello"}, [("user", "Hi"), ("assistant", "Hello")]),
        ({"prompt": "Hi", "response": "Hello", "id": 3}, [("user", "Hi"), ("assistant", "Hello")]),
        (
            {"prompt": "Hi", "completion": "Ahoy", "system": "A pirate."},
            [("system", "A pirate."), ("user", "Hi"), ("assistant", "Ahoy")],
        ),
        ({"text": " as it stands\n"}, [("text", " as it stands\n")]),
    ],
)
def test_single_answer_rows(row: object, turns: list[tuple[str, str]]) -> None:
    assert turns_of(row) == turns


def test_messages_keep_their_order_and_their_white_space() -> None:
    messages = [said("system", ""), said("user", " Hi "), said("user", "You?"), said("assistant", "Yes.\n")]
    expected = [("system", ""), ("user", " Hi "), ("user", "You?"), ("assistant", "Yes.\n")]
    assert turns_of({"messages": messages}) == expected
    assert turns_of({"messages": messages, "prompt": "Hi", "text": "rendered", "tools": []}) == expected


def test_a_system_key_beside_messages_opens_the_conversation() -> None:
    row = {"system": "Be brief.", "messages": [said("user", "Hi"), said("assistant", "Hello")]}
    assert turns_of(row) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]


def test_typed_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "value": "lo"}]
    row = {"messages": [said("user", [{"type": "text", "value": "Hi"}]), said("assistant", parts)]}
    assert turns_of(row) == [("user", "Hi"), ("assistant", "Hello")]


def test_the_system_may_speak_more_than_once() -> None:
    """As OpenAI's conversations have it: a developer's turn behind the system's, or one in the middle."""
    later = [said("user", "Hi"), said("system", "Be brief."), said("assistant", "Hello")]
    assert turns_of({"system": "a", "messages": [said("developer", "b"), *later]}) == [
        ("system", "a"), ("system", "b"), ("user", "Hi"), ("system", "Be brief."), ("assistant", "Hello"),
    ]  # fmt: skip


def test_weights_that_say_what_is_done_anyway_are_fine() -> None:
    row = {"messages": [said("user", "Hi", loss_weight=0.0, train=False), said("assistant", "Hello", weight=1)]}
    assert turns_of(row) == [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    ("row", "reason", "broken"),
    [
        ({"instruction": "Hi", "output": ""}, "empty answer", False),
        ({"instruction": "Hi", "output": " \n\t"}, "empty answer", False),
        ({"instruction": " ", "input": "", "output": "Hello"}, "empty prompt", False),
        ({"prompt": "", "completion": "Hello"}, "empty prompt", False),
        ({"prompt": "Hi", "response": ""}, "empty answer", False),
        ({"text": " "}, "empty text", False),
        ({"messages": [said("user", "Hi")]}, "no assistant turn", False),
        ({"messages": [said("user", "Hi"), said("assistant", [])]}, "empty answer", False),
        ({"messages": [said("user", ""), said("assistant", "Hello")]}, "empty prompt", False),
        ({"messages": []}, "no messages", True),
        ({"messages": [said("narrator", "Hi")]}, "unknown role", True),
        ({"messages": [said("assistant", None, tool_calls=[{"id": "1"}])]}, "wrong type", True),
        ({"messages": [said("user", [{"type": "image_url", "url": "x"}])]}, "not supported", True),
        ({"messages": [said("assistant", "Hello", weight=0)]}, "no trained turn", False),
        ({"messages": [said("user", "Hi", train=True)]}, "not the assistant's", True),
        ({"prompt": "Hi", "completion": "a", "response": "b"}, "two answers", True),
        ({"conversations": []}, "no messages", True),
        ({}, "unknown format", True),
        ([1], "not an object", True),
        ("text", "not an object", True),
    ],
)  # fmt: skip
def test_rows_that_are_left_out(row: object, reason: str, broken: bool) -> None:
    assert reason_of(row) == (reason, broken)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"instruction": "Hi", "output": 3}, "output: got a number, expected text"),
        ({"instruction": "Hi", "output": None}, "output: got null, expected text"),
        ({"instruction": "Hi", "output": True}, "output: got true, expected text"),
        ({"instruction": ["Hi"], "output": "x"}, "instruction: got an array, expected text"),
        ({"instruction": "Hi", "input": 2.5, "output": "x"}, "input: got a number, expected text"),
        ({"text": {}}, "text: got an object, expected text"),
        ({"messages": "Hi"}, "messages: got text, expected an array"),
        ({"messages": ["Hi"]}, "messages[0]: got text, expected an object"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role: got nothing, expected text"),
        ({"messages": [{"role": "user"}]}, "messages[0].content: got nothing, expected text"),
        ({"messages": [said("assistant", None)]}, "messages[0].content: got null, expected text"),
        (
            {"messages": [said("user", ["Hi"])]},
            "messages[0].content[0]: got text, expected an object with type and text",
        ),
        ({"messages": [said("user", [{"type": "text"}])]}, "messages[0].content[0].value: got nothing, expected text"),
    ],
)
def test_a_wrong_type_names_the_key_and_what_was_found(row: object, detail: str) -> None:
    assert reason_of(row) == ("wrong type", True)
    assert detail_of(row) == detail


def test_an_unknown_format_names_the_keys_and_the_known_formats() -> None:
    detail = detail_of({"frage": "Hallo?", "antwort": "Ja.", "\x1b[2J": ""})
    assert detail.startswith("keys frage, antwort, \\u001b[2J; name them with columns, or write one of messages, ")
    assert detail.endswith(", ".join(FORMATS))


def test_a_named_format_is_what_every_row_must_be() -> None:
    row = {"instruction": "Hi", "output": "Hello", "text": "rendered"}
    assert turns_of(row) == [("user", "Hi"), ("assistant", "Hello")]
    assert turns_of(row, format="text") == [("text", "rendered")]
    assert reason_of(row, format="messages") == ("unknown format", True)
    expected = "keys instruction, output, text, expected messages (messages: [{role, content}], maybe tools)"
    assert detail_of(row, format="messages") == expected


def test_an_unknown_name_of_a_format_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='got "alpacca"') as refused:
        read_conversations([tmp_path / "absent.jsonl"], format="alpacca")
    assert refused.value.hint == f"Formats: auto, {', '.join(FORMATS)}."


# ---- placeholders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fill", "filled"),
    [
        ("I am {{name}}.", {"name": "Pip"}, "I am Pip."),
        ("I am {{ name }} by {{\tauthor}}.", {"name": "Pip", "author": "Tom"}, "I am Pip by Tom."),
        ("{{name}} and {{other}}", {"name": "Pip"}, "Pip and {{other}}"),
        ("{{a}}", {"a": "{{b}}", "b": "no"}, "{{b}}"),
        (" {{{name}}}\n", {"name": "Pip"}, " {Pip}\n"),
        ("{name} {{}} {{na me}}", {"name": "Pip"}, "{name} {{}} {{na me}}"),
        (r"{{name}}", {"name": r"\1 \g<0>"}, r"\1 \g<0>"),
        ("{{name}}", {}, "{{name}}"),
    ],
)
def test_fill(text: str, fill: Mapping[str, str], filled: str) -> None:
    rows: list[tuple[object, int]] = [
        ({"text": text}, 1),
        ({"instruction": text, "output": text}, 2),
        ({"prompt": text, "completion": text, "system": text}, 3),
        ({"messages": [said("user", text), said("assistant", [{"type": "text", "text": text}])]}, 2),
    ]
    for row, count in rows:
        assert [content for _, content in turns_of(row, fill=fill)] == [filled] * count


def test_an_answer_that_is_filled_with_nothing_is_empty() -> None:
    assert reason_of({"prompt": "Hi", "completion": "{{name}}"}, fill={"name": ""}) == ("empty answer", False)


# ---- files ---------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]
LINES = [json.dumps(row) for row in ROWS]


def lines_read(path: Path) -> list[tuple[int, str]]:
    """Line and user content of every row, which must all be conversations."""
    made = read(path)
    assert all(isinstance(row, Conversation) and row.origin.file == str(path) for row in made), made
    return [(row.origin.line, row.turns[0].content) for row in made if isinstance(row, Conversation)]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("\n".join(LINES), [1, 2, 3]),
        ("\n".join(LINES) + "\n", [1, 2, 3]),
        ("\r\n".join(LINES) + "\r\n", [1, 2, 3]),
        ("\ufeff" + "\n".join(LINES), [1, 2, 3]),
        ("\n \t\n" + "\n\n".join(LINES) + "\n\n", [3, 5, 7]),
        ("  " + "  \n\t".join(LINES), [1, 2, 3]),
        (json.dumps(ROWS), [1, 1, 1]),
        (json.dumps(ROWS, indent=2), [2, 6, 10]),
        (json.dumps(ROWS, indent=2).replace("\n", "\r\n") + "\r\n", [2, 6, 10]),
        ("\ufeff\n\n" + json.dumps(ROWS, indent=2), [4, 8, 12]),
        ("[\n" + ",\n".join(LINES) + "\n]\n", [2, 3, 4]),
        ("[\n" + "\n,".join(LINES) + "]", [2, 3, 4]),
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "ROWS.JSON"])
def test_layouts_and_lines(tmp_path: Path, content: str, lines: list[int], name: str) -> None:
    path = written(tmp_path, content, name)
    assert lines_read(path) == [(line, f"question {i}") for i, line in enumerate(lines)]


def test_one_object_over_many_lines_is_one_row(tmp_path: Path) -> None:
    assert lines_read(written(tmp_path, "\n\n" + json.dumps(ROWS[0], indent=2) + "\n")) == [(3, "question 0")]
    assert lines_read(written(tmp_path, LINES[0])) == [(1, "question 0")]


def test_separators_of_other_alphabets_do_not_end_a_line(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b\u0085c"}\n{"text": "d"}\n'
    assert lines_read(written(tmp_path, content)) == [(1, "a\u2028b\u0085c"), (2, "d")]


def places(rows: list[Conversation | LeftOut]) -> list[tuple[int, int | None, str] | None]:
    return [(r.origin.line, r.column, r.reason) if isinstance(r, LeftOut) and r.broken else None for r in rows]


def test_a_broken_line_does_not_touch_the_next(tmp_path: Path) -> None:
    bad = [
        '{"prompt": "a" "completion": "b"}',
        '{"prompt": "a", "completion": "b"',
        LINES[0] + ",",
        LINES[0] + LINES[1],
        "[1]",
        "17",
        '{"prompt": "a", "completion": NaN}',
        '{"prompt": "a", "completion": -Infinity}',
        '{"prompt": "a", "completion": "\\ud83d"}',
        '{"prompt": "a", "completion": "b", "\\uDE00": 1}',
        '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "a", "completion": ' + "9" * 5_000 + "}",
    ]
    content = "\n".join(line for b in bad for line in (LINES[2], b)) + "\n" + LINES[2]
    rows = read(written(tmp_path, content))
    expected = [
        (2, 16, "bad JSON"),
        (4, 34, "bad JSON"),
        (6, len(LINES[0]) + 1, "bad JSON"),
        (8, len(LINES[0]) + 1, "bad JSON"),
        (10, None, "not an object"),
        (12, None, "not an object"),
        (14, None, "bad JSON"),
        (16, None, "bad JSON"),
        (18, None, "unpaired surrogate"),
        (20, None, "unpaired surrogate"),
        (22, None, "bad JSON"),
        (24, None, "bad JSON"),
    ]
    assert places(rows) == [x for e in expected for x in (None, e)] + [None]
    assert all(isinstance(row, Conversation) for row in rows[::2])


def test_a_bad_first_line_is_one_broken_row(tmp_path: Path) -> None:
    content = '{"prompt": "a"\n' + LINES[1] + "\n"
    assert places(read(written(tmp_path, content))) == [(1, 15, "bad JSON"), None]


def test_whole_characters_written_as_two_escapes_are_fine(tmp_path: Path) -> None:
    assert lines_read(written(tmp_path, '{"text": "\\ud83d\\ude00 \\\\ud83d"}')) == [(1, "\U0001f600 \\ud83d")]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = written(tmp_path, LINES[0].encode() + b'\n{"text": "caf\xe9"}\n' + LINES[1].encode())
    rows = read(path)
    assert places(rows) == [None, (2, None, "not UTF-8"), None]
    assert str(rows[1]) == f"{path}:2: not UTF-8: byte 14 of the line is 0xe9; save the file as UTF-8"
    path = written(tmp_path, b'[\n{"text": "a"},\n{"text": "caf\xe9"}]', "rows.json")
    rows = read(path)
    assert places(rows) == [None, (3, None, "not UTF-8")]
    assert str(rows[1]) == f"{path}:3: not UTF-8: byte 14 of the line is 0xe9; save the file as UTF-8"


@pytest.mark.parametrize(
    ("content", "good", "line", "column"),
    [
        ('[\n{"text": "a"},\n{"text" "b"},\n{"text": "c"}]', 1, 3, 9),
        ('[\n{"text": "a"}\n{"text": "b"}]', 1, 3, 1),
        ('[\n{"text": "a"},\n', 1, 3, 1),
        ('[\n{"text": "a"}\n', 1, 3, 1),
        ('[\n{"text": "a"},\n]', 1, 3, 1),
        ('[\n{"text": "a"}]\n{"text": "b"}', 1, 3, 1),
        ("[", 0, 1, 2),
        ("[,]", 0, 1, 2),
    ],
)
def test_a_syntax_error_ends_an_array(tmp_path: Path, content: str, good: int, line: int, column: int) -> None:
    rows = read(written(tmp_path, content))
    assert places(rows) == [None] * good + [(line, column, "bad JSON")]


@pytest.mark.parametrize(
    "row", ['{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "content": "a", "role": "user"}]}']
)
def test_a_name_given_twice_in_one_object_is_refused_and_the_next_row_read(tmp_path: Path, row: str) -> None:
    """JSON's own readers keep the last one and lose the others in silence."""
    for content, name in ((f'{row}\n{{"text": "c"}}', "rows.jsonl"), (f'[{row},\n{{"text": "c"}}]', "rows.json")):
        broken, good = read(written(tmp_path, content, name))
        assert isinstance(broken, LeftOut)
        assert broken.detail == f"'{'text' if 'text' in row else 'role'}' is there twice in one object"
        assert isinstance(good, Conversation)


def test_an_array_goes_on_after_what_is_only_no_row(tmp_path: Path) -> None:
    content = '[{"text": NaN},\n3,\n{"text": "\\ud800"},\n{"text": "d"}]'
    rows = read(written(tmp_path, content))
    assert places(rows) == [(1, None, "bad JSON"), (2, None, "not an object"), (3, None, "unpaired surrogate"), None]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.lists(st.sampled_from(['{"text": "a"}', "[", "]", ",", "\n", "\ufeff", "{", "NaN", '"', "1", " "])))
def test_any_file_is_rows_or_a_refusal(tmp_path: Path, content: list[str]) -> None:
    path = written(tmp_path, "".join(content))
    try:
        rows = read(path)
    except InputRefused:
        return
    assert rows
    lines = "".join(content).count("\n") + 1
    assert all(1 <= row.origin.line <= lines for row in rows)


TOKENS = [
    *'[]{},:"\n ',
    "\r\n",
    '{"text": "a\u00e9\u20ac"}',
    '"data"',
    "-1.5e+10",
    "NaN",
    "true",
    '"\\ud83d\\ude00"',
    "\ufeff",
]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.sampled_from(TOKENS), max_size=12),
    around=st.sampled_from([("", ""), ("[", "]"), ('{"data": [', "]}"), ('{"v": 1, "rows": [{},', "]}")]),
    bad=st.sampled_from([b"", b"", b"\xff", b"\xe9"]),
    chunk=st.integers(1, 9),
)
def test_rows_do_not_depend_on_how_much_is_read_at_a_time(
    tmp_path: Path, parts: list[str], around: tuple[str, str], bad: bytes, chunk: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes("".join([around[0], *parts]).encode() + bad + around[1].encode())
    found = []
    for size in (chunk, 1 << 20):
        with pytest.MonkeyPatch.context() as patch, path.open("rb") as stream:
            patch.setattr("mlxsft.data.json_text._CHUNK", size)
            found.append([repr(row) for row in json_rows(path, stream)])  # NaN is not equal to itself
    assert found[0] == found[1]


def test_a_folder_stands_for_its_file_of_the_split(tmp_path: Path) -> None:
    for split, row in zip(("train", "valid"), LINES, strict=False):
        written(tmp_path, row, f"{split}.jsonl")
    assert lines_read(tmp_path / "train.jsonl") == [(1, "question 0")]
    [train] = read_conversations([tmp_path])
    [valid] = read_conversations([tmp_path], split="valid")
    assert train.origin == Origin(str(tmp_path / "train.jsonl"), 1)
    assert valid.origin == Origin(str(tmp_path / "valid.jsonl"), 1)


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    paths = [written(tmp_path, line, f"{i}.jsonl") for i, line in enumerate(LINES)]
    assert [str(row.origin) for row in read_conversations(paths)] == [f"{path}:1" for path in paths]


def test_what_cannot_be_read_is_refused_at_once_and_all_together(tmp_path: Path) -> None:
    written(tmp_path, LINES[0], "rows.xml")
    (tmp_path / "none").mkdir()
    (tmp_path / "both").mkdir()
    for name in ("both/train.json", "both/train.csv.gz"):
        written(tmp_path, LINES[0], name)
    with pytest.raises(InputRefused) as refused:
        read_conversations([tmp_path / name for name in ("absent.jsonl", "rows.xml", "none", "both")])
    assert refused.value.message.splitlines() == [
        f"{tmp_path}/absent.jsonl: no such file",
        f"{tmp_path}/rows.xml: got .xml; .jsonl, .ndjson, .json, .csv, .tsv (each also .gz), .parquet, .arrow and "
        ".feather are read",
        f"{tmp_path}/none: holds no train.jsonl or other train file",
        f"{tmp_path}/both: holds train.csv.gz and train.json; name the one that is meant",
    ]
    assert refused.value.hint == "Give files of rows, or a folder with a train.jsonl."


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff", "[]", " [\n]\n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputRefused, match="holds no rows"):
        list(read_rows([path]))


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may only be short
    with socket.socket(socket.AF_UNIX) as a_socket:
        a_socket.bind("rows.jsonl")
        with pytest.raises(InputRefused, match=r"rows\.jsonl: cannot be read: "):
            list(read_rows([Path("rows.jsonl")]))


# ---- broken rows, told together ------------------------------------------------------------------------------------


def test_broken_rows_are_raised_once() -> None:
    broken = [LeftOut(Origin("a.jsonl", i), "bad JSON", "why", broken=True, column=i + 1) for i in range(1, 26)]
    counted = LeftOut(Origin("a.jsonl", 99), "empty answer")
    raise_for_broken([])
    raise_for_broken([counted])
    with pytest.raises(InputRefused) as refused:
        raise_for_broken([counted, *broken])
    lines = refused.value.message.splitlines()
    assert lines[0] == "25 broken rows"
    assert lines[1:21] == [f"  a.jsonl:{i}:{i + 1}: bad JSON: why" for i in range(1, 21)]
    assert lines[21:] == ["  and 5 more"]
    assert refused.value.hint


def test_one_broken_row_reads_as_one() -> None:
    with pytest.raises(InputRefused, match=r"^1 broken row\n  a\.jsonl:3: not an object$"):
        raise_for_broken([LeftOut(Origin("a.jsonl", 3), "not an object", broken=True)])


# ---- real files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "roles"),
    [
        ("instruction/alpaca_identity.json", 91, ("user", "assistant")),
        ("instruction/alpaca_roleplay.json", 3146, ("user", "assistant")),
        ("instruction/prompt_completion_train.jsonl", 1800, ("user", "assistant")),
        ("instruction/prompt_completion_valid.jsonl", 144, ("user", "assistant")),
        ("instruction/flan_t0_summary.jsonl", 200, ("user", "assistant")),
        ("chat/messages_with_loss_weight.jsonl", 500, ("user", "assistant")),
        ("text/train.jsonl", 1000, ("text",)),
        ("text/valid.jsonl", 100, ("text",)),
        ("text/test.jsonl", 100, ("text",)),
    ],
)
def test_real_files(real: Path, name: str, count: int, roles: tuple[str, ...]) -> None:
    path = real / "data" / name
    rows = [row for row in read(path) if isinstance(row, Conversation)]
    assert len(rows) == count
    assert {tuple(turn.role for turn in row.turns) for row in rows} == {roles}
    text = path.read_text(encoding="utf-8").split("\n")
    for row in (rows[0], rows[1], rows[count // 2], rows[-1]):
        begins = "\n".join(text[row.origin.line - 1 : row.origin.line + 6]).strip()
        assert begins.startswith("{")
        value, _ = json.JSONDecoder().raw_decode(begins)
        assert row == only(value, row.origin)


def test_real_lines(real: Path) -> None:
    path = real / "data/instruction/alpaca_identity.json"
    first, second, third, *_ = read(path, fill={"name": "Pip", "author": "Tom"})
    assert [row.origin.line for row in (first, second, third)] == [2, 7, 12]
    assert third == Conversation(
        (
            Turn("user", "Who are you?"),
            Turn("assistant", "I am Pip, an AI assistant developed by Tom. How can I assist you today?"),
        ),
        Origin(str(path), 12),
    )
