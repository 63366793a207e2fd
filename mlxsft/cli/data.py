"""`mlxsft data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli import rows
from mlxsft.cli.data_check import check, split
from mlxsft.cli.examples import examples

if TYPE_CHECKING:
    from mlxsft.data.sources import RowSource


@click.group()
def data() -> None:
    """Look at rows before they are trained.

    FILES are files of rows, folders with a train file, or rows of the Hub: hf://ORG/NAME:SPLIT.
    """


data.add_command(check)
data.add_command(split)


@data.command(
    epilog=examples("""
    mlxsft data show rows.jsonl --model Qwen/Qwen2.5-0.5B-Instruct -n 3  # which tokens are trained, marked
    mlxsft data show "hf://tatsu-lab/alpaca:train[:500]" --model org/name  # every command takes data sets of the Hub
    """)
)
@rows.files
@rows.recipe_settings
@click.option("-n", "count", type=click.IntRange(1), default=3, show_default=True, help="How many rows.")
@click.option("--templates", help="Phrasings of the questions: a built-in name or a file, as data.templates takes it.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another seed, other phrasings.")
@click.option("--plain", is_flag=True, help="Mark trained tokens with [brackets] rather than colour.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row: tokens, ids, mask.")
def show(
    files: list[RowSource],
    model: str,
    revision: str | None,
    count: int,
    templates: str | None,
    seed: int,
    plain: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show the tokens of the first rows, the trained ones marked, and whether chat will send the same prompt."""
    from mlxsft.data.render import load_renderer
    from mlxsft.data.show import shown_rows
    from mlxsft.data.sources import pin_sources
    from mlxsft.models.source import open_model
    from mlxsft.terminal import colours_wanted, told

    recipe = rows.recipe_of(files, templates=templates, **settings)
    renderer = load_renderer(open_model(model, revision=revision, progress=told), recipe.template)
    for note in renderer.notes:
        told(f"note: {note}")
    for shown in shown_rows(pin_sources(files, "train", told), recipe, renderer, count, seed=seed):
        click.echo(shown.to_json() if as_json else shown.to_text(plain=plain or not colours_wanted()))


@data.command(
    epilog=examples(
        "mlxsft data convert rows.csv --columns prompt=Frage,response=Antwort --out rows.jsonl  # as OpenAI messages"
    )
)
@rows.files
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JSONL file to write.")
@rows.row_format
@rows.columns
@click.option("--skip-broken", is_flag=True, help="Leave broken rows out rather than write nothing.")
@click.option("--force", is_flag=True, help="Replace the file of --out where it exists.")
@click.option("--json", "as_json", is_flag=True, help="What became of the rows as one JSON object.")
def convert(
    files: list[RowSource],
    out: Path,
    row_format: str,
    columns: tuple[str, ...],
    skip_broken: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write rows of any layout as OpenAI messages, one JSON object a line."""
    import json

    from mlxsft.data.convert import convert_files
    from mlxsft.data.sources import pin_sources
    from mlxsft.terminal import told

    ledger, left_out = convert_files(
        pin_sources(files, "train", told),
        out,
        format=row_format,
        columns=rows.named_columns(columns),
        force=force,
        skip_broken=skip_broken,
    )
    for row in left_out[:20]:
        click.echo(f"left out: {row}", err=True)
    if len(left_out) > 20:
        click.echo(f"and {len(left_out) - 20} more", err=True)
    counts = ", ".join(f"{count:,} {what}" for what, count in ledger.items())
    click.echo(json.dumps({"out": str(out), "ledger": ledger}) if as_json else f"{out}: {counts}")
