"""`mlxsft plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mlxsft.training.plan import Forecast, PaperForecast

BACKENDS = click.Choice(["auto", "mlx", "torch"])


@click.command()
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
    from mlxsft.recipe import dump_recipe, load_recipe
    from mlxsft.training.plan import changes_for, fitting, forecast, on_paper

    limit = parse_size(fit, "--fit") if fit else None
    target = _target(recipe, out, force) if fit else None
    loaded = load_recipe(recipe, overrides)
    first = forecast(loaded, backend)
    paper = on_paper(machine, loaded, first.trial) if machine else None
    if not as_json:
        _show(first, paper)
    others: list[Forecast] = []

    def tell(found: Forecast) -> None:
        others.append(found)
        if not as_json:
            _show_change(found)

    fitted = fitting(loaded, backend, first, limit, tell) if limit is not None else None
    if limit is None and (try_changes or not first.trial.fits):
        for change in changes_for(loaded, first.trial):
            tell(forecast(loaded, backend, [change]))
    if as_json:
        told: dict[str, Any] = {"forecast": first.to_json(), "changes": [found.to_json() for found in others]}
        told["paper"] = {**vars(paper), "fits": paper.fits} if paper else None
        told["fit"] = fitted.to_json() if fitted else None
        click.echo(json.dumps(told, indent=2))
    if target is not None and fitted is None:
        raise GateFailed(
            f"--fit {fit}: no change that is known here makes the run need so little",
            "Take a smaller or a quantized base, or shorter rows.",
        )
    if target is not None and fitted is not None:
        target.write_text(dump_recipe(fitted.recipe), encoding="utf-8")
        click.echo(f"The recipe that fits is {target}: mlxsft train {target} --out RUN", err=True)


def _target(recipe: Path, out: Path | None, force: bool) -> Path:
    """Where the recipe that fits goes. Raises UsageError where something lies there."""
    from mlxsft.outputs import refuse_existing

    target = out or recipe.with_name(f"{recipe.stem}.fit.yaml")
    refuse_existing(target, force=force, instead="Name another file with --out")
    return target


def _show(found: Forecast, paper: PaperForecast | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for name, value in _lines(found, paper):
        console.print(Text.assemble((f"{name:22}", "bold"), value))


def _lines(found: Forecast, paper: PaperForecast | None) -> list[tuple[str, str]]:
    """(what, value), for people."""
    from mlxsft.training.report import duration, size

    trial = found.trial
    kept = f", the lower {trial.trunk_layers} layers computed once" if trial.trunk_layers else ""
    fits = "fits" if trial.fits else "does NOT fit"
    lines = [
        ("rows", f"{trial.rows:,} trained, {trial.valid_rows:,} held out"),
        ("tokens an epoch", f"{trial.tokens:,}, {trial.trained_tokens:,} trained; padding {trial.padding_share:.1%}"),
        ("steps", f"{trial.steps:,} in {trial.epochs:g} epochs{kept}"),
        ("parameters", f"{trial.trainable_parameters:,} trained of {trial.parameters:,} ({trial.trainable_share:.2%})"),
        ("largest micro-batch", f"{trial.largest[0]} rows of {trial.largest[1]} tokens"),
        ("memory, measured", f"{size(trial.peak_bytes)} for arrays, {size(trial.process_bytes)} for the program"),
        ("", f"{fits} in the {size(trial.memory_bytes)} that are free on this machine"),
        ("time, forecast", f"{duration(trial.seconds)} ({trial.backend} on the {trial.device}): {_parts(found)}"),
    ]
    if paper:
        fits = "fits" if paper.fits else "does NOT fit"
        lines.append((paper.machine, f"on paper, not measured: {duration(paper.seconds)} for the updates"))
        memory = f"on paper, not measured: {size(paper.needed_bytes)}, {fits}"
        lines.append(("", f"{memory} in the {size(paper.memory_bytes)} that its GPU may take"))
    return lines


def _parts(found: Forecast) -> str:
    from mlxsft.training.report import duration

    trial = found.trial
    parts = {
        "updates": trial.train_seconds,
        "evaluations": trial.eval_seconds,
        "checkpoints": trial.save_seconds,
    }
    before = f"; {duration(trial.seconds_before)} before the first step"
    return ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items()) + before


def _show_change(found: Forecast) -> None:
    from mlxsft.training.report import duration, size

    trial = found.trial
    names = " + ".join(change.name for change in found.changes)
    settings = " ".join(f"--set {k}={_yaml(v)}" for change in found.changes for k, v in change.settings.items())
    price = found.changes[-1].price
    click.echo(f"{names}: {size(trial.needed_bytes)}, {duration(trial.seconds)} ({price})\n    {settings}")


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
