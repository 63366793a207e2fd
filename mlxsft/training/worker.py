"""The process that trains: `python -m mlxsft.training.worker`, which `mlxsft train` starts and watches.

Its job is the first line of stdin; it stops, and saves, when stdin ends, which happens too when its parent is killed.
Stdout carries one JSON object a line: an event as events.jsonl has it, or one with `tell` (what goes on), `error` (the
class of an MlxsftError, with `message` and `hint`) or `bug` (a traceback).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from mlxsft.errors import MlxsftError
from mlxsft.interrupt import let_through, stop_requested
from mlxsft.recipe import Recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import Restarted, from_json

OnBattery = Literal["go-on", "pause"]

# What keeps macOS from ending a computation that makes the screen wait (https://github.com/ml-explore/mlx/issues/3267):
# MLX hands the GPU less at once than by its own choice, and Apple's driver is more patient. Never run on a Mac yet.
GPU_VARIABLES = {
    "MLX_MAX_OPS_PER_BUFFER": "10",
    "MLX_MAX_MB_PER_BUFFER": "20",
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
}


@dataclass(frozen=True)
class Job:
    """What a training process is asked to do."""

    recipe: Recipe
    out: Path
    backend: str
    resume: bool = False
    force: bool = False
    allow_changes: tuple[str, ...] = ()
    on_battery: OnBattery = "go-on"
    restarted: Restarted | None = None  # why this is not the first process of the run

    def to_json(self) -> str:
        """One line."""
        given = {**vars(self), "recipe": self.recipe.model_dump(mode="json"), "out": str(self.out)}
        return json.dumps(given | {"restarted": self.restarted.to_json() if self.restarted else None})

    @classmethod
    def from_json(cls, line: str) -> Job:
        given: dict[str, Any] = json.loads(line)
        restarted = from_json(given["restarted"]) if given["restarted"] else None
        assert restarted is None or isinstance(restarted, Restarted)
        recipe = Recipe.model_validate_json(json.dumps(given["recipe"]))
        typed = {"recipe": recipe, "out": Path(given["out"]), "restarted": restarted}
        return cls(**given | typed | {"allow_changes": tuple(given["allow_changes"])})


class Channel:
    """JSON lines to the parent; what they carry is lost when it is gone, and the run is not."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def line(self, text: str) -> None:
        with suppress(BrokenPipeError):
            self.file.write(text + "\n")
            self.file.flush()

    def send(self, **fields: str | None) -> None:
        self.line(json.dumps(fields))


def work(job: Job, channel: Channel, parent_is_gone: threading.Event) -> int:
    """Train; everything that happens goes into the channel. The exit code of the process."""
    from mlxsft.backends import leave_out_torch
    from mlxsft.training.power import plugged_in
    from mlxsft.training.run import run_training

    try:
        if not job.recipe.report:  # whose libraries may look at PyTorch where it is installed
            leave_out_torch(job.backend)
        with stop_requested([signal.SIGTERM]) as asked:
            let_through(signal.SIGTERM)
            events = run_training(
                job.recipe,
                RunFolder(job.out),
                backend_name=job.backend,
                resume=job.resume,
                force=job.force,
                allow_changes=job.allow_changes,
                stop=lambda: asked() or parent_is_gone.is_set(),
                tell=lambda message: channel.send(tell=message),
                restarted=job.restarted,
                plugged_in=plugged_in if job.on_battery == "pause" else lambda: True,
            )
            for event in events:
                channel.line(event.to_json())
    except MlxsftError as error:
        channel.send(error=type(error).__name__, message=error.message, hint=error.hint)
        return error.exit_code
    except Exception:
        channel.send(bug=traceback.format_exc())
        return 1
    return 0


def calm_the_gpu(platform: str, environment: MutableMapping[str, str]) -> None:
    """Set GPU_VARIABLES on a Mac, but for those that the person has set; MLX and the driver read them once."""
    if platform == "darwin":
        for name, value in GPU_VARIABLES.items():
            environment.setdefault(name, value)


def main() -> int:
    calm_the_gpu(sys.platform, os.environ)
    # The channel gets stdout for itself; what libraries print goes to stderr.
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    job = Job.from_json(sys.stdin.readline())
    parent_is_gone = threading.Event()

    def wait_for_the_end() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock this thread would hold when Python ends
            pass
        parent_is_gone.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    return work(job, channel, parent_is_gone)


if __name__ == "__main__":
    sys.exit(main())
