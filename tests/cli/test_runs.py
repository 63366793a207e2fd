"""`mlxsft runs`: what it says of finished, interrupted, running and broken runs."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mlxsft.cli import call
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import (
    Evaluated,
    Event,
    Finished,
    LeftOutRows,
    Noted,
    Overfitted,
    Sampled,
    Started,
    Stepped,
)

EVIL = "<script>alert('x')</script>\x1b[31m"
LEDGER = {"read": 12, "trained": 9, "held out": 2, "too long": 1}
START = Started("org/tiny", "mlx", "cpu", 0, 40, 2.0, 1000, 10, LEDGER, "plain", "2026-01-02T03:04:05+00:00")
END = Finished("done", 40, 40, 0, 400, 65.0, 1.0, 2.5, 1.5, 0.1, 4.0, 20, 4, 2, 20)
VALID = {0: 4.0, 10: 2.0, 20: 1.5, 30: 2.0, 40: 2.5}


def history(steps: int, *, evil: str = "") -> list[Event]:
    made: list[Event] = [replace(START, model=f"org/tiny{evil}"), Noted(f"mind this {evil}")]
    made.append(LeftOutRows([f"rows.jsonl:3: too long {evil}"]))
    for step in range(steps + 1):
        if step:
            made.append(Stepped(step, step / 20, 4.0 - step / 16, 0.5, 1e-3, 10, 20, 24, 0.5, 2_000_000))
        if step in VALID:
            made.append(Evaluated(step, VALID[step], 7, 2, step in (10, 20), 0.25))
            made.append(Sampled(step, f"Who?{evil}", f"answer {step}{evil}"))
    return made


def write_run(path: Path, events: list[Event], *, learning_rate: float = 0.1, rest: str = "") -> Path:
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.write_start(
        f"model: org/tiny\ntrain: {{learning_rate: {learning_rate}, seed: 0}}\n", {"base": {"name": "t"}}
    )
    folder.events.write_text("".join(e.to_json() + "\n" for e in events) + rest, encoding="utf-8")
    return path


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a finished, an interrupted and a killed run, as the current folder's `runs`."""
    write_run(
        tmp_path / "runs" / "a", [*history(40), Overfitted(40, [20, 30, 40], [2.0, 1.5, 1.0], [1.5, 2.0, 2.5]), END]
    )
    stopped = replace(END, reason="interrupted", step=25)
    write_run(tmp_path / "runs" / "deeper" / "b", [*history(25), stopped], learning_rate=0.2)
    write_run(tmp_path / "runs" / "c", history(12), rest='{"event": "st')
    (tmp_path / "runs" / "a" / "checkpoints" / "step-0000040").mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert call(["runs", *arguments, "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_every_run_below_a_folder_is_listed_with_its_state(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {run["path"]: run for run in listed(capsys)}
    assert {path: (run["state"], run["step"]) for path, run in found.items()} == {
        "runs/a": ("finished", 40), "runs/deeper/b": ("interrupted", 25), "runs/c": ("unfinished", 12),
    }  # fmt: skip
    a = found["runs/a"]
    assert (a["loss"], a["best_valid_loss"], a["best_step"], a["adapter_step"]) == (1.5, 1.5, 20, 20)
    assert (a["seconds"], a["tokens_per_second"], a["peak_bytes"]) == (65.0, 40.0, 2_000_000)
    assert found["runs/c"]["seconds"] == 12 * 0.5 + 2 * 0.25
    assert {run["path"] for run in listed(capsys, "list", "runs/deeper")} == {"runs/deeper/b"}
    assert listed(capsys, "runs/other") == []


def test_a_run_at_work_is_running(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(runs / "c").held():
        (run,) = listed(capsys, "runs/c")
        assert run["state"] == "running"
        assert call(["runs", "show", "runs/c"]) == 0
    assert "cannot be read" not in capsys.readouterr().out  # the half line is one that is being written


@pytest.mark.parametrize("columns", ["60", "80", "140"])
def test_the_list_fits_its_terminal(
    runs: Path, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert call(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert any("interrupted 25/40" in line and "1.5000" in line for line in lines)


def test_show_draws_the_losses_and_says_what_happened(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert call(["runs", "show", "runs/a"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    drawing = [line for line in text.splitlines() if re.search("[┤│]", line)]
    assert len(drawing) == 14
    assert max(map(len, drawing)) <= 80
    assert "●" in drawing[0]  # 4.0 before training, the highest of all
    assert sum(line.count("★") for line in drawing) == 1
    assert sum(line.count("●") for line in drawing) == 4
    for words in (
        "12 read = 9 trained, 2 held out, 1 too long", "best 1.5000 at step 20", "The adapter is that of step 20",
        "answer 0", "best, step 20  answer 20", "answer 40", "mind this", "overfitting: since step 20",
    ):  # fmt: skip
        assert words in text


def test_runs_are_compared_by_curve_result_and_setting(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["runs", "show", "runs/a", "runs/deeper/b"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"train\.learning_rate\s+0\.1\s+0\.2", text)
    assert "train.seed" not in text
    assert re.search(r"state\s+finished 40\s+interrupted 25/40", text)


def test_json_has_the_whole_run(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["runs", "show", "runs/a", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["steps"] == [asdict(e) for e in history(40) if isinstance(e, Stepped)]
    assert [e["loss"] for e in told["evaluations"]] == list(VALID.values())
    assert [s["answer"] for s in told["samples"]] == [f"answer {step}" for step in VALID]
    assert told["settings"]["train"] == {"learning_rate": 0.1, "seed": 0}
    assert told["ledger"] == LEDGER
    assert call(["runs", "show", "runs/a", "runs/c", "--json"]) == 0
    assert [run["path"] for run in json.loads(capsys.readouterr().out)] == ["runs/a", "runs/c"]


def test_the_page_names_a_model_in_a_folder_without_where_it_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [replace(history(40)[0], model="/home/pip/models/tiny"), *history(40)[1:], END])
    page = tmp_path / "page.html"
    assert call(["runs", "show", str(run), "--html", str(page)]) == 0
    head = page.read_text(encoding="utf-8").partition("<h2>")[0]
    assert " · tiny · " in head
    assert "/home/pip" not in head


def test_the_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run<b>", [*history(40, evil=EVIL), END])
    page = tmp_path / "page.html"
    assert call(["runs", "show", str(run), "--html", str(page)]) == 0
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert "<script" not in html
    assert "run<b>" not in html
    assert not re.findall(r"(?:src|href|url)\s*[=(]", html)
    assert html.count("<svg") == html.count("</svg>") == 5
    assert "step 20: 1.5000 (best)" in html
    assert html.count("answer 20") == 1
    for words in ("train.learning_rate", "mind this", "too long", "The adapter is that of step 20", "base.name"):
        assert words in html
    assert call(["runs", "show", str(run), "--html", str(page)]) == 2
    assert call(["runs", "show", str(run), str(run), "--html", str(page), "--force"]) == 0


def test_what_others_wrote_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", [*history(40, evil=EVIL), END])
    assert call(["runs", "show", str(run)]) == 0
    assert call(["runs", str(tmp_path)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize("events", [[], [START], [START, Evaluated(0, None, 1, 1, False, 0.1)], history(1)])
def test_a_run_that_has_hardly_begun_can_be_shown(tmp_path: Path, events: list[Event]) -> None:
    run = write_run(tmp_path / "run", events)
    assert call(["runs", "show", str(run), "--html", str(tmp_path / "page.html")]) == 0
    assert call(["runs", "show", str(run), str(run)]) == 0
    assert call(["runs", str(tmp_path)]) == 0


def test_what_is_no_run_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["runs", "show", str(tmp_path)]) == 3
    assert "there is no run in this folder" in capsys.readouterr().err
    assert call(["runs", str(tmp_path / "missing")]) == 3
    assert call(["runs", str(tmp_path)]) == 0
    assert "No runs below" in capsys.readouterr().out
    broken = write_run(tmp_path / "broken", history(1))
    (broken / "lock.json").write_text("{")
    assert call(["runs", "show", str(broken)]) == 3
    assert "cannot be read" in capsys.readouterr().err
