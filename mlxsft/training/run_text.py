"""Runs → what `mlxsft runs` writes in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxsft.recipe import flattened
from mlxsft.terminal import printable
from mlxsft.training.drawing import Curve, draw
from mlxsft.training.events import Sampled
from mlxsft.training.history import History, share_of_points, thinned
from mlxsft.training.report import duration, finish_line, size, start_lines

HEIGHT = 14  # characters of a drawing
COLOURS = ("cyan", "yellow", "magenta", "green", "blue", "red")
_ANSWER = 240  # characters of an answer that are shown


def print_list(runs: Sequence[History], folder: Path, console: Console) -> None:
    """One line a run; a narrow terminal leaves out the models and when they began."""
    wide = console.width >= 110
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for name in ("model", "begun") if wide else ():
        table.add_column(name, no_wrap=True)
    table.add_column("state", no_wrap=True)
    for name in ("loss", "valid", "time", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        s = run.summary()
        losses = ("" if s[name] is None else f"{s[name]:.4f}" for name in ("loss", "best_valid_loss"))
        name = str(run.path.relative_to(folder)) if run.path != folder else str(folder)
        model = printable(str(s["model"] or "")).rstrip("/").rpartition("/")[2]
        told: list[str | Text] = [Text(model), begun(s["started"])] if wide else []
        ends = [duration(s["seconds"]), size(s["size_bytes"])]
        table.add_row(Text(printable(name)), *told, Text(state(run), state_style(run)), *losses, *ends)
    console.print(table)


def print_run(run: History, console: Console) -> None:
    """One run: what it is, its curves, how it ended, what it answered, what was noted."""

    def say(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    say((printable(str(run.path)), "bold"), "  ", (state(run), state_style(run)))
    if run.start:
        for line in start_lines(run.start):
            say(printable(line))
        say(f"begun     {begun(run.start.time)}", "" if run.end else f", {duration(run.seconds)} of training so far")
    say()
    print_curves([run], console)
    say()
    for line in finish_line(run.end).splitlines() if run.end else []:
        say(line)
    for prompt, answers in run.samples.items():
        say(("\nsample  ", "dim"), (printable(prompt), "bold"))
        console.print(_answers(answers, run.best.step if run.best else None))
    for note in run.notes:
        say(("\nnote  ", "bold"), printable(note))


def _answers(answers: Sequence[Sampled], best: int | None) -> Table:
    """The answers that show the way, each beside its step."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, justify="right", style="dim")
    table.add_column(overflow="fold")
    for answer in _chosen(answers, best):
        text = answer.answer if len(answer.answer) <= _ANSWER else f"{answer.answer[:_ANSWER]}…"
        lines = [line for line in printable(text).split("\n") if line.strip()]
        star = "best, " if answer.step == best else ""
        table.add_row(f"  {star}step {answer.step:,}", Text("\n".join(lines) or "(nothing)"))
    return table


def print_comparison(runs: Sequence[History], console: Console) -> None:
    """Runs over the same axes, their results side by side, and the settings in which they differ."""
    print_curves(runs, console)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for run, letter, colour in _lettered(runs):
        table.add_column(Text.assemble((f"{letter}  ", colour), printable(str(run.path))), overflow="fold")
    for name, values in results(runs) + differing_settings(runs):
        table.add_row(Text(name, "dim"), *(Text(printable(value)) for value in values))
    console.print()
    console.print(table)


def print_curves(runs: Sequence[History], console: Console) -> None:
    """Training as a line, validation as marks, the best evaluation as a star."""
    plain = not (console.encoding or "").lower().startswith("utf")
    valid, star = ("o", "*") if plain else ("●", "★")
    width = min(console.width, 120)
    curves, legend = [], []
    for run, letter, colour in _lettered(runs):
        points = thinned([(e.step, e.loss) for e in run.steps if e.loss is not None], share_of_points(run, runs, width))
        best = run.best.step if run.best else None
        judged = [(float(e.step), e.loss) for e in run.evaluations if e.loss is not None]
        marks = [(step, loss, star if step == best else valid) for step, loss in judged]
        if len(runs) > 1 and points:
            marks.append((points[-1].step, points[-1].mean, letter))
        style = colour if len(runs) > 1 else "bold green"
        curves.append(Curve([(p.step, p.mean) for p in points], colour, marks, style))
        said = f"{letter}  {printable(str(run.path))}  " if len(runs) > 1 else ""
        legend.append(Text.assemble("  ", (said, colour)))
        if run.best and run.best.loss is not None:
            legend[-1].append(f"{star} best {run.best.loss:.4f} at step {run.best.step}")
    line = "." if plain else "⠒⠒"
    key = Text.assemble("  ", (line, "cyan" if len(runs) == 1 else ""), " training loss  ")
    key.append_text(
        Text.assemble((valid, "bold green" if len(runs) == 1 else ""), " validation loss   nats a trained token")
    )
    console.print(draw(curves, width=width, height=HEIGHT, ascii_only=plain), soft_wrap=True)
    for text in [key, *(entry for entry in legend if entry.plain.strip())]:
        console.print(text)


def results(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(what, the value of each run)."""
    rows = [run.summary() for run in runs]

    def column(name: str, form: str) -> list[str]:
        return ["" if row[name] is None else format(row[name], form) for row in rows]

    return [
        ("state", [state(run) for run in runs]),
        ("loss", column("loss", ".4f")),
        ("best validation", column("best_valid_loss", ".4f")),
        ("best at step", column("best_step", ",")),
        ("tokens/s", column("tokens_per_second", ",.0f")),
        ("time", [duration(row["seconds"]) for row in rows]),
        ("peak memory", ["" if row["peak_bytes"] is None else size(row["peak_bytes"]) for row in rows]),
    ]


def differing_settings(runs: Sequence[History]) -> list[tuple[str, list[str]]]:
    """(setting, the value of each run) where they are not all the same."""
    flat = [flattened(run.recipe) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    return [
        (name, [_value(settings.get(name)) for settings in flat])
        for name in names
        if any(settings.get(name) != flat[0].get(name) for settings in flat)
    ]


def state(run: History) -> str:
    """The state with how far the run is: `interrupted 40/200`."""
    total = run.start.total_steps if run.start else None
    if run.state == "finished":
        return f"finished {run.step:,}"
    return f"{run.state} {run.step:,}/{total:,}" if total else run.state


def state_style(run: History) -> str:
    return {"finished": "green", "stopped early": "green", "running": "cyan"}.get(run.state, "yellow")


def begun(time: str | None) -> str:
    """A time of an event in the time zone of this machine."""
    try:
        return datetime.fromisoformat(time or "").astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return time or ""


def _lettered(runs: Sequence[History]) -> list[tuple[History, str, str]]:
    return [(run, chr(ord("A") + i % 26), COLOURS[i % len(COLOURS)]) for i, run in enumerate(runs)]


def _chosen(answers: Sequence[Sampled], best: int | None) -> list[Sampled]:
    """Those answers that show the way: all of a few, else the first, the best and the last."""
    if len(answers) <= 4:
        return list(answers)
    return [a for i, a in enumerate(answers) if i in (0, len(answers) - 1) or a.step == best]


def _value(value: Any) -> str:
    return "null" if value is None else str(value)
