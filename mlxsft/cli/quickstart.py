"""`mlxsft quickstart`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.quickstart.trial import Judged, Score
    from mlxsft.recipe import Recipe


@click.command(
    epilog=examples("""
    mlxsft quickstart  # offline: a base that ships, before and after
    mlxsft quickstart --backend torch --json  # with PyTorch, and for a script
    """)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/quickstart"),
    show_default=True,
    help="The run folder to make.",
)
@click.option("--force", is_flag=True, help="Delete the run that is in --out and begin anew.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option(
    "--judged", type=click.IntRange(1, 560), default=70, show_default=True, help="How many answers are judged."
)
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object with scores and answers.")
def quickstart(out: Path, force: bool, backend: str, overrides: tuple[str, ...], judged: int, as_json: bool) -> None:
    """Tune a small base model that ships with mlxsft, and show its answers before and after; no network is used.

    The base, of two million parameters, has read about the products of a small shop, and follows no instructions.
    1,000 requests and answers about two thirds of the products teach it to. It is judged on the others.
    """
    import json
    import shlex
    import time

    from mlxsft.errors import UsageError
    from mlxsft.quickstart.pairs import judged_pairs
    from mlxsft.quickstart.trial import BASE, RECIPE, by_task
    from mlxsft.recipe import load_recipe
    from mlxsft.terminal import told
    from mlxsft.training.checkpoints import RunFolder

    began = time.monotonic()
    recipe = load_recipe(RECIPE, overrides)
    if RunFolder(out).begun and not force:
        raise UsageError(
            f"{out}: this folder holds a run already",
            "--force begins anew and deletes it, another --out leaves it alone.",
        )
    pairs = judged_pairs(judged)
    told(f"The base answers {judged} requests about products that occur in no pair.")
    before = _answered(lambda: _answers(pairs, None, backend), "base answers", judged)
    _tune(recipe, out, backend, force)
    told("The tuned model answers the same requests.")
    after = _answered(lambda: _answers(pairs, out, backend), "tuned answers", judged)
    seconds = time.monotonic() - began
    chat = shlex.join(["mlxsft", "chat", str(BASE), "--adapter", str(out)])
    if as_json:
        click.echo(json.dumps(_as_json(before, after) | {"run": str(out), "seconds": round(seconds, 1), "chat": chat}))
        return
    _show(before, after, by_task(before), by_task(after))
    click.echo(f"\n{seconds:.0f} s in all. The run is in {out}. Chat with it:\n  {chat}")


def _answers(pairs: Sequence[Any], adapter: Path | None, backend: str) -> Any:
    from mlxsft.quickstart.trial import answered

    return answered(pairs, adapter, backend)


def _answered(answers: Callable[[], Any], verb: str, count: int) -> list[Judged]:
    from mlxsft.cli.bytes_bar import bytes_and_steps

    with bytes_and_steps(verb) as (_, watch):
        return list(watch(answers(), verb, count))


def _tune(recipe: Recipe, out: Path, backend: str, force: bool) -> None:
    """The run, shown as `mlxsft train` shows it. Raises Interrupted where it was stopped."""
    from mlxsft.errors import Interrupted
    from mlxsft.interrupt import stop_requested
    from mlxsft.terminal import told
    from mlxsft.training.checkpoints import RunFolder
    from mlxsft.training.events import Finished
    from mlxsft.training.report import make_report
    from mlxsft.training.run import run_training
    from mlxsft.training.supervisor import resume_command

    said = "Stopping after this step, then saving. Once more stops at once."
    last = None
    with stop_requested(said=said) as stop, make_report(as_json=False) as report:
        events = run_training(
            recipe, RunFolder(out), backend_name=backend, resume=False, force=force, stop=stop, tell=told
        )
        for last in events:
            report.show(last)
    if isinstance(last, Finished) and last.reason == "interrupted":
        options = ["--backend", backend] if backend != "auto" else []
        raise Interrupted(
            f"Stopped after step {last.step} of {last.total_steps}; it is saved.",
            f"Go on with: {resume_command(out, options=options)}",
            exit_code=stop.exit_code,
        )


def _as_json(before: Sequence[Judged], after: Sequence[Judged]) -> dict[str, Any]:
    from dataclasses import asdict

    from mlxsft.quickstart.trial import by_task

    told = {
        name: {task: asdict(score) for task, score in by_task(judged).items()}
        for name, judged in (("base", before), ("tuned", after))
    }
    answers = [
        {"task": b.pair.task, "prompt": b.pair.prompt, "right": b.pair.answer, "base": b.answer, "tuned": t.answer}
        for b, t in zip(before, after, strict=True)
    ]
    return {**told, "answers": answers}


def _show(
    before: Sequence[Judged], after: Sequence[Judged], base: Mapping[str, Score], tuned: Mapping[str, Score]
) -> None:
    """One answer of each task side by side, and how many answers are right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mlxsft.terminal import printable
    from mlxsft.training.report import glance

    console = Console(highlight=False)
    sides = Table(title="Products that occur in no pair", show_lines=True)
    for column in ("asked", "base", "tuned"):
        sides.add_column(column, ratio=1)
    shown: dict[str, tuple[Judged, Judged]] = {}
    for one, other in zip(before, after, strict=True):
        shown.setdefault(one.pair.task, (one, other))
    for one, other in shown.values():
        sides.add_row(*(Text(printable(glance(text))) for text in (one.pair.prompt, one.answer, other.answer)))
    console.print(sides)
    count = base["all"].judged
    scores = Table(title=f"Right by exact checks, of {count} answers, before → after")
    scores.add_column("task")
    for column in ("judged", "facts", "form", "ends by itself", "all three"):
        scores.add_column(column, justify="right")
    for task, was in base.items():
        now = tuned[task]
        pairs = ((was.facts, now.facts), (was.form, now.form), (was.ends, now.ends), (was.good, now.good))
        scores.add_row(task, str(was.judged), *(f"{a / was.judged:.0%} → {b / was.judged:.0%}" for a, b in pairs))
    console.print(scores)
