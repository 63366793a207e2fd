"""`mlxsft recipes`: those that ship, and looking at recipes, checking them, bringing in those of mlx-lm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxsft.cli.examples import examples
from mlxsft.errors import UsageError

if TYPE_CHECKING:
    from mlxsft.recipe import Recipe


@click.group()
def recipes() -> None:
    """List and copy the recipes that ship, look at recipes and check them."""


@recipes.command("list", epilog=examples("mlxsft recipes list  # those that ship, and what each needs"))
@click.option("--json", "as_json", is_flag=True, help="One JSON object a recipe, in a list.")
def list_(as_json: bool) -> None:
    """List the recipes that ship: what for, the model that is tuned, what it needs. Each is a file to begin from."""
    import json

    from mlxsft.recipe_shipped import shipped

    found = [{"name": r.name, "purpose": r.purpose, "base": r.base, "needs": r.needs} for r in shipped()]
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for recipe in found:
        click.secho(recipe["name"], bold=True)
        for what in ("purpose", "base", "needs"):
            click.echo(f"    {recipe[what]}")
    click.echo("mlxsft recipes copy NAME takes one to begin from.", err=True)


@recipes.command(
    epilog=examples("mlxsft recipes copy customer-support  # here, with its rules for eval; says what comes next")
)
@click.argument("name")
@click.argument("dest", required=False, default=".", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace files that exist.")
def copy(name: str, dest: Path, force: bool) -> None:
    """Copy the recipe NAME, with what belongs to it, to the file or into the folder DEST: by default the current one.

    Its header says which rows it takes and which commands to give.
    """
    from mlxsft.recipe import load_recipe
    from mlxsft.recipe_shipped import copy as copy_recipe
    from mlxsft.recipe_shipped import find, next_command
    from mlxsft.terminal import told

    recipe = find(name)
    copied = copy_recipe(recipe, dest, force=force)
    for path in copied:
        click.echo(path)
    for missing in _missing_rows(load_recipe(copied[0])):
        told(f"Its rows are yours: write {missing} in the layout that the header of {copied[0]} shows.")
    told(f"Next: {next_command(recipe, copied[0])}")


def _missing_rows(recipe: Recipe) -> list[str]:
    """The files of rows that a recipe names and that are not there."""
    from mlxsft.data.sources import sources_of

    sources = sources_of(recipe.data)["train"]
    return [
        click.format_filename(os.path.relpath(source.rows))
        for source in sources
        if isinstance(source.rows, Path) and not source.rows.exists()
    ]


@recipes.command(epilog=examples("mlxsft recipes schema > recipe.schema.json  # for editors"))
def schema() -> None:
    """Print the JSON Schema of a recipe: every setting, its meaning and its default."""
    import json

    from mlxsft.recipe import recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


@recipes.command(
    epilog=examples("mlxsft recipes show recipe.yaml --set train.learning_rate=1e-4  # every setting, resolved")
)
@click.argument("file", metavar="RECIPE", type=click.Path(path_type=Path))
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting; may be repeated.")
def show(file: Path, overrides: tuple[str, ...]) -> None:
    """Check a recipe and print it resolved: every setting with its value, paths absolute."""
    from mlxsft.recipe import dump_recipe, load_recipe

    click.echo(dump_recipe(load_recipe(file, overrides)), nl=False)


@recipes.command(
    "import",
    epilog=examples("mlxsft recipes import lora_config.yaml --out recipe.yaml  # from mlx-lm's own configuration"),
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--out", metavar="RECIPE", type=click.Path(path_type=Path), help="Write to this file, not to stdout.")
@click.option("--force", is_flag=True, help="Replace the file of --out where it exists.")
def import_(file: Path, out: Path | None, force: bool) -> None:
    """Turn mlx-lm's lora_config.yaml into a recipe; what differs is noted on stderr.

    Relative paths in FILE count from the current folder, as they do for mlx_lm.lora.
    """
    from mlxsft.recipe_import import import_mlx_lm

    text, notes = import_mlx_lm(file)
    if out is None:
        click.echo(text, nl=False)
    else:
        _write(out, text, force)
    for note in notes:
        click.echo(note, err=True)


def _write(out: Path, text: str, force: bool) -> None:
    from mlxsft.outputs import refuse_existing

    refuse_existing(out, force=force)
    try:
        out.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}") from None
