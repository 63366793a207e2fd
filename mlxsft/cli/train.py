"""`mlxsft train`."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxsft.cli.examples import examples

if TYPE_CHECKING:
    from mlxsft.training.checkpoints import RunFolder

BACKENDS = click.Choice(["auto", "mlx", "torch"])


@click.command(
    epilog=examples("""
    mlxsft train recipe.yaml --out runs/mine  # Ctrl-C saves; --resume goes on
    mlxsft train recipe.yaml --out runs/mine --resume  # from the newest whole checkpoint
    mlxsft train recipe.yaml --out runs/mine --ranks 2  # processes on this machine
    mlxsft train recipe.yaml --out runs/mine --hosts hosts.json  # mlx.launch's file, a rank on each host
    mlx.launch --hostfile hosts.json -- mlxsft train recipe.yaml --out runs/mine  # or started by it
    """)
)
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
@click.option(
    "--on-battery",
    type=click.Choice(["go-on", "pause"]),
    default="go-on",
    show_default=True,
    help="Whether steps wait while the machine is not plugged in.",
)
@click.option(
    "--restarts",
    type=click.IntRange(0, 3),
    default=3,
    show_default=True,
    help="How often training that died goes on from its last checkpoint by itself.",
)
@click.option("--ranks", type=click.IntRange(1), help="Processes on this machine that share the rows of every update.")
@click.option("--hosts", type=click.Path(path_type=Path), help="mlx.launch's hosts.json: one rank on each host.")
@click.option("--json", "as_json", is_flag=True, help="Write the events as JSON lines to stdout.")
def train(
    recipe: Path,
    out: Path,
    overrides: tuple[str, ...],
    resume: bool,
    force: bool,
    allow_changes: tuple[str, ...],
    backend: str,
    on_battery: str,
    restarts: int,
    ranks: int | None,
    hosts: Path | None,
    as_json: bool,
) -> None:
    """Tune a model as RECIPE says, into the run folder --out.

    Ctrl-C finishes the step, saves, and says how to go on. A training process that dies, because memory runs out or
    for another reason, is started again from the last checkpoint; where smaller pieces help, with half of
    train.micro_batch_tokens, which leaves the result as it is.

    With --ranks or --hosts, or under mlx.launch, several processes train one model: each computes its share of the rows
    of every update. Where one of them dies, all are started again.
    """
    from mlxsft.backends import launched_rank
    from mlxsft.errors import Interrupted, UsageError
    from mlxsft.interrupt import stop_requested
    from mlxsft.recipe import load_recipe
    from mlxsft.terminal import told
    from mlxsft.training.checkpoints import RunFolder
    from mlxsft.training.events import Finished
    from mlxsft.training.hosts import launcher, local_hosts, read_hosts
    from mlxsft.training.power import awake, awake_command
    from mlxsft.training.report import make_report
    from mlxsft.training.supervisor import Supervisor, resume_command
    from mlxsft.training.worker import Job

    if resume and force:
        raise UsageError(
            "--resume and --force exclude each other", "--resume goes on with the run, --force deletes it."
        )
    rank = launched_rank()  # of this process, where somebody else starts the ranks
    if (rank is not None) + (ranks is not None) + (hosts is not None) > 1:
        raise UsageError(
            "the ranks are given twice", "Give one of --ranks and --hosts, and neither under mlx.launch or mpirun."
        )
    loaded = load_recipe(recipe, overrides)
    again = options_again(backend, on_battery, ranks, hosts)
    resume = resume or (not force and wants_to_resume(RunFolder(out), again))
    if allow_changes and not resume:
        raise UsageError("--allow-change is about a run that is resumed", "Add --resume.")
    job = Job(loaded, out, backend, resume, force, allow_changes, "pause" if on_battery == "pause" else "go-on")
    starting = launcher(*(read_hosts(hosts) if hosts else (local_hosts(ranks or 1), {})))
    if rank is not None:
        restarts = 0  # the others would not be started again
    go_on = resume_command(out, options=again)
    said = "Stopping after this step, then saving. Once more stops at once."
    with (
        stop_requested(said=said) as stop,
        make_report(as_json=as_json) as report,
        awake(awake_command(sys.platform, os.getpid())),
        starting as launches,
    ):
        last = None
        supervisor = Supervisor(job, launches, restarts=restarts, stop=stop, tell=told, options=again)
        try:
            with closing(supervisor.events()) as events:
                for event in events:
                    if not rank:
                        report.show(event)
                    last = event
        except KeyboardInterrupt:
            said = "Stopped at once; what was trained since the last checkpoint is lost."
            raise Interrupted(said, f"Go on with: {go_on}" if RunFolder(out).begun else None) from None
    if isinstance(last, Finished) and last.reason == "interrupted":
        said = f"Stopped after step {last.step} of {last.total_steps}; it is saved."
        if last.step == 0:
            said = "Stopped before the first step; nothing is trained yet."
        exit_code = stop.exit_code if stop() else 143  # the worker alone was told to
        raise Interrupted(said, f"Go on with: {go_on}", exit_code=exit_code)
    if not as_json and not rank:
        chat = shlex.join(["mlxsft", "chat", loaded.model, "--adapter", str(out)])
        click.echo(f"The adapter is in {out}. Try it: {chat}", err=True)


def options_again(backend: str, on_battery: str, ranks: int | None, hosts: Path | None) -> list[str]:
    """The options of a run that the command which goes on with it needs: they are in no recipe."""
    return [
        *(["--backend", backend] if backend != "auto" else []),
        *(["--on-battery", on_battery] if on_battery != "go-on" else []),
        *(["--hosts", str(hosts)] if hosts else ["--ranks", str(ranks)] if ranks else []),
    ]


def wants_to_resume(folder: RunFolder, options: list[str]) -> bool:
    """Whether the person wants to go on with the unfinished run in the folder; asked in a terminal only.

    Raises UsageError where there is a run, and nobody to ask or nothing to ask for; it says the command that goes on,
    with these options.
    """
    from mlxsft.errors import UsageError
    from mlxsft.training.supervisor import resume_command

    state = folder.state()
    if state is None:
        return False
    folder.refuse_busy()
    if not state.finished and sys.stdin.isatty() and sys.stderr.isatty():
        if click.confirm(f"{folder.path} holds a run: {state.sentence}. Go on?", default=True, err=True):
            return True
        raise UsageError("The run is left as it is.", "--force begins anew and deletes it, another --out leaves it.")
    raise UsageError(
        f"{folder.path}: this folder holds a run already; {state.sentence}",
        f"To go on: {resume_command(folder.path, options=options)}. --force begins anew and deletes it, another --out "
        "leaves it alone.",
    )
