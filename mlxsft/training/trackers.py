"""What a run tells TensorBoard, Trackio, Weights & Biases and MLflow, where the recipe's `report` asks for it.

Each tracker is a small class with the same verbs. One that fails is left out from then on, with a note: no run stops
because of a tracker. Nothing goes over a network unless the tracker's own settings say so.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mlxsft.errors import UsageError
from mlxsft.recipe import flattened
from mlxsft.training.events import Evaluated, Event, Noted, RolledBack, Sampled, Started, Stepped

PROJECT = "mlxsft"  # what our runs are filed under, where the tracker's environment names nothing else


@dataclass(frozen=True)
class Run:
    """What a tracker is told at the beginning; `identity` stays the same over resumes, `step` is where this one is."""

    folder: Path
    identity: str
    step: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.folder.resolve().name


class Tracker(Protocol):
    """Numbers and samples of a run, kept by a library; `note` says where they are to be seen."""

    note: str

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def sample(self, step: int, prompt: str, answer: str) -> None: ...
    def go_back(self, step: int) -> None:
        """What was told of later steps is taken back, where the library can; they come again."""

    def close(self, reason: str | None) -> None:
        """Everything is written. `reason` is that of the run's end; None: it came to no end of its own."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.note = f"tensorboard --logdir {shlex.quote(str(run.folder))}"
        self.summary, self.record = Summary, Record
        self.writer = EventFileWriter(str(run.folder / "tensorboard"), flush_secs=10)
        self.restart = SessionLog(status=SessionLog.START)
        if run.step:
            self.go_back(run.step)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def sample(self, step: int, prompt: str, answer: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        text = TensorProto(dtype=DT_STRING, string_val=[f"{prompt}\n\n{answer}".encode()])
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(step, [self.summary.Value(tag=tag_of(prompt), tensor=text, metadata=kind)])

    def go_back(self, step: int) -> None:
        self.writer.add_event(self.record(step=step + 1, session_log=self.restart))

    def _add(self, step: int, values: Sequence[Any]) -> None:
        self.writer.add_event(self.record(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def close(self, reason: str | None) -> None:
        self.writer.close()


class Trackio:
    """Trackio's local database; TRACKIO_SPACE_ID or TRACKIO_SERVER_URL name another place."""

    def __init__(self, run: Run) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.note = f"trackio show --project {shlex.quote(project)}"
        self.trackio = trackio
        self.run = trackio.init(
            project=project,
            name=f"{run.name}-{run.identity[:8]}",
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        self.run.log({tag_of(prompt): self.trackio.Markdown(f"{prompt}\n\n{answer}")}, step=step)

    def go_back(self, step: int) -> None:
        """Nothing: it has a step twice."""

    def close(self, reason: str | None) -> None:
        self.trackio.finish()


class Wandb:
    """Weights & Biases: sent where somebody is logged in, else kept in RUN/wandb; WANDB_MODE, where set, decides."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nobody asked for reports of its crashes
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity,
            resume="allow" if mode == "online" else None,
            dir=run.folder,
            config=dict(run.settings),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        send = f"wandb sync {shlex.quote(str(run.folder / 'wandb'))}/offline-* sends the run"
        self.note = send if mode == "offline" else f"wandb {self.run.url or mode}"

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        from html import escape

        page = f"<pre>{escape(prompt)}\n\n{escape(answer)}</pre>"
        self.run.log({tag_of(prompt): self.wandb.Html(page, inject=False)}, step=step)

    def go_back(self, step: int) -> None:
        """Nothing: it leaves out steps that it knows."""

    def close(self, reason: str | None) -> None:
        self.run.finish(exit_code=0 if reason else 1)


class Mlflow:
    """A database in RUN/mlflow, or the server of MLFLOW_TRACKING_URI."""

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked for it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # else a dead server holds the run for minutes
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for name in ("alembic", "mlflow"):  # which tell how they make a database
            logging.getLogger(name).setLevel(logging.WARNING)
        self.metric = Metric

        home = run.folder.resolve() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            home.mkdir(exist_ok=True)
        place = uri or f"sqlite:///{home / 'mlflow.db'}"
        self.note = f"mlflow ui --backend-store-uri {shlex.quote(place)}"
        self.client = MlflowClient(place)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        files = None if uri else (home / "artifacts").as_uri()
        experiment = known.experiment_id if known else self.client.create_experiment(name, artifact_location=files)
        earlier = self.client.search_runs([experiment], f"tags.mlxsft = '{run.identity}'")
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"mlxsft": run.identity}
            self.id = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            settings = flattened(run.settings).items()
            self.client.log_batch(self.id, params=[Param(key, str(value)[:500]) for key, value in settings])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[self.metric(name, x, now, step) for name, x in values.items()])

    def sample(self, step: int, prompt: str, answer: str) -> None:
        self.client.log_text(self.id, f"{prompt}\n\n{answer}\n", f"{tag_of(prompt)}/step-{step:07d}.txt")

    def go_back(self, step: int) -> None:
        """Nothing: it has a step twice."""

    def close(self, reason: str | None) -> None:
        ends = {None: "FAILED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, status=ends.get(reason, "FINISHED"))


KINDS: dict[str, Callable[[Run], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": Mlflow,
}


def refuse_missing(names: Sequence[str]) -> None:
    """Raises UsageError, with the command that installs them, for trackers that are not installed."""
    specs = {name: find_spec(name) for name in names}
    # A folder of that name, such as wandb makes, passes for a package without an origin.
    if missing := [name for name, spec in specs.items() if spec is None or spec.origin is None]:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"report: {', '.join(missing)} {verb} not installed",
            f"Install with: pip install 'mlxsft[{','.join(missing)}]'",
        )


class Trackers:
    """The trackers of one run: opened at its start event, fed with what follows, closed at its end in any case."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], past: Sequence[Event]) -> None:
        self.names, self.folder, self.settings = names, folder, settings
        self.begun = next((e for e in past if isinstance(e, Started)), None)
        self.open: dict[str, Tracker] = {}
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        list(self.close(None))

    def see(self, event: Event) -> Iterator[Noted]:
        """Hand an event on; a note for each tracker that fails, and where to look at the beginning."""
        if isinstance(event, Started):
            self._start(event)
        for name, tracker in list(self.open.items()):
            with self._aside_when_failing(name):
                match event:
                    case Stepped() | Evaluated():
                        tracker.numbers(event.step, numbers_of(event))
                    case Sampled():
                        tracker.sample(event.step, event.prompt, event.answer)
                    case RolledBack():
                        tracker.go_back(event.to_step)
        yield from self._notes()

    def close(self, reason: str | None) -> Iterator[Noted]:
        """Write what is left; a note for each tracker that fails."""
        for name, tracker in list(self.open.items()):
            with self._aside_when_failing(name):
                tracker.close(reason)
        self.open.clear()
        yield from self._notes()

    def _start(self, event: Started) -> None:
        begun = f"{self.folder.resolve().name} {(self.begun or event).to_json()}"
        run = Run(self.folder, hashlib.sha256(begun.encode()).hexdigest()[:16], event.step, self.settings)
        for name in self.names:
            with self._aside_when_failing(name):
                self.open[name] = KINDS[name](run)
                self.notes.append(f"report: {self.open[name].note}")

    @contextmanager
    def _aside_when_failing(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises is a note; what it prints is no part of a run's output."""
        try:
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Exception as error:
            self.open.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            self.notes.append(f"report: {name} failed and gets no more of this run: {reason}")

    def _notes(self) -> Iterator[Noted]:
        notes, self.notes = self.notes, []
        yield from map(Noted, notes)


def tag_of(prompt: str) -> str:
    """The name that answers to a prompt are filed under: its first words, safe in a path, and a digest of it all."""
    words = "-".join(re.findall(r"[A-Za-z0-9]+", prompt))[:32].strip("-")
    return f"samples/{words}-{hashlib.sha256(prompt.encode()).hexdigest()[:6]}"


def numbers_of(event: Stepped | Evaluated) -> dict[str, float]:
    """The numbers of an event under the names that trackers show; those that are not finite are left out."""
    if isinstance(event, Evaluated):
        values = {"valid/loss": event.loss}
    else:
        values = {
            "train/loss": event.loss,
            "train/gradient_norm": event.gradient_norm,
            "train/learning_rate": event.learning_rate,
            "train/tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            "train/peak_bytes": float(event.peak_bytes),
            "train/epoch": event.epoch,
        }
    return {name: value for name, value in values.items() if value is not None}
