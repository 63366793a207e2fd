"""`mlxsft runs`."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.cli.examples import examples

FOLDER = click.Path(path_type=Path)


class _ListsByDefault(click.Group):
    """`runs` and `runs FOLDER` are `runs list` and `runs list FOLDER`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_ListsByDefault)
def runs() -> None:
    """List runs, show what happened in one, compare several."""


@runs.command("list", epilog=examples("mlxsft runs  # every run: state, losses, time, size"))
@click.argument("folder", required=False, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a run, in a list.")
def list_(folder: Path | None, as_json: bool) -> None:
    """List the runs below FOLDER, by default ./runs where there is one, else the current folder."""
    import json

    from rich.console import Console

    from mlxsft.training.history import find_runs, read_run
    from mlxsft.training.run_text import print_list

    folder = folder or (Path("runs") if Path("runs").is_dir() else Path())
    found = [read_run(path) for path in find_runs(folder)]
    found.sort(key=lambda run: run.start.time if run.start else "")
    if as_json:
        click.echo(json.dumps([run.summary() for run in found], indent=2, ensure_ascii=False))
    elif found:
        print_list(found, folder, Console(highlight=False))
    else:
        click.echo(f"No runs below {folder.resolve()}.")


@runs.command(
    epilog=examples("""
    mlxsft runs show runs/mine --html mine.html  # curves in the terminal and as a page
    mlxsft runs show runs/mine runs/other  # laid over each other, and what differs
    """)
)
@click.argument("folders", metavar="RUN...", nargs=-1, required=True, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object; several runs as a list.")
@click.option("--html", type=FOLDER, help="Write a page with curves, samples and settings.")
@click.option("--force", is_flag=True, help="Overwrite the page.")
def show(folders: tuple[Path, ...], as_json: bool, html: Path | None, force: bool) -> None:
    """Draw the losses of RUN, say how it went and what it answered; several are laid over each other."""
    import json

    from rich.console import Console

    from mlxsft.outputs import refuse_existing
    from mlxsft.page import write_page
    from mlxsft.training.history import read_run
    from mlxsft.training.run_page import page
    from mlxsft.training.run_text import print_comparison, print_run

    if html is not None:
        refuse_existing(html, force=force)
    found = [read_run(folder) for folder in folders]
    if html is not None:
        write_page(page(found), html, force=force)
    if as_json:
        told = [run.to_dict() for run in found]
        click.echo(json.dumps(told if len(told) > 1 else told[0], indent=2, ensure_ascii=False))
    elif len(found) == 1:
        print_run(found[0], Console(highlight=False))
    else:
        print_comparison(found, Console(highlight=False))
