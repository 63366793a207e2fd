"""Every way mlxsft says no: one sentence for the person, one exit code for the script.

A message says where, what was found and what was expected; the hint says what to do. What is not an `MlxsftError`
is a bug and keeps its traceback (exit 1).
"""

from __future__ import annotations


class MlxsftError(Exception):
    """A refusal that the person at the keyboard can act on; `exit_code` is what the process returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MlxsftError):
    """The command line or the recipe is wrong."""

    exit_code = 2


class InputRefused(MlxsftError):
    """A checkpoint, an adapter or a data file cannot be taken as it is."""

    exit_code = 3


class OutOfResources(MlxsftError):
    """Memory or disk does not suffice, or training died for the last time."""

    exit_code = 4


class Diverged(MlxsftError):
    """Training produced numbers that are not numbers."""

    exit_code = 5


class GateFailed(MlxsftError):
    """A quality that the caller demanded was not reached."""

    exit_code = 6


class NetworkFailed(MlxsftError):
    """The Hub could not be reached, or it refused."""

    exit_code = 7


class Interrupted(MlxsftError):
    """Stopped by Ctrl-C (130) or SIGTERM (143); what was done is saved and can go on."""

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
