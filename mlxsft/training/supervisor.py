"""Watching the processes that train: their events, why they died, and another try from the last checkpoint.

A process that computes can end without a word, by Metal's abort or by the system when memory runs out. So training has
processes of its own, and this one, which loads neither MLX nor a model, lives on and says what happened.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, Queue

from mlxsft import errors
from mlxsft.errors import Interrupted, MlxsftError, OutOfResources
from mlxsft.interrupt import Stop, signals_blocked
from mlxsft.own_process import module_command
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.deaths import Death, cause_of_death
from mlxsft.training.events import Event, Finished, Restarted, Started, from_json
from mlxsft.training.worker import Job

RESTARTS = 3
_LISTEN_SECONDS = 0.1  # how soon a wish to stop reaches the workers
_FAREWELL_SECONDS = 10.0  # for the other ranks to end by themselves when one has ended

Heard = Queue[tuple["Worker", str | None]]  # a line of a worker; None: it has ended


class WorkerFailed(RuntimeError):
    """A bug that ended a training process; the text is its traceback."""


@dataclass(frozen=True)
class Launch:
    """How one training process is started; `environment` is all of it."""

    command: Sequence[str]
    environment: Mapping[str, str]


class Worker:
    """One process that trains; its lines go into a queue, what it writes to stderr to ours where it is `loud`."""

    def __init__(self, launch: Launch, job: Job, heard: Heard, *, loud: bool) -> None:
        # Ctrl-C in a terminal goes to every process there; what stops a worker is the end of its stdin.
        try:
            with signals_blocked():
                self.process = subprocess.Popen(
                    launch.command,
                    env=launch.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    errors="replace",
                )
        except OSError as error:  # no ssh, or no room for another process
            raise OutOfResources(f"{launch.command[0]} cannot be started: {error}") from error
        self.loud = loud
        self.finished = False
        self.bug = ""
        self.error: MlxsftError | None = None
        self.tail: deque[str] = deque(maxlen=40)
        self.stderr_thread = threading.Thread(target=self._relay, daemon=True)
        self.stderr_thread.start()
        self.thread = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        self.thread.start()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already
            self.process.stdin.write(job.to_json() + "\n")
            self.process.stdin.flush()

    def _listen(self, heard: Heard) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                heard.put((self, line))
        self.stderr_thread.join()
        self.process.wait()
        heard.put((self, None))

    def _relay(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.tail.append(line)
                if self.loud:
                    with suppress(OSError, ValueError):  # nobody reads
                        sys.stderr.write(line)
                        sys.stderr.flush()

    @property
    def misses_a_rank(self) -> bool:
        """Whether it ended only because another rank had."""
        death = self.death() if self.error is None else None
        return death is not None and death.kind == "lost rank"

    def ask_to_stop(self) -> None:
        """End its stdin: it finishes the step, saves and ends."""
        if self.process.stdin is not None and not self.process.stdin.closed:
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def kill(self) -> None:
        """End it now; a process that has ended stays as it is."""
        self.process.kill()
        self.ask_to_stop()
        self.thread.join()

    def death(self) -> Death | None:
        """Why it is dead, or None for a bug."""
        last_line = self.bug.rstrip().rpartition("\n")[2]
        return cause_of_death(self.process.wait(), "".join(self.tail) + last_line)


class Supervisor:
    """One run: its processes, started again where they die.

    `launches` says anew each time how they are started, and `options` which arguments of `mlxsft train` belong to the
    command that goes on with the run.
    """

    def __init__(
        self,
        job: Job,
        launches: Callable[[], list[Launch]],
        *,
        restarts: int,
        stop: Stop,
        tell: Callable[[str], None],
        options: Sequence[str] = (),
    ) -> None:
        self.job = job
        self.options = options
        self.launches = launches
        self.restarts = restarts
        self.stop = stop
        self.tell = tell
        self.begun = False

    def events(self) -> Generator[Event, None, None]:
        """What rank 0 tells, to the end of the run.

        Raises the MlxsftError that ended a worker, WorkerFailed for a bug in it, OutOfResources when it died once more
        than `restarts` allow or before anything began, Interrupted when it died while it should stop.
        """
        for number in range(1, self.restarts + 2):
            death = yield from self._attempt()
            if death is None:
                return
            if self.stop():
                raise Interrupted(
                    f"Stopped; what was trained since the last checkpoint is lost: {death.cause}.",
                    f"Go on with: {self._go_on()}" if self.begun else None,
                    exit_code=self.stop.exit_code,
                )
            if not self.begun or number > self.restarts:
                raise self._given_up(death, number)
            self.tell(f"The training process died: {death.cause}. Starting another one.")
            self.job = self._next_job(death, number)

    def _next_job(self, death: Death, number: int) -> Job:
        train = self.job.recipe.train
        smaller = death.smaller_helps or number > 1  # a second crash may be lack of memory too
        tokens = max(1, train.micro_batch_tokens // 2) if smaller else train.micro_batch_tokens
        recipe = self.job.recipe.model_copy(update={"train": train.model_copy(update={"micro_batch_tokens": tokens})})
        restarted = Restarted(0, death.cause, number, tokens)  # the worker knows the step
        return replace(self.job, recipe=recipe, resume=True, force=False, restarted=restarted)

    def _given_up(self, death: Death, number: int) -> MlxsftError:
        if not self.begun:
            hint = "Take a smaller or a quantized model, or close other programs." if death.smaller_helps else None
            return OutOfResources(f"the training process died before training began: {death.cause}", hint)
        again = f", the last time of {number}" if number > 1 else ""
        screen = "macOS does not do that while the display is off. " if death.kind == "watchdog" else ""
        return OutOfResources(
            f"the training process died{again}: {death.cause}",
            f"{screen}Go on from the last checkpoint: {self._go_on()}",
        )

    def _go_on(self) -> str:
        restarted = self.job.restarted
        return resume_command(self.job.out, restarted.micro_batch_tokens if restarted else None, self.options)

    # --- one attempt -----------------------------------------------------------------------------------------------

    def _attempt(self) -> Generator[Event, None, Death | None]:
        """Start the workers and hear them to the end; why one of them died, or None."""
        heard: Heard = Queue()
        workers: list[Worker] = []
        try:
            for rank, launch in enumerate(self.launches()):
                workers.append(Worker(launch, self.job, heard, loud=rank == 0))
            return (yield from self._hear(workers, heard))
        finally:
            for worker in workers:
                worker.kill()

    def _hear(self, workers: list[Worker], heard: Heard) -> Generator[Event, None, Death | None]:
        alive, failed, until = set(workers), None, math.inf
        while alive and time.monotonic() < until:
            if self.stop():
                for worker in workers:
                    worker.ask_to_stop()
            try:
                worker, line = heard.get(timeout=_LISTEN_SECONDS)
            except Empty:
                continue
            if line is not None:
                event = self._understood(worker, line)
                if event is not None and worker is workers[0]:
                    yield event
                continue
            alive.remove(worker)
            failure = worker.error or worker.bug or worker.process.returncode  # a run that is over has no end event
            if not worker.finished and failure:
                failed, until = worker, time.monotonic() + _FAREWELL_SECONDS
                if not worker.misses_a_rank:
                    break  # else the one that it misses ends soon, and says more
        return self._end(failed, alive) if failed else None

    def _understood(self, worker: Worker, line: str) -> Event | None:
        """The event of a line; what is none is noted."""
        try:
            fields = json.loads(line)
        except ValueError:  # a kill cut it off
            return None
        if "event" in fields:
            event = from_json(line)
            self.begun |= isinstance(event, Started)
            worker.finished |= isinstance(event, Finished)
            return event
        if "tell" in fields and worker.loud:
            self.tell(fields["tell"])
        if "error" in fields:
            worker.error = getattr(errors, fields["error"])(fields["message"], fields["hint"])
        worker.bug = fields.get("bug", worker.bug)
        return None

    def _end(self, worker: Worker, others: set[Worker]) -> Death | None:
        """Why a worker ended that had not finished. Raises its error, or WorkerFailed."""
        if worker.error is not None:
            for other in others:  # they find the same, and leave the folder as they found it
                other.ask_to_stop()
                with suppress(subprocess.TimeoutExpired):
                    other.process.wait(_FAREWELL_SECONDS)
            raise worker.error
        death = worker.death()
        if death is None:
            said = worker.bug or "".join(worker.tail)
            raise WorkerFailed(f"the training process failed:\n{said}")
        return death


def worker_command() -> list[str]:
    """What starts a training process."""
    return module_command("mlxsft.training.worker")


def resume_command(out: Path, micro_batch_tokens: int | None = None, options: Sequence[str] = ()) -> str:
    """The command that goes on with the run in `out`, with these micro-batches and options where given."""
    smaller = ["--set", f"train.micro_batch_tokens={micro_batch_tokens}"] if micro_batch_tokens else []
    recipe = str(RunFolder(out).recipe)
    return shlex.join(["mlxsft", "train", recipe, "--out", str(out), "--resume", *options, *smaller])
