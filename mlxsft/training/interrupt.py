"""Ctrl-C and SIGTERM as a wish to stop, so that a step is finished and saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """Whether a stop was asked for: call it; `exit_code` is what the process returns then (130 or 143)."""

    signal_number = 0

    def __call__(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


@contextmanager
def stop_requested() -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM instead of dying of them; a second one takes its usual effect at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal_number = number
        for known, handler in before.items():
            signal.signal(known, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
