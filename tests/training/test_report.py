"""What people see of a run."""

from __future__ import annotations

import io

from rich.console import Console

from mlxsft.training.events import Evaluated, Finished, LeftOutRows, Noted, Sampled, Saved, Started, Stepped, from_json
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
