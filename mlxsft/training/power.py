"""Keeping a Mac awake while it trains, and waiting while it has no mains."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def plugged_in() -> bool:
    """Whether the machine may draw power: False only where a battery says that it alone supplies it."""
    read = getattr(psutil, "sensors_battery", None)  # not every system has it
    battery = read() if read else None
    return battery is None or battery.power_plugged is not False


def awake_command(platform: str, pid: int) -> list[str] | None:
    """What keeps this system from sleeping until the process `pid` ends; None where nothing has to.

    caffeinate's -i, -m and -s keep system and disk awake, and on mains also behind a closed lid.
    """
    return ["/usr/bin/caffeinate", "-ims", "-w", str(pid)] if platform == "darwin" else None


@contextmanager
def awake(command: list[str] | None) -> Iterator[None]:
    """This command under way meanwhile; a system without it may fall asleep."""
    if command is None:
        yield
        return
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        process.terminate()
        process.wait()
