"""`mlxsft data check` and `mlxsft data split`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli import rows
from mlxsft.cli.examples import examples
from mlxsft.cli.watching import watched

if TYPE_CHECKING:
    from mlxsft.data.sources import RowSource

FILE = click.Path(path_type=Path)


@click.command(
    epilog=examples("""
    mlxsft data check rows.jsonl --model Qwen/Qwen2.5-0.5B-Instruct  # copies, leaks, personal data: 21 findings
    mlxsft data check train.jsonl --test test.jsonl --model org/name --fail-on leakage,secrets --html a.html  # a gate
    """)
)
@rows.files
@rows.recipe_settings
@click.option("--valid", multiple=True, callback=rows.sources, help="Validation rows that training must not contain.")
@click.option("--test", multiple=True, callback=rows.sources, help="Test rows that training must not contain.")
@click.option("--fail-on", metavar="ID,ID", help="Exit with 6 where one of these findings is made.")
@click.option("--html", type=FILE, help="Write the report as a page.")
@click.option("--force", is_flag=True, help="Overwrite the page.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: ledger, lengths, profile, findings.")
def check(
    files: list[RowSource],
    model: str,
    revision: str | None,
    valid: list[RowSource],
    test: list[RowSource],
    fail_on: str | None,
    html: Path | None,
    force: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Say what is wrong with rows: account for each, measure them, find copies, leaks, personal data and more."""
    import json

    from rich.console import Console

    from mlxsft.data import audit_page, audit_text
    from mlxsft.data.audit import check as check_rows
    from mlxsft.data.render import load_renderer
    from mlxsft.data.sources import pin_sources
    from mlxsft.models.source import open_model
    from mlxsft.outputs import refuse_existing
    from mlxsft.page import write_page
    from mlxsft.terminal import told

    gate = _gate(fail_on)
    if html is not None:
        refuse_existing(html, force=force)
    recipe = rows.recipe_of(files, **settings)
    renderer = load_renderer(open_model(model, revision=revision, progress=told), recipe.template)
    held_out = {name: pin_sources(given, name, told) for name, given in (("valid", valid), ("test", test)) if given}
    audit = check_rows(
        pin_sources(files, "train", told), recipe, renderer, held_out=held_out, watch=watched("checking")
    )
    if html is not None:
        write_page(audit_page.page(audit, ", ".join(file.name for file in files)), html, force=force)
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


@click.command(
    epilog=examples("mlxsft data split rows.jsonl --out data --valid 0.1  # near-duplicates stay on one side")
)
@rows.files
@click.option("--out", required=True, type=FILE, help="Folder for train.jsonl, valid.jsonl and test.jsonl.")
@click.option("--valid", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True, help="Share.")
@click.option("--test", type=click.FloatRange(0, 1, max_open=True), default=0.05, show_default=True, help="Share.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other rows.")
@rows.row_format
@rows.columns
@click.option("--force", is_flag=True, help="Overwrite the files of an earlier split.")
@click.option("--json", "as_json", is_flag=True, help="The counts as one JSON object.")
def split(
    files: list[RowSource],
    out: Path,
    valid: float,
    test: float,
    seed: int,
    row_format: str,
    columns: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Split rows into training, validation and test files that share no question, each category in proportion."""
    import json

    from mlxsft.data.sources import pin_sources
    from mlxsft.data.split import split_files
    from mlxsft.terminal import told

    if valid + test >= 1:
        raise click.BadParameter(f"{valid} + {test} leaves nothing to train on", param_hint="--valid and --test")
    made = split_files(
        pin_sources(files, "train", told),
        out,
        valid=valid,
        test=test,
        seed=seed,
        format=row_format,
        columns=rows.named_columns(columns),
        force=force,
        watch=watched("reading"),
    )
    if as_json:
        click.echo(json.dumps({"ledger": made.ledger, "groups": made.groups}))
        return
    read, *parts = made.ledger.items()
    click.echo(f"{read[1]:,} rows = " + " + ".join(f"{n:,} {name}" for name, n in parts))
    click.echo(f"{made.groups:,} groups of equal or nearly equal rows, each kept together")
