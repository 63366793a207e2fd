"""A question that a process of its own answers: what that needs is its own, and is given back when it ends.

`ask` starts it as `python -m MODULE`, whose `main` calls `answer`. The question is the first line of stdin, as JSON;
when stdin ends, because the one who asked is gone, the process ends too. Stdout carries one JSON object a line: `told`,
of which the last is the answer, then `end`; or `error` (the class of an MlxsftError, with `message` and `hint`) or
`bug` (a traceback).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxsft import errors
from mlxsft.errors import MlxsftError, OutOfResources
from mlxsft.interrupt import signals_blocked
from mlxsft.training.deaths import cause_of_death

TAIL_BYTES = 10_000  # of what a dead process wrote to stderr, to find the cause in

Told = Mapping[str, Any]


def module_command(module: str) -> list[str]:
    """What starts a module with the package and the folders that this process has."""
    here = str(Path.cwd())
    safe = [] if here in sys.path or "" in sys.path else ["-P"]  # nothing of the folder where one happens to stand
    return [sys.executable, *safe, "-m", module]


def ask(module: str, question: Mapping[str, Any], *, what: str, hint: str) -> Iterator[Told]:
    """What the process tells, its answer last.

    Raises the MlxsftError that it raised, RuntimeError for a bug in it, and OutOfResources, with `what` as the subject
    and this hint, where it dies, as a process does that finds no memory.
    """
    with tempfile.TemporaryFile() as said:
        process = _started(module_command(module), said.fileno())
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it is dead already
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                message = _understood(line)
                if "end" in message:
                    return
                if "error" in message:
                    raise getattr(errors, message["error"])(message["message"], message["hint"])
                if "told" in message:
                    yield message["told"]
                if "bug" in message:
                    raise _failed(what, hint, 1, message["bug"])
            status = process.wait()
            said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL_BYTES))
            raise _failed(what, hint, status, said.read().decode(errors="replace"))
        finally:
            process.kill()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
            process.wait()


def _started(command: list[str], stderr: int) -> subprocess.Popen[str]:
    """The process. Ctrl-C in a terminal goes to it too, and it is for us to end it."""
    try:
        with signals_blocked():
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
            )
    except OSError as error:  # no room for another process
        raise OutOfResources(f"{command[0]} cannot be started: {error}") from error


def _understood(line: str) -> dict[str, Any]:
    """The message of a line; nothing where a kill cut it off."""
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return message


def _failed(what: str, hint: str, status: int, said: str) -> Exception:
    """What an exit code and the last words of a process amount to; a traceback may say that memory ran out, too."""
    death = cause_of_death(status, said.rstrip().rpartition("\n")[2] if status == 1 else said)
    if death is None:
        return RuntimeError(f"{what} failed:\n{said}")
    return OutOfResources(f"{what} died: {death.cause}", hint)


# ---- in that process ------------------------------------------------------------------------------------------------


def answer(function: Callable[[Any, Callable[[Told], None]], None]) -> int:
    """Answer the question on stdin with what `function(question, tell)` tells. The exit code of the process."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")  # what libraries print goes to stderr
    os.dup2(2, 1)

    def send(**message: Any) -> None:
        with suppress(BrokenPipeError):
            channel.write(json.dumps(message) + "\n")
            channel.flush()

    question = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        function(question, lambda told: send(told=told))
        send(end=True)
    except MlxsftError as error:
        send(error=type(error).__name__, message=error.message, hint=error.hint)
        return error.exit_code
    except Exception:
        send(bug=traceback.format_exc())
        return 1
    return 0


def _end_with_stdin() -> None:
    """Nobody waits for the answer any more when stdin ends."""
    while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when Python ends
        pass
    os._exit(1)
