"""What people see of a run."""

from __future__ import annotations

import io

from rich.console import Console

from mlxsft.training.events import (
    Evaluated,
    Finished,
    LeftOutRows,
    Noted,
    Overfitted,
    Sampled,
    Saved,
    Started,
    Stepped,
    from_json,
)
from mlxsft.training.report import LiveReport, PlainReport, duration, event_line, size

START = Started("m", "mlx", "cpu", 0, 2, 1.0, 1000, 10, {"read": 3, "trained": 2, "too long": 1}, "plain", "now")
STEP = Stepped(1, 0.5, 1.25, 0.5, 1e-3, 10, 20, 24, 0.5, 2_000_000)
SKIPPED = Stepped(2, 1.0, None, None, 1e-3, 10, 20, 24, 0.5, 2_000_000, skipped=True)
END = Finished("done", 2, 2, 1, 10, 65.0, 1.25, 0.5, 0.25)
ALL = [
    START,
    Noted("mind this"),
    LeftOutRows(["a.jsonl:1: empty"] * 5),
    STEP,
    Evaluated(1, 0.5, 7, 2, True, 0.1),
    Sampled(1, "hi", "x" * 500),
    SKIPPED,
    Overfitted(2, [0, 1, 2], [1.5, 1.25, 1.0], [2.0, 2.25, 2.5]),
    Saved(2, "run/checkpoints/step-0000002"),
    END,
]


def shown(kind: type[PlainReport], *, terminal: bool) -> str:
    out = io.StringIO()
    with kind(Console(file=out, force_terminal=terminal, width=150, highlight=False)) as report:
        for event in ALL:
            report.show(event)
    return out.getvalue()


def test_plain_lines_hold_no_control_characters_and_say_what_matters() -> None:
    text = shown(PlainReport, terminal=False)
    assert "\x1b" not in text
    for words in (
        "3 read = 2 trained, 1 too long", "10 trainable parameters (1.00%)", "mind this", "loss 1.2500", "40 tokens/s",
        "ETA 0:00:00", "peak 2 MB", "validation loss 0.5000 (best) over 2 rows", "not finite, skipped",
        "saved run/checkpoints/step-0000002", "a.jsonl:1: empty", "and 2 more",
        "Done after 2 of 2 steps in 0:01:05", "1 steps skipped",
    ):  # fmt: skip
        assert words in text
    assert "x" * 161 not in text


def test_samples_keep_their_lines_and_lose_what_steers_a_terminal() -> None:
    line = event_line(Sampled(3, "Who\nare you?", "\n\nI am\n\n\x1b[31mPip."))
    assert line == "sample    step 3: Who\n            are you?\n          → I am\n            \\x1b[31mPip."
    assert event_line(Sampled(3, "hi", " \n")).endswith("→ (nothing)")


def test_overfitting_is_said_with_its_numbers_and_what_helps() -> None:
    line = event_line(Overfitted(3, [1, 2, 3], [1.5, 1.25, 1.0], [2.0, 2.25, 2.5]))
    assert "since step 1 the training loss falls (1.500 → 1.250 → 1.000)" in line
    assert "rises (2.000 → 2.250 → 2.500)" in line
    assert "Fewer epochs" in line


def test_the_end_says_why_and_whose_adapter_it_is() -> None:
    end = Finished("patience", 8, 20, 0, 10, 1.0, 0.5, 0.75, 0.625, None, 0.5, 4, 5, 3, 4)
    assert event_line(end) == (
        "Stopped early, 3 evaluations without improvement, after 8 of 20 steps in 0:00:01; training loss 0.5000; "
        "validation loss 0.5000 before training, 0.7500 at last, 0.6250 at best at step 4.\n"
        "The adapter is that of step 4, the best of 5 evaluations.\n"
        "No evaluation was better than the model before training: look at the rows and the learning rate."
    )
    last = Finished("done", 8, 8, 0, 10, 1.0, 0.5, 0.75, 0.625, None, 2.0, 4, 5, 3, 8)
    assert event_line(last).endswith("\nThe adapter is that of step 8, the last.")


def test_the_live_bar_shows_loss_validation_rate_and_memory() -> None:
    text = shown(LiveReport, terminal=True)
    for words in ("training", "valid 0.500", "40 tok/s", "2 MB", "2/2"):
        assert words in text


def test_events_survive_json() -> None:
    for event in ALL:
        assert from_json(event.to_json()) == event


def test_every_event_but_a_step_has_a_line() -> None:
    assert all(event_line(e) for e in ALL if not isinstance(e, Started | Stepped))


def test_sizes_and_durations_are_read_by_people() -> None:
    assert (size(999_000_000), size(1_500_000_000), duration(3661.4)) == ("999 MB", "1.50 GB", "1:01:01")
