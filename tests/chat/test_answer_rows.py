"""`generate` on files: any layout of rows in, answers in their order out, several at once, and on where it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsft.backends import Backend, Sampling, load_backend
from mlxsft.chat.answers import Asking, answer_rows
from mlxsft.cli import call
from mlxsft.data.formats import read_conversations
from mlxsft.data.render import load_renderer
from mlxsft.models.source import open_model
from tests.training.test_run import PAIRS

ROWS = [
    {"prompt": question, "completion": answer} for question, answer in PAIRS
] + [
    {"instruction": "Who are you?", "input": "", "output": "?"},
    {"messages": [{"role": "user", "content": "hello " * 600}]},
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who made you?"}]},
    {"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "x"},
                       {"from": "human", "value": "bye"}, {"from": "gpt", "value": "y"}]},
    {"text": "plain"},
    {"prompt": "Who are you?"},
]  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def command(tuned: tuple[Path, Path], rows: Path, tmp_path: Path) -> list[str]:
    return [
        "generate", str(tuned[0]), "--adapter", str(tuned[1]), "--input", str(rows), "--output",
        str(tmp_path / "answers.jsonl"), "--max-tokens", "40",
    ]  # fmt: skip


def test_every_row_is_answered_in_its_place(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    answers = read(tmp_path / "answers.jsonl")
    assert [row["origin"].rpartition(":")[2] for row in answers] == [str(i + 1) for i in range(len(ROWS))]
    for (question, answer), row in zip(PAIRS, answers, strict=False):
        assert row["messages"] == [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        assert (row["answer"], row["expected"], row["finish"]) == (answer, answer, "stop")
    after = answers[len(PAIRS) :]
    assert (after[0]["answer"], after[0]["expected"]) == ("I am Pip.", "?")
    assert "512" in after[1]["error"]
    assert [m["role"] for m in after[2]["messages"]] == ["system", "user", "assistant"]
    assert len(after[3]["messages"]) == 4
    assert after[3]["messages"][1]["content"] == "x"
    assert "asks nothing" in after[4]["error"]
    assert (after[5]["answer"], "expected" in after[5]) == ("I am Pip.", False)
    assert (figures["rows"], figures["left_out"]) == (len(ROWS), 2)
    assert figures["tokens"] >= sum(row.get("tokens", 0) for row in answers)
    assert not (tmp_path / "answers.jsonl.part").exists()
    # What came out can be trained again, and is not written over.
    assert [type(row).__name__ for row in read_conversations([tmp_path / "answers.jsonl"])].count("Conversation") == (
        len(ROWS) - 2
    )
    assert call(command) == 2
    assert "--force" in capsys.readouterr().err
    assert call([*command, "--force", "--batch", "3"]) == 0
    assert read(tmp_path / "answers.jsonl") == answers


@pytest.mark.parametrize("name", ["mlx", "torch"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_p=0.9, repetition_penalty=1.2, seed=7)])
def test_the_same_seed_gives_the_same_text_one_by_one_and_together(
    tuned: tuple[Path, Path], rows: Path, name: str, sampling: Sampling, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_model(str(tuned[0]))
    backend, renderer = load_backend(name, source), load_renderer(source)
    read = list(read_conversations([rows], unanswered=True))
    found = []
    for at_once in (1, 3, 8):
        answers: list[dict[str, Any]] = []
        answer_rows(backend, renderer, read, Asking(sampling, 24, at_once=at_once), answers.append)
        found.append(answers)
    assert found[0] == found[1] == found[2]
    assert len({row.get("answer") for row in found[0]}) > 5  # of an untuned model, and a seed of its own for each row
    single = ["generate", str(tuned[0]), PAIRS[2][0], "--max-tokens", "24", "--backend", name, "--json"]
    if sampling.seed is not None:
        single += ["--temperature", "0.8", "--top-p", "0.9", "--repetition-penalty", "1.2", "--seed", "9"]
    assert call(single) == 0
    assert json.loads(capsys.readouterr().out)["text"] == found[0][2]["answer"]


def test_a_stopped_start_goes_on_with_the_row_that_comes_next(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(command) == 0
    whole = read(tmp_path / "answers.jsonl")
    (tmp_path / "answers.jsonl").unlink()
    part = tmp_path / "answers.jsonl.part"

    process = subprocess.Popen([sys.executable, "-m", "mlxsft", *command, "--batch", "1"], stderr=subprocess.PIPE)
    while not part.exists() or part.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if process.returncode != 0:  # otherwise it was done before the signal came
        assert process.returncode == 130
        assert b"the same command goes on" in said.lower()
        there = part.read_bytes().count(b"\n") - 1
        with part.open("ab") as file:
            file.write(b'{"messages": [{"role": "us')  # as a kill leaves it
        assert call([*command, "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["resumed_after"] == there
    assert read(tmp_path / "answers.jsonl") == whole


def test_answers_that_were_made_otherwise_are_not_gone_on_with(
    command: list[str], tuned: tuple[Path, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "answers.jsonl.part"
    assert call(command) == 0
    os.replace(tmp_path / "answers.jsonl", tmp_path / "whole.jsonl")
    with pytest.MonkeyPatch.context() as patch:  # as if it had been stopped before the end
        patch.setattr("mlxsft.chat.answers.AnswersFile.finish", lambda self: None)
        assert call(command) == 0
    before = part.read_bytes()
    capsys.readouterr()
    for changes, words in (
        (["--temperature", "0.5"], "--temperature differed"),
        (["--system", "x", "--stop", "y"], "--system, --stop differed"),
        (["--max-tokens", "41"], "--max-tokens"),
        (["--format", "prompt_completion"], "the rows differed"),
    ):
        assert call([*command, *changes]) in (2, 3)
        said = capsys.readouterr().err
        assert words in said or "broken" in said
        assert part.read_bytes() == before
    without = [word for word in command if word not in ("--adapter", str(tuned[1]))]
    assert call(without) == 2
    assert "the model or the adapter differed" in capsys.readouterr().err
    with rows.open("a") as file:
        file.write('{"prompt": "more"}\n')
    assert call(command) == 2
    assert "the rows differed" in capsys.readouterr().err
    assert call([*command, "--force"]) == 0
    assert len(read(tmp_path / "answers.jsonl")) == len(ROWS) + 1


def test_the_first_of_some_strings_ends_an_answer(
    tuned: tuple[Path, Path], command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["generate", str(tuned[0]), "Who are you?", "--adapter", str(tuned[1])]
    for stops, text in ((["Pip"], "I am "), (["ip.", "m P"], "I a"), (["never"], "I am Pip."), (["I"], "")):
        given = [word for stop in stops for word in ("--stop", stop)]
        assert call([*asked, *given, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["text"], told["finish"]) == (text, "stop")
        assert call([*asked, *given]) == 0
        assert capsys.readouterr().out == f"{text}\n"
    assert call([*command, "--stop", "Pip"]) == 0
    assert read(tmp_path / "answers.jsonl")[len(PAIRS)]["answer"] == "I am "
    assert told["tokens_per_second"] >= 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--input", "rows.jsonl"], 2, "belong together"),
        (["--output", "x.jsonl"], 2, "belong together"),
        (["hello", "--input", "rows.jsonl", "--output", "x.jsonl"], 2, "PROMPT and --input"),
        (["--input", "none.jsonl", "--output", "x.jsonl"], 3, "no such file"),
        (["--input", "rows.jsonl", "--output", "."], 2, "is a folder"),
        (["--input", "rows.jsonl", "--output", "../{here}/rows.jsonl", "--force"], 2, "one of the files to read"),
        (["--input", "broken.jsonl", "--output", "x.jsonl"], 3, "broken"),
        (["hello", "--stop", ""], 2, "empty"),
        (["hello", "--temperature", "-1"], 2, "temperature"),
    ],
)
def test_what_cannot_be_asked_is_said_in_a_sentence(
    tuned: tuple[Path, Path], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    before = rows.read_text()
    assert call(["generate", str(tuned[0]), *(a.format(here=tmp_path.name) for a in arguments)]) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "x.jsonl").exists()
    assert rows.read_text() == before


def test_a_model_whose_cache_cannot_be_batched_answers_one_by_one(tuned: tuple[Path, Path]) -> None:
    backend: Backend = load_backend("torch", open_model(str(tuned[0])))
    assert backend.streams(8).capacity == 1
    assert load_backend("mlx", open_model(str(tuned[0]))).streams(8).capacity == 8
