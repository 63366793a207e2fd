"""Limits of time and memory for pure Python work, in any thread and on any system: for templates of a checkpoint."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil

GROWTH = 1 << 30  # bytes that the process may grow by in a block


class TimeLimitExceeded(BaseException):
    """The work took longer than it may; no `except Exception` within it stops that."""


class MemoryLimitExceeded(TimeLimitExceeded):
    """The process grew by more than it may."""


@dataclass
class _Block:
    """One block of work in one thread."""

    deadline: float
    begun_with: int | None = None  # bytes, when the watchdog first saw it: most blocks it never sees


class _Watchdog(threading.Thread):
    """One thread for the whole process, started at the first use: a thread a call would cost more than most calls."""

    def __init__(self) -> None:
        super().__init__(name="mlxsft-time-limit", daemon=True)
        self.lock = threading.Lock()
        self.blocks: dict[int, _Block] = {}  # by thread id
        self.process = psutil.Process()
        self.start()

    def run(self) -> None:
        while True:
            time.sleep(0.1)
            with self.lock:
                for thread, block in list(self.blocks.items()):
                    if (exceeded := self._exceeded(block)) is not None:
                        del self.blocks[thread]
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(exceeded))

    def _exceeded(self, block: _Block) -> type[TimeLimitExceeded] | None:
        if time.monotonic() > block.deadline:
            return TimeLimitExceeded
        now = self.process.memory_info().rss
        if block.begun_with is None:
            block.begun_with = now
        return MemoryLimitExceeded if now - block.begun_with > GROWTH else None


_watchdog: _Watchdog | None = None


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimitExceeded in the block when it has run for `seconds` (give or take 0.1). Blocks do not nest.

    MemoryLimitExceeded where the process has grown by GROWTH meanwhile.
    """
    global _watchdog
    if _watchdog is None or not _watchdog.is_alive():
        _watchdog = _Watchdog()
    thread = threading.get_ident()
    with _watchdog.lock:
        _watchdog.blocks[thread] = _Block(time.monotonic() + seconds)
    arrived = False
    try:
        yield
    except TimeLimitExceeded:
        arrived = True
        raise
    finally:
        with _watchdog.lock:
            sent = _watchdog.blocks.pop(thread, None) is None
        if sent and not arrived:  # it is on its way and must arrive in this block, or something there has caught it
            time.sleep(0.01)
            raise TimeLimitExceeded
