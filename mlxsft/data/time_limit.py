"""A time limit for pure Python work, in any thread and on any system: for templates that a checkpoint brings."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimitExceeded(Exception):
    """The work took longer than it may."""


class _Watchdog(threading.Thread):
    """One thread for the whole process, started at the first use: a thread a call would cost more than most calls."""

    def __init__(self) -> None:
        super().__init__(name="mlxsft-time-limit", daemon=True)
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}  # by thread id
        self.start()

    def run(self) -> None:
        while True:
            time.sleep(0.1)
            with self.lock:
                late = [t for t, deadline in self.deadlines.items() if time.monotonic() > deadline]
                for thread in late:
                    del self.deadlines[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(thread), ctypes.py_object(TimeLimitExceeded)
                    )


_watchdog: _Watchdog | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitExceeded in the block when it has run for `seconds` (give or take 0.1). Blocks do not nest."""
    global _watchdog
    if _watchdog is None or not _watchdog.is_alive():
        _watchdog = _Watchdog()
    thread = threading.get_ident()
    with _watchdog.lock:
        _watchdog.deadlines[thread] = time.monotonic() + seconds
    arrived = False
    try:
        yield
    except TimeLimitExceeded:
        arrived = True
        raise
    finally:
        with _watchdog.lock:
            sent = _watchdog.deadlines.pop(thread, None) is None
        while sent and not arrived:  # it is on its way, and must arrive in this block rather than later
            time.sleep(0.001)
