"""Why a training process died: one sentence, from its exit status and the last that it wrote."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

# What MLX, Metal, the C and C++ libraries and Python write when memory does not suffice, in upper or lower case.
_MEMORY = (
    "Insufficient Memory",
    "kIOGPUCommandBufferCallbackErrorOutOfMemory",
    "[metal::malloc]",
    "Unable to allocate",
    "attempting to allocate",
    "cannot allocate memory",
    "std::bad_alloc",
    "MemoryError",
)
# What Metal writes when one command keeps the screen waiting too long; the last, as MLX's authors read it
# (https://github.com/ml-explore/mlx/issues/1231).
_WATCHDOG = (
    "GPU Timeout Error",
    "kIOGPUCommandBufferCallbackErrorTimeout",
    "Impacting Interactivity",
    "kIOGPUCommandBufferCallbackErrorImpactingInteractivity",
    "GPU Hang",
    "Internal Error (0000000e",
)
_LONGEST_LINE = 160  # characters
_LOST_RANK = ("[ring] connection to a peer was lost", "[ring] Couldn't connect")


@dataclass(frozen=True)
class Death:
    """The end of a training process that told neither a result nor an error; `cause` is a clause."""

    kind: Literal["memory", "watchdog", "lost rank", "crash"]
    cause: str

    @property
    def smaller_helps(self) -> bool:
        """Whether the same work in smaller pieces has a chance."""
        return self.kind in ("memory", "watchdog")


def cause_of_death(exit_status: int, last_lines: str) -> Death | None:
    """What ended a process; None where it is a bug of Python code, whose traceback says it better.

    `exit_status` is what subprocess calls it: -9 for SIGKILL.
    """
    if line := _line_with(_MEMORY, last_lines):
        return Death("memory", f"memory ran out ({line})")
    if line := _line_with(_WATCHDOG, last_lines):
        return Death("watchdog", f"the GPU's watchdog ended a computation that took too long ({line})")
    if _line_with(_LOST_RANK, last_lines):
        return Death("lost rank", "another rank of the run is gone")
    if exit_status == -signal.SIGKILL:
        return Death("memory", "it was killed (SIGKILL), as the system does when memory runs out")
    if exit_status == -signal.SIGSEGV:
        # MLX on the CPU writes to address 0 when it gets no memory.
        return Death("crash", "it crashed (SIGSEGV), which lack of memory may cause")
    if exit_status < 0:
        return Death("crash", f"it crashed ({signal.Signals(-exit_status).name})")
    if exit_status == 1:
        return None
    last = last_lines.rstrip().rpartition("\n")[2].strip()[:_LONGEST_LINE]
    reason = f"; its last line was: {last}" if last else " and gave no reason"
    return Death("crash", f"it ended with exit code {exit_status}{reason}")


def _line_with(words: tuple[str, ...], text: str) -> str:
    """The start of the last line with one of these words, in any case."""
    found = [line.strip() for line in text.splitlines() if any(word.lower() in line.lower() for word in words)]
    return found[-1][:_LONGEST_LINE] if found else ""
