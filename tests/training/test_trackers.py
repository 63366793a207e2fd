"""What trackers are told is what the events say, and no run stops because of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsft.errors import UsageError
from mlxsft.training import trackers
from mlxsft.training.trackers import refuse_missing, tag_of
from tests.training.test_run import events, lines_until, start, train, write_recipe

JUDGED: dict[str, Any] = {"data__valid": 0.2, "eval__every": 4, "train__steps": 12, "report": ["tensorboard"]}


def read_back(run: Path) -> Any:
    """What TensorBoard itself finds in a run folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_has_every_number_and_sample_of_the_events(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **JUDGED, eval__samples=["Who are you?"])
    assert train(recipe, tmp_path / "run") == 0
    found = read_back(tmp_path / "run")
    told = {tag: [(s.step, s.value) for s in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    steps, judged = events(tmp_path / "run", "step"), events(tmp_path / "run", "eval")
    assert set(told) == {
        "valid/loss", "train/loss", "train/gradient_norm", "train/learning_rate", "train/tokens_per_second",
        "train/peak_bytes", "train/epoch",
    }  # fmt: skip
    assert told["valid/loss"] == [(e["step"], np.float32(e["loss"])) for e in judged]
    for name in ("loss", "gradient_norm", "learning_rate", "peak_bytes"):
        assert told[f"train/{name}"] == [(s["step"], np.float32(s[name])) for s in steps]
    texts = [(t.step, t.tensor_proto.string_val[0].decode()) for t in found.Tensors(tag_of("Who are you?"))]
    samples = events(tmp_path / "run", "sample")
    assert texts == [(s["step"], f"Who are you?\n\n{s['answer']}") for s in samples]


def test_a_resumed_run_is_one_curve(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **{**JUDGED, "train__steps": 20}, save__every=5)
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "step", 13))
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert train(recipe, tmp_path / "run", resume=True) == 0
    curve = [(s.step, s.value) for s in read_back(tmp_path / "run").Scalars("train/loss")]
    assert curve == [(s["step"], np.float32(s["loss"])) for s in events(tmp_path / "run", "step")]
    assert [step for step, _ in curve] == list(range(1, 21))


def test_a_tracker_that_cannot_begin_is_a_note(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **JUDGED)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert train(recipe, tmp_path / "run") == 0
    (note,) = [e["message"] for e in events(tmp_path / "run", "note") if "report:" in e["message"]]
    assert note.startswith("report: tensorboard failed")
    assert events(tmp_path / "run", "end")[0]["step"] == 12


class Failing:
    """A tracker whose server goes away after some numbers, or at the end."""

    note = "nowhere"

    def __init__(self, left: int) -> None:
        self.left = left

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the server is gone\nwith details")

    def sample(self, step: int, prompt: str, answer: str) -> None: ...

    def close(self, reason: str | None) -> None:
        raise TimeoutError


@pytest.mark.parametrize(("left", "said"), [(3, "the server is gone"), (1000, "TimeoutError")])
def test_a_tracker_that_fails_on_the_way_is_one_note(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, left: int, said: str
) -> None:
    monkeypatch.setitem(trackers.KINDS, "tensorboard", lambda run: Failing(left))
    recipe = write_recipe(tmp_path, tiny_llama, **JUDGED)
    assert train(recipe, tmp_path / "run") == 0
    notes = [e["message"] for e in events(tmp_path / "run", "note") if "report:" in e["message"]]
    assert notes == ["report: nowhere", f"report: tensorboard failed and gets no more of this run: {said}"]
    assert events(tmp_path / "run")[-1]["event"] == "end"
    assert len(events(tmp_path / "run", "step")) == 12


def test_what_is_not_installed_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "left_by_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="left_by_a_tracker, no_such are not installed") as caught:
        refuse_missing(["tensorboard", "left_by_a_tracker", "no_such"])
    assert caught.value.hint == "Install with: pip install 'mlxsft[left_by_a_tracker,no_such]'"


def test_a_misspelt_tracker_is_refused(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, report=["tensorbord"])
    assert train(recipe, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert 'report[0]: got "tensorbord", expected one of tensorboard, trackio, wandb, mlflow' in said
    assert not (tmp_path / "run").exists()


def test_tags_are_safe_in_a_path_and_differ() -> None:
    assert tag_of("Who are you?") == "samples/Who-are-you-" + tag_of("Who are you?")[-6:]
    assert "/" not in tag_of("../../a\n" * 50).removeprefix("samples/")
    assert len({tag_of("a?"), tag_of("a!"), tag_of("ä")}) == 3
