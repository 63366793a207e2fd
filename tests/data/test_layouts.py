"""Every published layout of a row: literal rows in, literal conversations or reasons out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsft.cli.rows import FORMATS as CHOICES
from mlxsft.data.convert import messages_row
from mlxsft.data.formats import (
    COLUMNS,
    FORMATS,
    Conversation,
    LeftOut,
    Origin,
    Task,
    ToolCall,
    Turn,
    conversations_of,
    read_conversations,
)
from mlxsft.errors import InputRefused, UsageError
from mlxsft.recipe import DataRecipe

HERE = Origin("rows.jsonl", 7)


def made(row: object, **options: Any) -> list[Conversation]:
    """The conversations of a row, which must all be some."""
    found = conversations_of(row, HERE, **options)
    assert all(isinstance(each, Conversation) for each in found), found
    return [each for each in found if isinstance(each, Conversation)]


def one(row: object, **options: Any) -> Conversation:
    (only,) = made(row, **options)
    return only


def said(row: object, **options: Any) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in each.turns] for each in made(row, **options)]


def refused(row: object, **options: Any) -> LeftOut:
    (left_out,) = conversations_of(row, HERE, **options)
    assert isinstance(left_out, LeftOut), left_out
    return left_out


def asked(question: str, *answers: str) -> list[list[tuple[str, str]]]:
    return [[("user", question), ("assistant", answer)] for answer in answers]


def test_the_formats_are_the_same_everywhere() -> None:
    assert list(CHOICES.choices) == ["auto", *FORMATS]
    assert get_args(DataRecipe.model_fields["format"].annotation) == ("auto", *FORMATS)
    described = DataRecipe.model_fields["columns"].description
    assert described is not None
    assert described.endswith(f"Names: {', '.join(COLUMNS)}.")


# ---- a question and its answer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Sum", "context": "1 2", "response": "3"}, asked("Sum\n\n1 2", "3")),
        ({"instruction": "Sum", "input": "1 2", "response": "3"}, asked("Sum\n\n1 2", "3")),
        ({"instruction": "Hi", "context": "", "response": "Ho", "category": "chat"}, asked("Hi", "Ho")),
        ({"inputs": "Q", "targets": "A", "_task_name": "x"}, asked("Q", "A")),
        ({"inputs": "Q", "targets": ["A", "B", "A"]}, asked("Q", "A", "B")),
        ({"inputs": ["P", "Q"], "targets": "A"}, asked("P", "A") + asked("Q", "A")),
        ({"inputs": ["P", "Q"], "targets": ["A", "B"]}, asked("P", "A") + asked("Q", "B")),
        (
            {"inputs": [3, 4], "inputs_pretokenized": "Q", "targets": [5], "targets_pretokenized": "A"},
            asked("Q", "A"),
        ),
        ({"prompt": "Q", "completion": ["A", "B"]}, asked("Q", "A", "B")),
        ({"question": "Q", "answer": "A"}, asked("Q", "A")),
        ({"query": "Q", "response": "A", "type": "math"}, asked("Q", "A")),
        ({"input": "Q", "target": "A"}, asked("Q", "A")),
        ({"input": "Q", "output": "A"}, asked("Q", "A")),
        ({"instruction": "Sum", "input": "1 2", "answer": "3"}, asked("Sum\n\n1 2", "3")),
        ({"question": None, "prompt": "Q", "completion": "A", "response": ""}, asked("Q", "A")),
        ({"instruction": None, "output": "", "text": "T"}, [[("text", "T")]]),
        (
            {"instruction": "Sum", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}]},
            asked("Sum\n\n1 2", "3") + asked("Sum", "0"),
        ),
        (
            {"instruction": "C", "output": "c", "history": [["A", "a"], ["B", "b"]], "system": "S"},
            [[("system", "S"), *(turn for q in "ABC" for turn in asked(q, q.lower())[0])]],
        ),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
            asked("Q", "A"),
        ),
        ({"instruction": "Sum", "output": "3", "history": '[["A", "a"]]'}, [asked("A", "a")[0] + asked("Sum", "3")[0]]),
    ],
)
def test_pairs(row: object, expected: object) -> None:
    assert said(row) == expected


def test_an_instance_without_an_answer_is_left_out_alone() -> None:
    row = {"instruction": "Sum", "instances": [{"input": "1", "output": ""}, {"input": "2", "output": "2"}]}
    first, second = conversations_of(row, HERE)
    assert first == LeftOut(HERE, "empty answer", "turn 2 of 2 has no text")
    assert isinstance(second, Conversation)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "question": "R", "answer": "A"}, "two questions"),
        ({"prompt": "Q", "answer": "A", "output": "B"}, "two answers"),
        ({"inputs": ["P", "Q"], "targets": ["A", "B", "C"]}, "lists of unequal length"),
        ({"inputs": "Q", "targets": []}, "wrong type"),
        ({"inputs": [1, 2], "targets": "A"}, "wrong type"),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": "A"}, "wrong type"),
        ({"instruction": "C", "output": "c", "history": [["A"]]}, "wrong type"),
        ({"instruction": "C", "output": "c", "history": "A"}, "wrong type"),
        ({"instruction": "C", "instances": []}, "no instances"),
        ({"instruction": "C", "instances": ["A"]}, "wrong type"),
        ({"prompt": "Q", "anwser": "A"}, "unknown format"),
        ({"prompt": "Q", "chosen": [{"role": "assistant", "content": "A"}], "rejected": []}, "unknown format"),
    ],
)
def test_pairs_that_are_broken(row: object, reason: str) -> None:
    assert (refused(row).reason, refused(row).broken) == (reason, True)


def test_a_prompt_alone_can_be_asked_but_not_trained() -> None:
    row = {"key": 3, "prompt": "Q", "kwargs": [{}, {"n": 3}]}
    assert refused(row) == LeftOut(HERE, "no assistant turn", "nothing here could be trained")
    assert said(row, unanswered=True) == [[("user", "Q")]]


@pytest.mark.parametrize(("category", "expected"), [("qa", "qa"), (None, ""), (3, "3"), (["a", "b"], '["a", "b"]')])
def test_category(category: object, expected: str) -> None:
    assert one({"prompt": "Q", "completion": "A", "category": category}).category == expected


def test_the_parts_of_a_single_question_are_kept() -> None:
    row = {"instruction": "Sum {{x}}", "input": "1 {{x}}", "output": "3"}
    assert one(row, fill={"x": "y"}).task == Task("Sum y", "1 y")
    assert one({"inputs": "Q", "targets": "A"}).task == Task("Q")
    assert one({**row, "history": [["A", "a"]]}).task is None
    assert one({"messages": [{"role": "assistant", "content": "A"}]}).task is None


# ---- columns -------------------------------------------------------------------------------------------------------

COLUMNS_DE = {"prompt": "Frage", "response": "Antwort", "system": "Rolle", "category": "Art"}


def test_columns_name_what_a_layout_of_ones_own_calls_things() -> None:
    row = {"Frage": "Q", "Antwort": "A", "Art": "x", "text": "not read", "prompt": "not read"}
    assert said(row, columns=COLUMNS_DE) == asked("Q", "A")
    assert one(row, columns=COLUMNS_DE).category == "x"
    turns = {"dialog": [{"from": "gpt", "value": "A"}]}
    assert said(turns, columns={"conversations": "dialog"}) == [[("assistant", "A")]]


def test_a_missing_column_is_a_broken_row() -> None:
    left_out = refused({"Frage": "Q", "Anwort": "A"}, columns=COLUMNS_DE)
    assert str(left_out) == 'rows.jsonl:7: missing column: "Antwort" (response) is not among Frage, Anwort'


def test_an_unknown_column_name_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'data\.columns: got "frage"'):
        read_conversations([tmp_path], columns={"frage": "x"})


# ---- chats ---------------------------------------------------------------------------------------------------------

SEARCH = {"name": "search", "description": "Finds.", "parameters": {"type": "object", "properties": {}}}
TOOLS = ({"type": "function", "function": SEARCH},)
CALLED = ToolCall("search", {"q": ["a", 1]})


def test_sharegpt_with_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Find a"},
            {"from": "function_call", "value": '{"name": "search", "arguments": {"q": ["a", 1]}}'},
            {"from": "observation", "value": {"found": 1}},
            {"from": "gpt", "value": "One."},
        ],
        "tools": json.dumps([SEARCH]),
        "system": "S",
    }
    expected = (
        Turn("system", "S"),
        Turn("user", "Find a"),
        Turn("assistant", "", tool_calls=(CALLED,)),
        Turn("tool", '{"found": 1}'),
        Turn("assistant", "One."),
    )
    assert one(row) == Conversation(expected, HERE, TOOLS)
    assert one({**row, "tools": [SEARCH]}) == one({**row, "tools": TOOLS[0]}) == one(row)
    assert one({**row, "tools": ""}).tools == ()


CALLING = {"from": "function_call", "value": '{"name": "search", "arguments": {"q": ["a", 1]}}'}


@pytest.mark.parametrize(
    ("said", "turns"),
    [
        ([{"value": "Wait."}, CALLING], [Turn("assistant", "Wait.", tool_calls=(CALLED,))]),
        ([CALLING, CALLING], [Turn("assistant", "", tool_calls=(CALLED, CALLED))]),
        ([{"value": "Wait."}, CALLING, CALLING], [Turn("assistant", "Wait.", tool_calls=(CALLED, CALLED))]),
        ([{"value": ""}, CALLING], [Turn("assistant", "", tool_calls=(CALLED,))]),
        ([{"value": "Wait.", "thinking": "R"}, CALLING], [Turn("assistant", "Wait.", True, "R", (CALLED,))]),
        ([CALLING, {"value": "Done."}], [Turn("assistant", "", tool_calls=(CALLED,)), Turn("assistant", "Done.")]),
        (
            [{"value": "Wait.", "weight": 0}, CALLING],
            [Turn("assistant", "Wait.", False), Turn("assistant", "", tool_calls=(CALLED,))],
        ),
        (
            [{"value": "Wait."}, {**CALLING, "thinking": "R"}],
            [Turn("assistant", "Wait."), Turn("assistant", "", True, "R", (CALLED,))],
        ),
    ],
)
def test_a_call_joins_the_answer_before_it(said: list[dict[str, object]], turns: list[Turn]) -> None:
    told = [{"from": "human", "value": "Q"}, *({"from": "gpt", **message} for message in said)]
    assert list(one({"conversations": told}).turns) == [Turn("user", "Q"), *turns]


def test_a_call_joins_the_answer_as_openai_writes_it() -> None:
    call = {"type": "function", "function": {"name": "search", "arguments": {"q": ["a", 1]}}}
    openai = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "Wait.", "tool_calls": [call]}]
    told = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "Wait."}, CALLING]
    assert one({"conversations": told}) == one({"messages": openai})


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "response": "A"},
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}]},
        {"inputs": "Q", "targets": "A"},
        {"prompt": "Q", "completion": "A"},
        {"instruction": "Q", "input": "", "answer": "A"},
    ],
)
def test_a_single_question_offers_its_tools(row: dict[str, object]) -> None:
    assert one({**row, "tools": json.dumps([SEARCH])}).tools == TOOLS
    assert one({**row, "tools": "[]"}).tools == one({**row, "functions": "sin, cos"}).tools == ()
    assert refused({**row, "tools": "a hammer"}).detail.startswith("tools: ")
    named = {"Q": "q", "A": "a", "T": [SEARCH], "tools": "a hammer"}
    assert one(named, columns={"prompt": "Q", "response": "A", "tools": "T"}).tools == TOOLS


ARGUMENTS = {"q": ["a", 1]}


@pytest.mark.parametrize(
    "message",
    [
        {"content": None, "tool_calls": [{"type": "function", "function": {"name": "search", "arguments": ARGUMENTS}}]},
        {"tool_calls": [{"function": {"name": "search", "arguments": json.dumps(ARGUMENTS)}}]},
        {"content": "", "tool_calls": json.dumps([{"name": "search", "arguments": ARGUMENTS}])},
        {"content": None, "function_call": {"name": "search", "arguments": json.dumps(ARGUMENTS)}},
        {"content": [{"type": "tool_call", "value": json.dumps({"name": "search", "arguments": ARGUMENTS})}]},
        {"content": [{"type": "function_call", "name": "search", "arguments": ARGUMENTS}]},
    ],
)
def test_tool_calls_in_every_writing(message: dict[str, object]) -> None:
    row = {"messages": [{"role": "assistant", **message}], "functions": [SEARCH]}
    assert one(row) == Conversation((Turn("assistant", "", tool_calls=(CALLED,)),), HERE, TOOLS)


def test_ids_names_and_empty_arguments() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": ""}}
    result = {"role": "tool", "tool_call_id": "c1", "name": "search", "content": [{"type": "text", "text": "1"}]}
    row = {"messages": [{"role": "assistant", "content": "Wait.", "tool_calls": [call]}, result]}
    first, second = one(row).turns
    assert first == Turn("assistant", "Wait.", tool_calls=(ToolCall("search", {}, "c1"),))
    assert second == Turn("tool", "1", name="search", call_id="c1")


@pytest.mark.parametrize(
    "message",
    [
        {"content": "A", "reasoning_content": "R"},
        {"content": "A", "reasoning": "R", "thinking": "R"},
        {"content": "A", "thinking": "R", "reasoning_content": None},
        {"content": [{"type": "reasoning", "value": "R"}, {"type": "text", "text": "A"}]},
        {"content": [{"type": "thinking", "thinking": "R"}, {"type": "text", "value": "A"}], "reasoning": "R"},
    ],
)
def test_reasoning_in_every_writing(message: dict[str, object]) -> None:
    assert one({"messages": [{"role": "assistant", **message}]}).turns == (Turn("assistant", "A", reasoning="R"),)


@pytest.mark.parametrize(
    ("weights", "trained"),
    [({}, True), ({"weight": 0}, False), ({"loss_weight": 0.0, "train": False}, False), ({"train": True}, True)],
)
def test_weights(weights: dict[str, object], trained: bool) -> None:
    last = {"role": "assistant", "content": "B"}
    row = {"messages": [{"role": "user", "content": "Q", "weight": 0}, {**last, **weights}, last]}
    assert [turn.trained for turn in one(row).turns] == [True, trained, True]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "A", "weight": 0.5}, "fractional weight"),
        ({"role": "assistant", "content": "A", "loss_weight": "1"}, "fractional weight"),
        ({"role": "assistant", "content": "A", "weight": 0, "train": True}, "two weights"),
        ({"role": "tool", "content": "A", "weight": 1}, "not the assistant's"),
        ({"role": "user", "content": "A", "reasoning": "R"}, "not the assistant's"),
        ({"role": "user", "content": "A", "tool_calls": [{"name": "f"}]}, "not the assistant's"),
        ({"role": "assistant", "content": "A", "reasoning": "R", "thinking": "S"}, "two reasonings"),
        ({"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "reasoning", "text": "R"}]},
         "parts out of order"),
        ({"role": "assistant", "tool_calls": ["f"]}, "bad tool call"),
        ({"role": "assistant", "tool_calls": [{"name": "", "arguments": {}}]}, "bad tool call"),
        ({"from": "function_call", "value": ""}, "bad tool call"),
        ({"from": "function_call", "value": "search(a)"}, "bad JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "bad JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": '["\\ud800"]'}]}, "bad JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "NaN"}]}, "bad JSON"),
    ],
)  # fmt: skip
def test_messages_that_are_broken(message: object, reason: str) -> None:
    row = {"messages": [{"role": "user", "content": "Q"}, message, {"role": "assistant", "content": "A"}]}
    assert (refused(row).reason, refused(row).broken) == (reason, True)
    assert "messages[1]" in refused(row).detail


@pytest.mark.parametrize("tools", ["search", 3, [3], [{}], "[", [{"function": "f"}]])
def test_tools_that_are_broken(tools: object) -> None:
    row = {"messages": [{"role": "assistant", "content": "A"}], "tools": tools}
    assert refused(row).broken
    assert refused(row).detail.startswith("tools")


KEYS = [
    *("messages", "conversations", "instruction", "instances", "input", "output", "context", "response", "inputs"),
    *("targets", "inputs_pretokenized", "prompt", "completion", "text", "history", "system", "tools", "category"),
    *("role", "from", "content", "value", "type", "tool_calls", "function_call", "function", "name", "arguments", "id"),
    *("weight", "train", "reasoning", "thinking", "parameters", "tool_call_id"),
]
WORDS = [*("user", "assistant", "gpt", "tool", "function_call", "text", "reasoning", "tool_call"), "", "[", "[1]", "{}"]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.just(0.5) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5),
    max_leaves=25,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6), st.sampled_from(["auto", *FORMATS]))
def test_whatever_stands_in_a_row_is_told_and_never_a_traceback(row: dict[str, Any], format: str) -> None:
    found = conversations_of(row, HERE, format, {"x": "y"}, unanswered=True)
    assert found
    for each in found:
        assert each.origin == HERE
        assert isinstance(each, LeftOut) or json.dumps(messages_row(each))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_one_file_may_mix_formats_and_the_rows_that_are_broken(tmp_path: Path) -> None:
    rows: list[object] = [
        {"instruction": "Q", "output": "A"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"inputs": "Q", "targets": ["A", "B"]},
        {"text": "T"},
        {"frage": "Q"},
        {"prompt": "Q"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(row.origin.line, type(row).__name__) for row in read_conversations([path])]
    good = [(line, "Conversation") for line in (1, 2, 3, 3, 4)]
    assert found == [*good, (5, "LeftOut"), (6, "LeftOut")]


def test_a_table_may_hold_messages_as_json_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    messages = json.dumps([{"role": "assistant", "content": "A"}]).replace('"', '""')
    path.write_text(f'prompt,completion,messages\nQ,A,\n,,"{messages}"\n')
    found = [row.turns for row in read_conversations([path]) if isinstance(row, Conversation)]
    assert found == [(Turn("user", "Q"), Turn("assistant", "A")), (Turn("assistant", "A"),)]


REAL = {
    "chat/messages_with_loss_weight.jsonl": ("messages", 500),
    "chat/sharegpt_conversations.json": ("sharegpt", 500),
    "instruction/alpaca_identity.json": ("alpaca", 91),
    "instruction/alpaca_roleplay.json": ("alpaca", 3146),
    "instruction/flan_t0_summary.jsonl": ("prompt_completion", 200),
    "instruction/prompt_completion_train.jsonl": ("prompt_completion", 1800),
    "instruction/prompt_completion_valid.jsonl": ("prompt_completion", 144),
    "instruction/self_instruct_seed_tasks.jsonl": ("self_instruct", 175),
    "prompts/ifeval_en.jsonl": ("prompt", 541),
    "text/test.jsonl": ("text", 100),
    "text/train.jsonl": ("text", 1000),
    "text/valid.jsonl": ("text", 100),
    "tools/reasoning_tool_use.jsonl": ("messages", 50),
    "tools/sharegpt_toolcalls.json": ("sharegpt", 300),
}


def test_every_real_file_loads_in_its_own_format(real: Path) -> None:
    folder = real / "data"
    assert {str(p.relative_to(folder)) for p in folder.rglob("*.json*")} == set(REAL)
    for name, (format, count) in REAL.items():
        rows = list(read_conversations([folder / name], unanswered=True))
        assert all(isinstance(row, Conversation) for row in rows), name
        assert len(rows) == count, name
        assert rows == list(read_conversations([folder / name], format=format, unanswered=True)), name


def test_real_tools_and_reasoning(real: Path) -> None:
    files = [real / "data/tools" / name for name in ("reasoning_tool_use.jsonl", "sharegpt_toolcalls.json")]
    reasoned, called = ([row for row in read_conversations([file]) if isinstance(row, Conversation)] for file in files)
    turns = [turn for row in reasoned for turn in row.turns]
    assert sum(bool(turn.reasoning) for turn in turns) == 112
    assert Counter(len(turn.tool_calls) for turn in turns) == {0: 221, 1: 41, 2: 9, 3: 3}
    assert sum(len(turn.tool_calls) for row in called for turn in row.turns) == 211
    assert sum(bool(row.tools) for row in called) == 191


def test_more_than_twenty_broken_rows_end_in_one_refusal(tmp_path: Path) -> None:
    from mlxsft.data.formats import raise_for_broken

    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 3}\n' * 25)
    with pytest.raises(InputRefused, match="and 5 more"):
        raise_for_broken([row for row in read_conversations([path]) if isinstance(row, LeftOut)])
