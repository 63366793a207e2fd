"""Events → what people see while a run is under way: a live bar in a terminal, plain lines elsewhere, or JSON."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mlxsft.terminal import printable
from mlxsft.training.events import (
    Evaluated,
    Event,
    Finished,
    LeftOutRows,
    Noted,
    Overfitted,
    Restarted,
    RolledBack,
    Sampled,
    Saved,
    Started,
    Stepped,
    TrunkCached,
)

_LINE_SECONDS = 10.0  # how often a plain line is written
_SAMPLE_WIDTH = 160  # characters of an answer that are shown; events.jsonl has the whole


class Report(Protocol):
    """Something that shows events; a context manager around the whole run."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, event: Event) -> None: ...


def make_report(*, as_json: bool) -> Report:
    """JSON lines on stdout, a live bar where stderr is a terminal, or plain lines on stderr."""
    if as_json:
        return UntilNobodyReads(JsonReport(sys.stdout))
    console = _Console(stderr=True, highlight=False)
    return LiveReport(console) if console.is_terminal else UntilNobodyReads(PlainReport(console))


class _Console(RichConsole):
    """rich's console, which would end the process when its reader is gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class UntilNobodyReads:
    """Another report, until its reader is gone: a run is not lost because `head` has had enough."""

    def __init__(self, report: Report) -> None:
        self.report: Report | None = report

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, event: Event) -> None:
        if self.report is not None:
            try:
                self.report.show(event)
            except BrokenPipeError:
                self.report = None
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process


class JsonReport:
    """Every event as one line of JSON."""

    def __init__(self, out: TextIO) -> None:
        self.out = out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.out.flush()

    def show(self, event: Event) -> None:
        self.out.write(event.to_json() + "\n")
        self.out.flush()


class Rates:
    """Rate and remaining time, from the last steps: the first are slower than the rest."""

    def __init__(self) -> None:
        self.recent: deque[Stepped] = deque(maxlen=20)

    def add(self, event: Stepped) -> None:
        self.recent.append(event)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rows, prompts included and padding not, that went through the model in a second."""
        return sum(e.tokens for e in self.recent) / max(1e-9, sum(e.seconds for e in self.recent))

    def remaining(self, steps: int) -> str:
        mean = sum(e.seconds for e in self.recent) / max(1, len(self.recent))
        return duration(mean * steps)


class PlainReport:
    """Plain lines: one for what matters, and one for the steps every few seconds."""

    def __init__(self, console: RichConsole) -> None:
        self.console = console
        self.rates = Rates()
        self.total_steps = 0
        self.written_at = -_LINE_SECONDS

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        match event:
            case Started():
                self.total_steps = event.total_steps
                for text in start_lines(event):
                    self.line(text)
            case Stepped():
                self.rates.add(event)
                self.step(event)
            case _:
                if text := event_line(event):
                    self.line(text)

    def step(self, event: Stepped) -> None:
        now = time.monotonic()
        if event.skipped or event.step in (1, self.total_steps) or now - self.written_at >= _LINE_SECONDS:
            self.written_at = now
            self.line(
                f"step {event.step}/{self.total_steps}  epoch {event.epoch:.2f}  {loss_text(event)}  "
                f"{self.rates.tokens_per_second:,.0f} tokens/s  "
                f"ETA {self.rates.remaining(self.total_steps - event.step)}  peak {size(event.peak_bytes)}"
            )


class LiveReport(PlainReport):
    """The same lines above a bar that moves."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__(console)
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
        )
        self.task = self.bar.add_task("loading", total=None, status="")
        self.last: Stepped | None = None
        self.valid = ""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, event: Event) -> None:
        super().show(event)
        if isinstance(event, Started):
            self.bar.update(self.task, description="training", total=event.total_steps, completed=event.step)
        elif isinstance(event, Evaluated) and event.loss is not None:
            self.valid = f"  valid {event.loss:.3f}"
            self.update()
        elif isinstance(event, TrunkCached):
            self.bar.update(self.task, status=f"computing the lower {event.layers} layers once: {event.done:.0%}")

    def step(self, event: Stepped) -> None:
        self.last = event
        self.update()
        if event.skipped:
            self.line(f"step {event.step}: {loss_text(event)}")

    def update(self) -> None:
        if (last := self.last) is not None:
            status = (
                f"{loss_text(last)}{self.valid}  {self.rates.tokens_per_second:,.0f} tok/s  "
                f"ETA {self.rates.remaining(self.total_steps - last.step)}  {size(last.peak_bytes)}"
            )
            self.bar.update(self.task, completed=last.step, status=status)


def start_lines(event: Started) -> list[str]:
    """What is about to be trained, on what, with which rows."""
    share = event.trainable_parameters / event.parameters
    steps = f"{event.total_steps} steps, {event.epochs:.3g} epochs"
    return [
        f"model     {event.model} ({event.parameters / 1e6:,.1f} M parameters), template {event.template}",
        f"adapter   {event.trainable_parameters:,} trainable parameters ({share:.2%})",
        f"rows      {ledger_text(event.ledger)}",
        f"run       {steps}, {event.backend} on {event.device}"
        + (f", {event.ranks} ranks" if event.ranks > 1 else "")
        + (f", going on after step {event.step}" if event.step else ""),
    ]


def ledger_text(ledger: Mapping[str, int]) -> str:
    """What became of the rows that were read."""
    return f"{ledger['read']:,} read = " + ", ".join(f"{n:,} {what}" for what, n in ledger.items() if what != "read")


def event_line(event: Event) -> str:
    """One line for an event that is not a step."""
    match event:
        case Noted():
            return f"note      {event.message}"
        case Restarted():
            return f"restart   {event.restart}: {restart_sentence(event)}"
        case LeftOutRows():
            more = f"\n          … and {len(event.rows) - 3} more, all in events.jsonl" * (len(event.rows) > 3)
            return "left out  " + "\n          ".join(printable(row) for row in event.rows[:3]) + more
        case Evaluated():
            loss = "not finite" if event.loss is None else f"{event.loss:.4f}{' (best)' * event.best}"
            return f"step {event.step}  validation loss {loss} over {event.rows} rows, {event.tokens:,} tokens"
        case Sampled():
            return sample_lines(event)
        case Overfitted():
            return f"note      {overfitting_sentence(event)}"
        case Saved():
            return f"step {event.step}  saved {event.path}"
        case TrunkCached(done=1.0):
            kept = f"{size(event.bytes)} {'in memory' if event.place == 'memory' else 'on disk'}"
            return f"trunk     the outputs of the lower {event.layers} layers are kept for all epochs, {kept}"
        case RolledBack():
            return f"step {event.step}  {rolled_back_sentence(event)}"
        case Finished():
            return finish_line(event)
    return ""


def sample_lines(event: Sampled) -> str:
    """Prompt and answer with their line breaks, each cut to what a glance takes in."""
    prompt, answer = (glance(text).replace("\n", "\n" + " " * 12) for text in (event.prompt, event.answer))
    return f"sample    step {event.step}: {prompt}\n          → {answer}"


def glance(text: str) -> str:
    """The beginning of a text without its empty lines."""
    cut = text if len(text) <= _SAMPLE_WIDTH else f"{text[:_SAMPLE_WIDTH]}…"
    return "\n".join(line for line in printable(cut).split("\n") if line.strip()) or "(nothing)"


def overfitting_sentence(event: Overfitted) -> str:
    training, valid = (" → ".join(f"{loss:.3f}" for loss in x) for x in (event.training_losses, event.valid_losses))
    return (
        f"overfitting: since step {event.steps[0]} the training loss falls ({training}) and the validation loss rises "
        f"({valid}). Fewer epochs, more rows, a lower learning rate or rank help; eval.patience stops such a run."
    )


def restart_sentence(event: Restarted) -> str:
    return (
        f"going on after step {event.step}, {event.micro_batch_tokens} tokens computed at once, because {event.cause}"
    )


def rolled_back_sentence(event: RolledBack) -> str:
    return f"{event.reason}: back to step {event.to_step}, and on at {event.rate_factor:g} of the learning rate"


def finish_line(event: Finished) -> str:
    """How the run ended, with which losses, and whose adapter is in the run folder."""
    how = {
        "done": "Done",
        "interrupted": "Interrupted",
        "patience": f"Stopped early, {event.evaluations_since_best} evaluations without improvement,",
    }
    parts = [f"{how[event.reason]} after {event.step} of {event.total_steps} steps in {duration(event.seconds)}"]
    if event.loss is not None:
        parts.append(f"training loss {event.loss:.4f}")
    valid = [f"{event.valid_loss_before:.4f} before training"] if event.valid_loss_before is not None else []
    valid += [f"{event.valid_loss:.4f} at last"] if event.valid_loss is not None else []
    if event.best_valid_loss is not None:
        step = "" if event.best_step is None else f" at step {event.best_step}"
        valid.append(f"{event.best_valid_loss:.4f} at best{step}")
    if valid:
        parts.append(f"validation loss {', '.join(valid)}")
    if event.padding_share is not None:
        parts.append(f"{event.padding_share:.1%} of the computed tokens were padding")
    if event.skipped_steps:
        parts.append(f"{event.skipped_steps} steps skipped because they were not finite")
    return "; ".join(parts) + "." + "".join(f"\n{sentence}" for sentence in _adapter_sentences(event))


def _adapter_sentences(event: Finished) -> Iterator[str]:
    if event.evaluations and event.adapter_step is not None:
        which = f"the best of {event.evaluations} evaluations" if event.adapter_step == event.best_step else "the last"
        yield f"The adapter is that of step {event.adapter_step}, {which}."
    before, best = event.valid_loss_before, event.best_valid_loss
    if before is not None and best is not None and best >= before:
        yield "No evaluation was better than the model before training: look at the rows and the learning rate."


def loss_text(event: Stepped) -> str:
    return "not finite, skipped" if event.loss is None else f"loss {event.loss:.4f}"


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def size(n: int) -> str:
    """Bytes as people read them."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"
