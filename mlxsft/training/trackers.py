"""What a run tells TensorBoard, Trackio, Weights & Biases and MLflow, where the recipe's `report` asks for it.

Each tracker is a small class with the same verbs. One that fails is left out from then on, with a note: no run stops
because of a tracker. Nothing goes over a network unless the tracker's own settings say so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from mlxsft.errors import UsageError
from mlxsft.training.events import Evaluated, Event, Noted, Sampled, Started, Stepped

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
    """Numbers and samples of a run, kept by a library; `note` is what the person should know about where they go."""

    note: str | None

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def sample(self, step: int, prompt: str, answer: str) -> None: ...
    def close(self, reason: str | None) -> None:
        """Everything is written. `reason` is that of the run's end; None: it came to no end of its own."""


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`."""

    note = None

    def __init__(self, run: Run) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.summary, self.record = Summary, Record
        self.writer = EventFileWriter(str(run.folder / "tensorboard"), flush_secs=10)
        if run.step:  # what an earlier process wrote from here on is taken back
            self.writer.add_event(Record(step=run.step + 1, session_log=SessionLog(status=SessionLog.START)))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def sample(self, step: int, prompt: str, answer: str) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        text = TensorProto(dtype=DT_STRING, string_val=[answer.encode()])
        kind = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._add(step, [self.summary.Value(tag=f"samples/{prompt}", tensor=text, metadata=kind)])

    def _add(self, step: int, values: Sequence[Any]) -> None:
        import time

        self.writer.add_event(self.record(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def close(self, reason: str | None) -> None:
        self.writer.close()


class Trackio:
    """Trackio's local database: `trackio show`. TRACKIO_SPACE_ID or TRACKIO_SERVER_URL send it elsewhere."""

    note = None

    def __init__(self, run: Run) -> None:
        import trackio

        self.trackio = trackio
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
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
        self.run.log({f"samples/{prompt}": self.trackio.Markdown(answer)}, step=step)

    def close(self, reason: str | None) -> None:
        self.run.finish()


class Wandb:
    """Weights & Biases: sent where somebody is logged in, else kept in RUN/wandb. WANDB_MODE decides where it is set."""

    note = None

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nobody asked for reports of its crashes
        import wandb

        mode = None
        if "WANDB_MODE" not in os.environ and not wandb.api.api_key:
            mode = "offline"
            self.note = f"wandb: nobody is logged in; `wandb sync {run.folder / 'wandb' / 'offline-*'}` sends the run"
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity,
            resume=None if mode or os.environ.get("WANDB_MODE") == "offline" else "allow",
            dir=run.folder,
            config=dict(run.settings),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        from html import escape

        self.run.log({f"samples/{prompt}": self.wandb.Html(f"<pre>{escape(answer)}</pre>", inject=False)}, step=step)

    def close(self, reason: str | None) -> None:
        self.run.finish(exit_code=0 if reason else 1)


class Mlflow:
    """A database in RUN/mlflow: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`; or MLFLOW_TRACKING_URI."""

    note = None

    def __init__(self, run: Run) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked for it
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # else a dead server holds the run for minutes
        logging.getLogger("alembic").setLevel(logging.WARNING)
        from mlflow import MlflowClient

        home = run.folder.resolve() / "mlflow"
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            home.mkdir(exist_ok=True)
        self.client = MlflowClient(uri or f"sqlite:///{home / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self.client.get_experiment_by_name(name)
        place = None if uri else (home / "artifacts").as_uri()
        experiment = known.experiment_id if known else self.client.create_experiment(name, artifact_location=place)
        earlier = self.client.search_runs([experiment], f"tags.mlxsft = '{run.identity}'")
        if earlier:
            self.id = earlier[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            tags = {"mlxsft": run.identity}
            self.id = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
            for key, value in flattened(run.settings).items():
                self.client.log_param(self.id, key, str(value)[:500])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.id, name, value, step=step)

    def sample(self, step: int, prompt: str, answer: str) -> None:
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        self.client.log_text(self.id, f"{prompt}\n\n→ {answer}\n", f"samples/step-{step:07d}-{digest}.txt")

    def close(self, reason: str | None) -> None:
        ends = {None: "FAILED", "interrupted": "KILLED"}
        self.client.set_terminated(self.id, status=ends.get(reason, "FINISHED"))


KINDS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": Mlflow}


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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        list(self.close(None))

    def see(self, event: Event) -> Iterator[Noted]:
        """Hand an event on; a note for each tracker that fails."""
        match event:
            case Started():
                yield from self._start(event)
            case Stepped() | Evaluated():
                for name, tracker in list(self.open.items()):
                    yield from self._try(name, lambda t=tracker: t.numbers(event.step, numbers_of(event)))
            case Sampled():
                for name, tracker in list(self.open.items()):
                    yield from self._try(name, lambda t=tracker: t.sample(event.step, event.prompt, event.answer))

    def close(self, reason: str | None) -> Iterator[Noted]:
        """Write what is left; a note for each tracker that fails."""
        for name, tracker in list(self.open.items()):
            yield from self._try(name, lambda t=tracker: t.close(reason))
            self.open.pop(name, None)

    def _start(self, event: Started) -> Iterator[Noted]:
        begun = self.begun or event
        identity = hashlib.sha256(f"{self.folder.resolve()} {begun.to_json()}".encode()).hexdigest()[:16]
        run = Run(self.folder, identity, event.step, self.settings)
        for name in self.names:
            yield from self._try(name, lambda n=name: self.open.update({n: KINDS[n](run)}))
            if name in self.open and (note := self.open[name].note):
                yield Noted(note)
