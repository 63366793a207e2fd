"""Runs that are killed, as processes: started in milliseconds, since all that they import is imported before the fork.

    python -m tests.training.killed < jobs     one JSON object a line in (`Job`), one a line out

Nothing of MLX or of the tokenizer has run before the fork, so no thread of theirs is lost in it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# What the interpreter reports before it is done (https://docs.python.org/3/library/audit_events.html).
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


@dataclass(frozen=True)
class Job:
    """One run of a recipe in a process of its own."""

    recipe: str
    out: str
    resume: bool = False
    kill_at: int | None = None  # SIGKILL right before the change of this number in the run folder
    kill_after: float | None = None  # seconds from the fork to SIGKILL
    file_limit: int | None = None  # bytes that a file may have, as where the disk is full
    record: str | None = None  # a file for what is changed in the run folder, a path a line


class Runner:
    """A process that forks one run after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.training.killed"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, job: Job) -> tuple[int, str]:
        """The exit code (negative: the signal) and what the run said in the end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(job)) + "\n")
        self.process.stdin.flush()
        code, said = json.loads(self.process.stdout.readline())
        return code, said


@contextmanager
def runner() -> Iterator[Runner]:
    started = Runner()
    try:
        yield started
    finally:
        started.process.communicate()


def serve() -> None:
    import_everything()
    for line in sys.stdin:
        job = Job(**json.loads(line))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os._exit(train(job, writing))
        os.close(writing)
        if job.kill_after is not None:
            time.sleep(job.kill_after)
            os.kill(child, signal.SIGKILL)  # or what is left of it, where it has ended
        with os.fdopen(reading) as said:
            text = said.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([code, text]), flush=True)


def import_everything() -> None:
    """What a run of a Llama imports; slow, and so done once."""
    for name in (
        "mlx_lm.generate",
        "mlx_lm.models.cache",
        "mlx_lm.models.llama",
        "mlx_lm.tuner.utils",
        "mlxsft.backends.mlx",
        "mlxsft.training.run",
        "transformers.models.llama.configuration_llama",
    ):
        importlib.import_module(name)


def train(job: Job, said: int) -> int:
    """The run, in the child; its exit code."""
    from mlxsft.errors import MlxsftError
    from mlxsft.recipe import load_recipe
    from mlxsft.training.checkpoints import RunFolder
    from mlxsft.training.run import run_training

    if job.file_limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job.file_limit, job.file_limit))
    if job.kill_at is not None or job.record is not None:
        sys.addaudithook(Watch(job))
    arguments: dict[str, Any] = {"backend_name": "mlx", "resume": job.resume, "force": False}
    try:
        for _ in run_training(
            load_recipe(Path(job.recipe)), RunFolder(Path(job.out)), stop=lambda: False, tell=print, **arguments
        ):
            pass
    except MlxsftError as error:
        os.write(said, error.message.encode())
        return error.exit_code
    except BaseException as error:
        os.write(said, repr(error).encode())
        return 1
    return 0


class Watch:
    """Counts what is about to be changed in the run folder, and kills its own process at a number of it."""

    def __init__(self, job: Job) -> None:
        self.job, self.count = job, 0
        self.record = None if job.record is None else os.open(job.record, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in CHANGES or (event == "open" and not self.writes(arguments)):
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], str | os.PathLike) else str(arguments[0])
        inside = self.job.out in path or not os.path.isabs(path)  # rmtree names what it removes within its folder
        if not inside:
            return
        self.count += 1
        if self.record is not None:
            os.write(self.record, f"{event} {path}\n".encode())
        if self.count == self.job.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def writes(arguments: tuple[Any, ...]) -> bool:
        mode, flags = arguments[1], arguments[2]
        return any(letter in (mode or "") for letter in "wa+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    serve()
