"""`mlxsft adapters`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mlxsft.cli.examples import examples

FOLDER = click.Path(path_type=Path)
METHODS = click.Choice(["cat", "linear", "ties", "dare", "dare-ties"])
STRONGEST = 5  # modules that `show` names


@click.group()
def adapters() -> None:
    """List adapters, show what one is, compare two, merge several."""


@adapters.command("list", epilog=examples("mlxsft adapters list runs adapters  # what is there, in either layout"))
@click.argument("folders", metavar="[FOLDER]...", nargs=-1, type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="One JSON object an adapter, in a list.")
def list_(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the adapters in and below each FOLDER, by default the current one: mlx-lm's layout and PEFT's."""
    import json

    from mlxsft.models.adapter_facts import find_adapters, listing
    from mlxsft.terminal import one_line

    found = [listing(path) for folder in folders or (Path(),) for path in find_adapters(folder)]
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for adapter in found:
        click.echo(one_line(_line(adapter)))
    if not found:
        click.echo(f"No adapters below {', '.join(str(f.resolve()) for f in folders or (Path(),))}.")


@adapters.command(
    epilog=examples("mlxsft adapters show runs/mine --model org/base  # what it was trained on, where it changes most")
)
@click.argument("adapter", type=FOLDER)
@click.option("--model", help="The base, a folder or a Hub id, to check the passport against.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object, each module's strength included.")
def show(adapter: Path, model: str | None, revision: str | None, as_json: bool) -> None:
    """Say what ADAPTER is: kind, modules, what it was trained on and with, and where it changes the model most."""
    import json

    from mlxsft.models.adapter_facts import shown
    from mlxsft.models.source import open_model
    from mlxsft.terminal import one_line, told

    source = open_model(model, revision=revision, progress=told) if model else None
    found = shown(adapter, source)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for line in _description(found):
        click.echo(one_line(line))
    for note in found["notes"]:
        told(f"note: {note}")


@adapters.command(epilog=examples("mlxsft adapters diff runs/mine runs/other  # settings, modules, distance"))
@click.argument("one", type=FOLDER)
@click.argument("other", type=FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object.")
def diff(one: Path, other: Path, as_json: bool) -> None:
    """Say how two adapters differ: settings, modules, and how far apart what they add to the model is."""
    import json

    from mlxsft.models.adapter_facts import difference
    from mlxsft.terminal import one_line

    found = difference(one, other)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for name, (before, after) in found["settings"].items():
        click.echo(
            one_line(f"{name}: {json.dumps(before, ensure_ascii=False)} → {json.dumps(after, ensure_ascii=False)}")
        )
    for folder, only in ((one, found["only_in_first"]), (other, found["only_in_second"])):
        for module in only:
            click.echo(one_line(f"only in {folder}: {module}"))
    if found["same_tensors"]:
        click.echo("the tensors are the same, to the last bit")
    elif found["distance"] is not None and found["similarity"] is not None:
        click.echo(
            f"{found['modules_of_both']} modules of both: distance {found['distance']:.4f} of the first's strength, "
            f"similarity {found['similarity']:.4f}"
        )


@adapters.command(
    "merge",
    epilog=examples(
        "mlxsft adapters merge runs/mine runs/other --out both --weights 0.7,0.3 --method ties  # of one base"
    ),
)
@click.argument("folders", metavar="ADAPTER...", nargs=-1, required=True, type=FOLDER)
@click.option("--out", required=True, type=FOLDER, help="The folder of the merged adapter.")
@click.option(
    "--method", type=METHODS, default="cat", show_default=True, help="cat is exact; the others keep the rank."
)
@click.option("--weights", metavar="W,W,...", help="What each adapter is multiplied by.  [default: 1 each]")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="What ties, dare keep.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of what dare keeps.")
@click.option("--force", is_flag=True, help="Replace the adapter in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Write the summary as one JSON object.")
def merge_(
    folders: tuple[Path, ...],
    out: Path,
    method: str,
    weights: str | None,
    density: float,
    seed: int,
    force: bool,
    as_json: bool,
) -> None:
    """Merge adapters of one base into one.

    cat: exactly the weighted sum of what each adds; the ranks add up. linear: the matrices' weighted sums, in the rank
    of one, a rough approximation. ties: of the largest numbers those of the majority's sign. dare: a random share of
    the numbers, the rest made larger; dare-ties: both.
    """
    from mlxsft.cli.export import show as show_written
    from mlxsft.errors import UsageError
    from mlxsft.models.merge import merge

    source = click.get_current_context().get_parameter_source
    for name, methods in (("density", ("ties", "dare", "dare-ties")), ("seed", ("dare", "dare-ties"))):
        if method not in methods and source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name}: does nothing with {method}", f"It is for {', '.join(methods)}.")
    factors = _weights(weights)
    merged = merge(folders, out, method=method, weights=factors, density=density, seed=seed, force=force)
    show_written(merged, as_json)


def _weights(text: str | None) -> list[float] | None:
    import math

    from mlxsft.errors import UsageError

    if text is None:
        return None
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError(f"--weights: {text!r} is no list of numbers", "Write them as 0.7,0.3.")
    return found


def _first(adapter: dict[str, Any]) -> str:
    """The first thing that is wrong with it; its folder stands before it in the list."""
    said = " ".join(adapter["problem"].splitlines()[:2]).removeprefix(f"{adapter['folder']}: ")
    return " ".join(said.split())


def _line(adapter: dict[str, Any]) -> str:
    """An adapter in a list."""
    if "problem" in adapter and "kind" not in adapter:
        return f"{adapter['folder']}  cannot be used: {_first(adapter)}"
    base = f"for {adapter['base']}" if adapter.get("base") else "base unknown"
    size = f", {adapter['modules']} modules, {adapter['parameters']:,} numbers" if "modules" in adapter else ""
    layout = " in PEFT's layout" if adapter["layout"] == "peft" else ""
    problem = f"; {adapter['problem']}" if "problem" in adapter else ""
    rank = f" of rank {adapter['rank']}" if adapter.get("rank") else ""
    return f"{adapter['folder']}  {adapter['kind']}{rank}{size}, {base}{layout}{problem}"


def _description(found: dict[str, Any]) -> list[str]:
    """An adapter, a line each for what there is to say."""
    passport, layers = found["passport"] or {}, found["layers"]
    where = f"layers {layers[0]} to {layers[-1]}" if layers else "outside the layers"
    commit = f" at {found['commit'][:12]}" if isinstance(found["commit"], str) else ""
    lines = [_line({**found, "layout": "mlx-lm"}), f"targets    {', '.join(found['targets'])}; {where}"]
    if found["scale"] is not None:
        lines.append(f"scale      {found['scale']:g}")
    if found["base"]:
        lines.append(f"base       {found['base']}{commit}")
    data = passport.get("data")
    lines += [f"data       {name} {str(sha)[:12]}" for name, sha in data.items()] if isinstance(data, dict) else []
    template = passport.get("template")
    if isinstance(template, dict) and template.get("name"):
        lines.append(f"template   {template['name']}")
    strongest = list(found["strengths"].items())[:STRONGEST]
    lines += [f"strongest  {path} {strength:.4g}" for path, strength in strongest]
    return lines
