"""Ctrl-C and other signals as a wish to stop, so that what is under way is finished and saved first."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# What ends a run in good order: Ctrl-C, a system that shuts down, a terminal that is closed.
ENDINGS = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n))


class Stop:
    """Whether a stop was asked for: call it; `exit_code` is what the process returns then (130, 143, 129)."""

    signal_number = 0

    def __call__(self) -> bool:
        return self.signal_number != 0

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


@contextmanager
def stop_requested(signals: Sequence[int] = ENDINGS, said: str = "") -> Iterator[Stop]:
    """Notes the signals instead of dying of them, and says so; a second one takes its usual effect at once."""
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal_number = number
        for known, handler in before.items():
            signal.signal(known, handler)
        if said:
            try:
                os.write(2, f"\n{said}\n".encode())  # a print may be under way, which must not be entered twice
            except OSError:
                return  # a terminal that is gone

    before = {number: signal.getsignal(number) for number in signals}
    for number in before:
        signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked(signals: Sequence[int] = ENDINGS) -> Iterator[None]:
    """A process that is started meanwhile gets none of these signals before it lets them through; ours come after."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_through(number: int) -> None:
    """Take this signal again, which `signals_blocked` keeps from a new process; one that came before comes now."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
