"""`mlxsft data check` and `mlxsft data split`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--model", required=True, help="A checkpoint: its tokenizer and template are used.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--template", help="Chat template: a built-in name or a Jinja file.")
@click.option("--valid", multiple=True, type=FILE, help="Validation rows that training must not contain.")
@click.option("--test", multiple=True, type=FILE, help="Test rows that training must not contain.")
@click.option("--format", "row_format", default="auto", show_default=True, help="Of the rows.")
@click.option("--max-tokens", type=click.IntRange(2), default=2048, show_default=True, help="Longest row.")
@click.option("--fill", multiple=True, metavar="NAME=VALUE", help="A value for {{NAME}} in the rows.")
@click.option("--fail-on", metavar="ID,ID", help="Exit with 6 where one of these findings is made.")
@click.option("--html", type=FILE, help="Write the report as a page.")
@click.option("--force", is_flag=True, help="Overwrite the page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ledger, lengths, profile, findings.")
def check(
    files: tuple[Path, ...],
    model: str,
    revision: str | None,
    template: str | None,
    valid: tuple[Path, ...],
    test: tuple[Path, ...],
    row_format: str,
    max_tokens: int,
    fill: tuple[str, ...],
    fail_on: str | None,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Say what is wrong with rows: account for each, measure them, find copies, leaks, personal data and more."""
    import json

    from rich.console import Console

    from mlxsft.cli.data import pair
    from mlxsft.data import audit_page, audit_text
    from mlxsft.data.audit import check as check_rows
    from mlxsft.data.render import load_renderer
    from mlxsft.models.source import open_model
    from mlxsft.page import refuse_existing, write_page
    from mlxsft.recipe import DataRecipe

    gate = _gate(fail_on)
    if html is not None:
        refuse_existing(html, force)
    settings = DataRecipe.model_validate(
        {
            "train": [str(f) for f in files],
            "max_tokens": max_tokens,
            "fill": dict(pair(f) for f in fill),
            "template": template,
        }
    )
    renderer = load_renderer(open_model(model, revision=revision), template)
    held_out = {name: paths for name, paths in (("valid", valid), ("test", test)) if paths}
    audit = check_rows(files, settings, renderer, held_out=held_out, format=row_format, watch=_watched("checking"))
    if html is not None:
        write_page(audit_page.page(audit, ", ".join(f.name for f in files)), html, force=force)
    if as_json:
        click.echo(json.dumps(audit.to_dict(), ensure_ascii=False, indent=2))
    else:
        audit_text.print_audit(audit, Console(highlight=False, soft_wrap=True))
    _close(gate, {f.id: f.count for f in audit.findings})


def _gate(fail_on: str | None) -> list[str]:
    """The named findings. Raises UsageError for one that does not exist."""
    from mlxsft.data.findings import KINDS
    from mlxsft.errors import UsageError

    names = [name.strip() for name in (fail_on or "").split(",") if name.strip()]
    if unknown := [name for name in names if name not in KINDS]:
        raise UsageError(f"--fail-on: got {unknown[0]!r}, which is no finding", f"Findings: {', '.join(KINDS)}.")
    return names


def _close(gate: list[str], counts: dict[str, int]) -> None:
    from mlxsft.errors import GateFailed

    if found := [f"{name} ({counts[name]:,})" for name in gate if counts.get(name)]:
        raise GateFailed(f"found: {', '.join(found)}", "The report says where and what to do.")


@click.command()
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--out", required=True, type=FILE, help="Folder for train.jsonl, valid.jsonl and test.jsonl.")
@click.option("--valid", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True, help="Share.")
@click.option("--test", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True, help="Share.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other rows.")
@click.option("--format", "row_format", default="auto", show_default=True, help="Of the rows.")
@click.option("--force", is_flag=True, help="Overwrite the files of an earlier split.")
@click.option("--json", "as_json", is_flag=True, help="The counts as one JSON object.")
def split(
    files: tuple[Path, ...],
    out: Path,
    valid: float,
    test: float,
    seed: int,
    row_format: str,
    force: bool,
    as_json: bool,
) -> None:
    """Split rows into training, validation and test files that share no question, each category in proportion."""
    import json

    from mlxsft.data.split import split_files

    if valid + test >= 1:
        raise click.BadParameter(f"{valid} + {test} leaves nothing to train on", param_hint="--valid and --test")
    made = split_files(
        files,
        out,
        valid=valid,
        test=test,
        seed=seed,
        format=row_format,
        force=force,
        watch=_watched("reading"),
    )
    if as_json:
        click.echo(json.dumps({"ledger": made.ledger, "groups": made.groups}))
        return
    read, *parts = made.ledger.items()
    click.echo(f"{read[1]:,} rows = " + " + ".join(f"{n:,} {name}" for name, n in parts))
    click.echo(f"{made.groups:,} groups of equal or nearly equal rows, each kept together")


def _watched(verb: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Passes rows through and shows their number and rate on stderr, where that is a terminal."""

    def watch(rows: Iterable[Any]) -> Iterator[Any]:
        import time

        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True)
        if not console.is_terminal:
            yield from rows
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(verb, total=None)
            begun = time.monotonic()
            for count, row in enumerate(rows, start=1):
                yield row
                if count % 100 == 0:
                    rate = count / (time.monotonic() - begun)
                    progress.update(task, description=f"{verb}: {count:,} rows, {rate:,.0f} a second")

    return watch
