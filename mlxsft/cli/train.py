"""`mlxsft train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mlxsft.training.checkpoints import RunFolder

BACKENDS = click.Choice(["auto", "mlx", "torch"])


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder to make.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint.")
@click.option("--force", is_flag=True, help="Delete the run that is in --out and begin anew.")
@click.option(
    "--allow-change",
    "allow_changes",
    multiple=True,
    metavar="NAME",
    help="With --resume: take the new value of this setting, or of base, template or data.",
)
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--json", "as_json", is_flag=True, help="Write the events as JSON lines to stdout.")
def train(
    recipe: Path,
    out: Path,
    overrides: tuple[str, ...],
    resume: bool,
    force: bool,
    allow_changes: tuple[str, ...],
    backend: str,
    as_json: bool,
) -> None:
    """Tune a model as RECIPE says, into the run folder --out.

    Ctrl-C finishes the step, saves, and says how to go on.
    """
    from mlxsft.errors import Interrupted, UsageError
    from mlxsft.interrupt import stop_requested
    from mlxsft.recipe import load_recipe
    from mlxsft.terminal import told
    from mlxsft.training.checkpoints import RunFolder
    from mlxsft.training.events import Finished
    from mlxsft.training.report import make_report
    from mlxsft.training.run import run_training

    if resume and force:
        raise UsageError(
            "--resume and --force exclude each other", "--resume goes on with the run, --force deletes it."
        )
    loaded = load_recipe(recipe, overrides)
    folder = RunFolder(out)
    resume = resume or (not force and wants_to_resume(folder))
    if allow_changes and not resume:
        raise UsageError("--allow-change is about a run that is resumed", "Add --resume.")
    said = "Stopping after this step, then saving. Once more stops at once."
    with stop_requested(said=said) as stop, make_report(as_json=as_json) as report:
        last = None
        for event in run_training(
            loaded,
            folder,
            backend_name=backend,
            resume=resume,
            force=force,
            stop=stop,
            tell=told,
            allow_changes=allow_changes,
        ):
            report.show(event)
            last = event
    if isinstance(last, Finished) and last.reason == "interrupted":
        go_on = shlex.join(["mlxsft", "train", str(folder.recipe), "--out", str(out), "--resume"])
        said = f"Stopped after step {last.step} of {last.total_steps}; it is saved."
        if last.step == 0:
            said = "Stopped before the first step; nothing is trained yet."
        raise Interrupted(said, f"Go on with: {go_on}", exit_code=stop.exit_code)
    if not as_json:
        chat = shlex.join(["mlxsft", "chat", loaded.model, "--adapter", str(out)])
        click.echo(f"The adapter is in {out}. Try it: {chat}", err=True)


def wants_to_resume(folder: RunFolder) -> bool:
    """Whether the person wants to go on with the unfinished run in the folder; asked in a terminal only.

    Raises UsageError where there is a run, and nobody to ask or nothing to ask for.
    """
    from mlxsft.errors import UsageError

    state = folder.state()
    if state is None:
        return False
    saved = f"step {state.step}" + f" of {state.total_steps}" * (state.total_steps is not None)
    if not state.finished and sys.stdin.isatty() and sys.stderr.isatty():
        if click.confirm(f"{folder.path}: {saved} is saved. Go on?", default=True, err=True):
            return True
        raise UsageError("The run is left as it is.", "--force begins anew and deletes it, another --out leaves it.")
    go_on = shlex.join(["mlxsft", "train", str(folder.recipe), "--out", str(folder.path), "--resume"])
    raise UsageError(
        f"{folder.path}: this folder holds a run already, {'finished' if state.finished else saved + ' is saved'}",
        f"To go on: {go_on}. --force begins anew and deletes it, another --out leaves it alone.",
    )
