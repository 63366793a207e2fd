"""`mlxsft plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.training.plan import Forecast, PaperForecast
    from mlxsft.training.trial import Trial


@click.command(
    epilog=examples("""
    mlxsft plan recipe.yaml  # rows, tokens, steps, memory, time
    mlxsft plan recipe.yaml --changes  # what each change would save, measured
    mlxsft plan recipe.yaml --fit 8GB --out small.yaml  # the recipe that needs at most so much
    mlxsft plan recipe.yaml --for m2-16gb  # reckoned for a Mac, and marked so
    """)
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--fit", metavar="SIZE", help="Find the changes that make the run need at most so much memory: 8GB.")
@click.option("--out", type=click.Path(path_type=Path), help="With --fit: where the recipe that fits is written.")
@click.option("--changes", "try_changes", is_flag=True, help="Measure what each change would save.")
@click.option("--for", "machine", metavar="MAC", help="Reckon, on paper, for another machine: m2-16gb, m4-pro-24gb.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--force", is_flag=True, help="Overwrite the file at --out.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def plan(
    recipe: Path,
    overrides: tuple[str, ...],
    fit: str | None,
    out: Path | None,
    try_changes: bool,
    machine: str | None,
    backend: str,
    force: bool,
    as_json: bool,
) -> None:
    """Tell what training RECIPE takes, before it is started: rows, tokens, steps, memory and time.

    The largest micro-batch and typical ones are computed for real. Where the run does not fit in memory, each change
    that would help is measured too.
    """
    import json

    from mlxsft.errors import GateFailed
    from mlxsft.models.convert import parse_size
    from mlxsft.recipe import load_recipe
    from mlxsft.training.plan import changes_for, fitting, forecast, mac, no_changes, tried

    limit = parse_size(fit, "--fit") if fit else None
    if machine:
        mac(machine)  # a wrong name is told before anything is measured
    target = _target(recipe, out, force) if fit else None
    loaded = load_recipe(recipe, overrides)
    first = forecast(loaded, backend)
    paper = _paper(machine, first)
    if not as_json:
        _show(first, paper, limit)
    others: list[Forecast] = []

    def tell(found: Forecast) -> None:
        others.append(found)
        if not as_json:
            _show_change(found, _paper(machine, found), limit)

    assert first.counts is not None
    fitted = fitting(loaded, backend, first, limit, tell) if limit is not None else None
    without: list[str] = []
    if limit is None and (try_changes or not first.fits or (paper and not paper.fits)):
        for change in changes_for(loaded, first.counts):
            tell(tried(loaded, backend, [change], first.counts))
        without = no_changes(loaded, first.counts)
    if as_json:
        changes = [{**found.to_json(), "paper": _paper_json(_paper(machine, found))} for found in others]
        told: dict[str, Any] = {"forecast": first.to_json(), "changes": changes, "no_changes": without}
        told["paper"] = _paper_json(paper)
        told["fit"] = fitted.to_json() if fitted else None
        click.echo(json.dumps(told, indent=2))
    elif without:
        click.echo("\n".join(without))
    if target is not None and fitted is None:
        raise GateFailed(
            f"--fit {fit}: no change that is known here makes the run need so little",
            "Take a smaller base, or shorter rows.",
        )
    if target is not None and fitted is not None:
        _write(target, fitted)


def _paper(machine: str | None, found: Forecast) -> PaperForecast | None:
    from mlxsft.training.plan import on_paper

    return on_paper(machine, found.recipe, found.trial) if machine and found.trial else None


def _paper_json(paper: PaperForecast | None) -> dict[str, Any] | None:
    return {**vars(paper), "fits": paper.fits} if paper else None


def _write(target: Path, fitted: Forecast) -> None:
    """The recipe that fits; what has to be run before it stands in its head, and is told."""
    target.write_text(fitted.to_yaml(), encoding="utf-8")
    commands = " && ".join([*fitted.commands, f"mlxsft train {target} --out RUN"])
    click.echo(f"The recipe that fits is {target}: {commands}", err=True)


def _target(recipe: Path, out: Path | None, force: bool) -> Path:
    """Where the recipe that fits goes. Raises UsageError where something lies there."""
    from mlxsft.outputs import refuse_existing

    target = out or recipe.with_name(f"{recipe.stem}.fit.yaml")
    refuse_existing(target, force=force, instead="Name another file with --out")
    return target


def _show(found: Forecast, paper: PaperForecast | None, limit: int | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for name, value in _lines(found, paper, limit):
        console.print(Text.assemble((f"{name:22}", "bold"), value))


def _lines(found: Forecast, paper: PaperForecast | None, limit: int | None) -> list[tuple[str, str]]:
    """(what, value), for people."""
    from mlxsft.training.report import duration, ledger_text, size

    trial, counts = found.trial, found.counts
    assert counts is not None
    weighted = f"; {counts.rows:,} an epoch, by their weights" if counts.rows != counts.ledger["trained"] else ""
    lines = [
        ("rows", ledger_text(counts.ledger) + weighted),
        (
            "tokens an epoch",
            f"{counts.tokens:,}, {counts.trained_tokens:,} trained; padding {counts.padding_share:.1%}",
        ),
        ("steps", f"{counts.steps:,} in {counts.epochs:.3g} epochs{_trunk(trial)}"),
        ("largest micro-batch", f"{counts.largest[0]} rows of {counts.largest[1]} tokens"),
    ]
    if trial is None:
        return [*lines, ("memory", f"does NOT fit: {found.failure}")]
    kept = f", {size(trial.trunk_bytes)} for what is computed once" if trial.trunk_bytes else ""
    lines += [
        ("parameters", f"{trial.trainable_parameters:,} trained of {trial.parameters:,} ({trial.trainable_share:.2%})"),
        ("memory, measured", f"{size(trial.peak_bytes)} for arrays, {size(trial.process_bytes)} for the program{kept}"),
        *([("", f"{_fits(found.needed_bytes, limit)} of --fit")] if limit else []),
        ("", f"{_fits(trial.needed_bytes, trial.memory_bytes)} that are free on this machine"),
        ("time, forecast", f"{_time(trial)} ({trial.backend} on the {trial.device}): {_parts(trial)}"),
    ]
    if paper:
        if paper.seconds is not None:
            lines.append((paper.machine, f"on paper, not measured: {duration(paper.seconds)} for the updates"))
        fits = _fits(paper.needed_bytes, paper.memory_bytes)
        lines.append(("", f"on paper, not measured: {size(paper.needed_bytes)}, {fits} that its GPU may take"))
    return lines


def _fits(needed_bytes: float, limit: int) -> str:
    from mlxsft.training.report import size

    return f"{'fits' if needed_bytes <= limit else 'does NOT fit'} in the {size(limit)}"


def _trunk(trial: Trial | None) -> str:
    return f", the lower {trial.trunk_layers} layers computed once" if trial and trial.trunk_layers else ""


def _time(trial: Trial) -> str:
    """The whole run; with answers to prompts, that is a guess with a bound."""
    from mlxsft.training.report import duration

    if trial.most_answer_seconds == 0:
        return duration(trial.seconds)
    return f"{duration(trial.seconds)}, at most {duration(trial.most_seconds)}"


def _parts(trial: Trial) -> str:
    from mlxsft.training.report import duration

    parts = {
        "updates": duration(trial.train_seconds),
        "evaluations": duration(trial.eval_seconds),
        "checkpoints": duration(trial.save_seconds),
    }
    if trial.most_answer_seconds:
        usual, most = duration(trial.answer_seconds), duration(trial.most_answer_seconds)
        parts["answers"] = f"{usual} if they become as long as those of the rows, {most} if none ends by itself"
    before = f"; {duration(trial.seconds_before)} before the first step"
    return ", ".join(f"{name} {said}" for name, said in parts.items()) + before


def _show_change(found: Forecast, paper: PaperForecast | None, limit: int | None) -> None:
    """One change or several; whether the run then fits is about --fit, where that is given, else this machine."""
    from mlxsft.training.report import size

    names = " + ".join(change.name for change in found.changes)
    settings = " ".join(f"--set {k}={_yaml(v)}" for k, v in found.settings.items())
    first = "".join(f"    first: {command}\n" for command in found.commands)
    if found.trial is None:
        click.echo(f"{names}: {found.failure}\n    {settings}")
        return
    fits = _fits(found.needed_bytes, limit or found.trial.memory_bytes)
    told = f"{size(found.trial.needed_bytes)}, {fits}, {_time(found.trial)}"
    if paper:
        told += f"; {paper.machine}, on paper: {size(paper.needed_bytes)}, {'fits' if paper.fits else 'does NOT fit'}"
    click.echo(f"{names}: {told} ({found.changes[-1].price})\n{first}    {settings}")


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
