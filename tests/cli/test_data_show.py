"""`mlxsft data show`: what is trained, for people to look at."""

from __future__ import annotations

import json
from pathlib import Path

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
