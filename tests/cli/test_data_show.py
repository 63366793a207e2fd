"""`mlxsft data show`: what is trained, for people to look at."""

from __future__ import annotations

import json
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from mlxsft.cli import call
from tests.tiny import write_llama

ROWS = """\
{"prompt": "Who are you?", "completion": "I am Pip."}
{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "bye"}, {"role": "assistant", "content": "Bye {{name}}!"}]}
{"text": "I am Pip."}
{"prompt": "<|im_start|>", "completion": "x"}
{"prompt": 3, "completion": "x"}
"""  # noqa: E501


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROWS)
    return path


def show(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert call(["data", "show", *arguments]) == 0
    return capsys.readouterr().out


def test_plain_marks_trained_tokens_with_brackets(
    rows: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = show(capsys, str(rows), "--model", str(tiny_llama), "--plain", "-n", "1")
    assert "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n[I][ am][ Pip][.][<|im_end|>]" in out
    assert "the prompt that chat renders is, token for token, the prompt that is trained on" in out
    assert "rows.jsonl:1" in out


def test_brackets_mark_them_too_where_there_is_no_colour(
    rows: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (str(rows), "--model", str(tiny_llama), "-n", "1")
    assert "[I][ am]" in show(capsys, *arguments)  # a pipe
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "\x1b[32m\x1b[1mI" in show(capsys, *arguments)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[I][ am]" in show(capsys, *arguments)


def test_control_characters_are_spelled_out(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q", "completion": "\x1b[2J🦊 gone"}) + "\n")
    out = show(capsys, str(path), "--model", str(tiny_llama))
    assert "\x1b" not in out
    assert "\\x1b" in out
    assert "🦊" in out


def test_json_gives_ids_and_masks_of_every_row_and_why_one_is_left_out(
    rows: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(tiny_llama), "--json", "-n", "9", "--fill", "name=Pip"]
    shown = [json.loads(line) for line in show(capsys, str(rows), *arguments).splitlines()]
    assert [s["origin"].rpartition(":")[2] for s in shown] == ["1", "2", "3", "4", "5"]
    assert [s["prompt_matches"] for s in shown] == [True, True, None, None, None]
    assert [s["left_out"] and s["left_out"]["reason"] for s in shown] == [
        None, None, None, "special token", "wrong type",
    ]  # fmt: skip
    (two_turns,) = shown[1]["examples"]
    trained = [t for t, m in zip(two_turns["tokens"], two_turns["mask"], strict=True) if m]
    assert "".join(trained) == "Hello!<|im_end|>Bye Pip!<|im_end|>"
    assert len(two_turns["ids"]) == len(two_turns["tokens"]) == len(two_turns["mask"])


def test_a_base_model_is_shown_with_the_plain_template(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_llama(tmp_path / "base", chat_template=None, eos="<|endoftext|>")
    out = show(capsys, str(rows), "--model", str(base), "--plain", "-n", "1")
    assert "User: Who are you?\nAssistant:[ I][ am][ Pip][.][<|endoftext|>]" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nothing.jsonl"], 3, "nothing.jsonl"),
        (["ROWS", "--format", "csv"], 2, "csv"),
        (["ROWS", "--fill", "name"], 2, "NAME=VALUE"),
        (["ROWS", "-n", "0"], 2, "-n"),
    ],
)
def test_refusals(
    rows: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    given = [str(rows) if a == "ROWS" else a for a in arguments]
    assert call(["data", "show", *given, "--model", str(tiny_llama)]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm", "qwen2.5", "qwen3"])
def test_real_templates_show_that_chat_sends_what_was_trained(
    rows: Path, real: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_llama(tmp_path / name, tokenizer_from=real / "tokenizers" / name)
    arguments = ["--model", str(model), "--json", "-n", "2", "--fill", "name=Pip"]
    shown = [json.loads(line) for line in show(capsys, str(rows), *arguments).splitlines()]
    assert [s["prompt_matches"] for s in shown] == [True, True]
    for row, answers in zip(shown, (["I am Pip."], ["Hello!", "Bye Pip!"]), strict=True):
        trained = "".join(t for e in row["examples"] for t, m in zip(e["tokens"], e["mask"], strict=True) if m)
        assert trained == "".join(f"{a}<|im_end|>" for a in answers)


# --- every format ----------------------------------------------------------------------------------------------------

TOOL = {"name": "search", "description": "", "parameters": {}}
CALL = {"name": "search", "arguments": {"q": "a"}}
CALLED = ' <tool_call>{"name": "search", "arguments": {"q": "a"}}</tool_call>'
ASKED = {"role": "user", "content": "Q"}
SAID = {"role": "assistant", "content": "A"}
# A row in each format, and what is trained of it, turn by turn; a row of several answers is shown once for each.
FORMATS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "alpaca": ({"instruction": "Sum", "input": "1 2", "output": "3"}, [[" 3"]]),
    "alpaca with a history": (
        {"instruction": "Q", "output": "A", "history": [["P", "B"]], "system": "S"},
        [[" B", " A"]],
    ),
    "dolly": ({"instruction": "Sum", "context": "1 2", "response": "3", "category": "qa"}, [[" 3"]]),
    "flan": ({"inputs": "Q", "targets": "A"}, [[" A"]]),
    "p3 lists": ({"inputs_pretokenized": "Q", "targets_pretokenized": "A", "inputs": [3], "targets": [4]}, [[" A"]]),
    "several targets": ({"inputs": "Q", "targets": ["A", "B"]}, [[" A"], [" B"]]),
    "self-instruct": (
        {"instruction": "Sum", "instances": [{"input": "1", "output": "1"}, {"input": "2", "output": "2"}]},
        [[" 1"], [" 2"]],
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "found"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": json.dumps([TOOL]),
        },
        [[CALLED, " A"]],
    ),
    "openai tool calls": (
        {
            "messages": [
                ASKED,
                {**SAID, "content": None, "tool_calls": [{"id": "c", "type": "function", "function": CALL}]},
                {"role": "tool", "tool_call_id": "c", "content": "found"},
                SAID,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        [[CALLED, " A"]],
    ),
    "openai weights": (
        {"messages": [ASKED, {**SAID, "weight": 0}, ASKED, {**SAID, "content": "B"}]},
        [[" B"]],
    ),
    "openai typed parts": (
        {"messages": [ASKED, {**SAID, "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}]},
        [[" AB"]],
    ),
    "openai reasoning": (
        {"messages": [ASKED, {**SAID, "reasoning_content": "R"}]},
        [[" <think>\nR\n</think>\n\nA"]],
    ),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, [[" A"]]),
    "question and answer": ({"question": "Q", "answer": "A"}, [[" A"]]),
    "query and response": ({"query": "Q", "response": "A"}, [[" A"]]),
    "input and target": ({"input": "Q", "target": "A"}, [[" A"]]),
    "prompt as messages": ({"prompt": [ASKED], "completion": [SAID]}, [[" A"]]),
}  # fmt: skip


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model: the plain template, which has room for tools."""
    return write_llama(tmp_path_factory.mktemp("models") / "base", chat_template=None, eos="<|endoftext|>")


def trained_turns(example: dict[str, Any]) -> list[str]:
    """The stretches of trained text, in order."""
    runs = groupby(zip(example["tokens"], example["mask"], strict=True), key=itemgetter(1))
    return ["".join(token for token, _ in run) for trained, run in runs if trained]


def marked(example: dict[str, Any]) -> str:
    """The text as it is shown without colours."""
    tokens = zip(example["tokens"], example["mask"], strict=True)
    return "".join(f"[{token}]" if trained else token for token, trained in tokens)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_trained_of_every_format(
    name: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row, answers = FORMATS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    arguments = (str(path), "--model", str(base), "-n", "9")
    shown = [json.loads(line) for line in show(capsys, *arguments, "--json").splitlines()]
    assert [s["prompt_matches"] for s in shown] == [True] * len(answers)
    assert [s["left_out"] for s in shown] == [None] * len(answers)
    found = [trained_turns(example) for s in shown for example in s["examples"]]
    assert found == [[answer + "<|endoftext|>" for answer in turns] for turns in answers]

    plain = show(capsys, *arguments, "--plain")
    for example in (e for s in shown for e in s["examples"]):
        assert marked(example) in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    coloured = show(capsys, *arguments)
    green = "".join(re.findall(r"\x1b\[32m\x1b\[1m(.*?)\x1b\[0m", coloured, re.DOTALL))
    assert green == "".join(answer + "<|endoftext|>" for turns in answers for answer in turns)
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(capsys, *arguments) == plain


def test_text_and_columns(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "Hello."}\n{"Frage": "Q", "Antwort": "A"}\n')
    (text,) = map(json.loads, show(capsys, str(path), "--model", str(base), "--json", "-n", "1").splitlines())
    assert text["examples"][0]["mask"] == [False] + [True] * (len(text["examples"][0]["tokens"]) - 1)
    named = ("--columns", "prompt=Frage", "--columns", "response=Antwort")
    path.write_text('{"Frage": "Q", "Antwort": "A"}\n')
    (row,) = map(json.loads, show(capsys, str(path), "--model", str(base), "--json", *named).splitlines())
    assert trained_turns(row["examples"][0]) == [" A<|endoftext|>"]


def test_a_greeting_that_opens_a_row_is_shown(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no answer: nothing was asked before it that chat could send."""
    path = tmp_path / "rows.jsonl"
    said = [("gpt", "Welcome!"), ("human", "hi"), ("gpt", "Hello!")]
    path.write_text(json.dumps({"conversations": [{"from": who, "value": text} for who, text in said]}) + "\n")
    (line,) = show(capsys, str(path), "--model", str(tiny_llama), "--json").splitlines()
    row = json.loads(line)
    assert row["prompt_matches"] is True
    assert trained_turns(row["examples"][0]) == ["Hello!<|im_end|>"]


def test_phrasings_are_shown_as_a_run_of_the_seed_trains_them(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "a b."}) + "\n" for i in range(9)))
    (tmp_path / "mine.yaml").write_text("phrasings: ['One: {instruction}', 'Two: {instruction}']")
    arguments = ("--model", str(tiny_llama), "--plain", "-n", "9", "--templates", str(tmp_path / "mine.yaml"))
    out = show(capsys, str(path), *arguments)
    found = re.findall(r"(One|Two): q(\d)", out)
    assert [number for _, number in found] == list("012345678")
    assert {name for name, _ in found} == {"One", "Two"}
    assert show(capsys, str(path), *arguments) == out
    assert show(capsys, str(path), *arguments, "--seed", "1") != out


def test_what_a_template_does_is_said_beside_the_rows(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma = Path(__file__).parents[1] / "data" / "templates" / "gemma-2.jinja"
    ends = ("<start_of_turn>", "<end_of_turn>", "<bos>")
    write_llama(tmp_path / "gemma", chat_template=gemma.read_text(), bos="<bos>", eos="<end_of_turn>", special=ends)
    assert call(["data", "show", str(rows), "--model", str(tmp_path / "gemma"), "-n", "1"]) == 0
    assert "note: the template takes no system turn" in capsys.readouterr().err


def test_why_the_prompts_differ_is_said(real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_llama(tmp_path / "qwen3", tokenizer_from=real / "tokenizers" / "qwen3")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(FORMATS["openai reasoning"][0]) + "\n")
    out = show(capsys, str(path), "--model", str(model), "--plain")
    assert "is NOT the prompt that is trained on (the row thinks; chat asks for no thoughts)" in out
