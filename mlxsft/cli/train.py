"""`mlxsft train`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

BACKENDS = click.Choice(["auto", "mlx"])


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run folder to make.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest checkpoint.")
@click.option("--force", is_flag=True, help="Delete the run that is in --out and begin anew.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--json", "as_json", is_flag=True, help="Write the events as JSON lines to stdout.")
def train(
    recipe: Path, out: Path, overrides: tuple[str, ...], resume: bool, force: bool, backend: str, as_json: bool
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
    said = "Stopping after this step, then saving. Once more stops at once."
    with stop_requested(said=said) as stop, make_report(as_json=as_json) as report:
        last = None
        for event in run_training(
            loaded, folder, backend_name=backend, resume=resume, force=force, stop=stop, tell=told
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
