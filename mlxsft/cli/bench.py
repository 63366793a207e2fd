"""`mlxsft bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.bench.result import Result
    from mlxsft.models.source import ModelSource


@click.command(
    epilog=examples("""
    mlxsft bench  # how fast this machine is; a base that ships, offline
    mlxsft bench Qwen/Qwen2.5-0.5B-Instruct --json > mine.json  # or any model, quantized or not
    mlxsft bench --compare mine.json yours.json  # side by side; --markdown for a table
    """)
)
@click.argument("names", metavar="[MODEL]", nargs=-1)
@click.option("--compare", is_flag=True, help="Lay results side by side: name files that --json wrote, not a MODEL.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option("--repetitions", type=click.IntRange(1, 100), default=3, show_default=True, help="Of everything timed.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object; with --compare, a list.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Write a table in Markdown.")
@click.pass_context
def bench(
    context: click.Context,
    names: tuple[str, ...],
    compare: bool,
    revision: str | None,
    repetitions: int,
    backend: str,
    as_json: bool,
    as_markdown: bool,
) -> None:
    """Say how fast this machine tunes MODEL and answers with it, and how much memory that takes.

    MODEL is a folder or a Hub id; without it, a base of two million parameters that ships with mlxsft. The figure to
    compare is tuning, in tokens a second.

    Protocol 1 is the same everywhere. Tuning: updates of 8 rows of 128 tokens, the last 64 of each trained; LoRA of
    rank 16 on all linear modules of all layers; AdamW. Answering: a prompt of 512 tokens is read, then 128 tokens are
    generated. The token ids are random, from a seed. Each of the two has a process of its own; the first repetition is
    not timed, and the figures are medians of the others, with the lowest and highest in brackets. Memory is the most
    that arrays took, loading included; with PyTorch, that the process grew by.

    JSON and tables name the machine's parts, and no host, user or path.
    """
    import json

    from mlxsft.bench.result import markdown, read_result
    from mlxsft.errors import UsageError

    if as_json and as_markdown:
        raise UsageError("--json and --markdown are both given", "Give one of them.")
    if compare:
        _refuse_options(context, "revision", "repetitions", "backend")
        if not names:
            raise UsageError("--compare: no file is named", "Name files that `mlxsft bench MODEL --json` wrote.")
        results = [read_result(Path(name)) for name in names]
    else:
        results = [_measured(names, revision, backend, repetitions)]
    if as_json:
        told: Any = [result.model_dump() for result in results]
        click.echo(json.dumps(told if compare else told[0], indent=2, ensure_ascii=False))
    elif as_markdown:
        click.echo(markdown(results))
    else:
        _show(results)


def _refuse_options(context: click.Context, *names: str) -> None:
    """Raise UsageError for one of these that is given, and would do nothing."""
    from click.core import ParameterSource

    from mlxsft.errors import UsageError

    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise UsageError(f"--{name} is about measuring, and --compare measures nothing", "Leave it out.")


def _measured(names: Sequence[str], revision: str | None, backend: str, repetitions: int) -> Result:
    """The protocol on the one model that is named, or on the base that ships."""
    import time

    from mlxsft.bench.measure import refuse_few_positions
    from mlxsft.bench.result import Result
    from mlxsft.errors import UsageError
    from mlxsft.models.sizes import refuse_beyond_memory
    from mlxsft.models.source import open_model
    from mlxsft.quickstart.trial import BASE
    from mlxsft.terminal import told

    if len(names) > 1:
        raise UsageError(
            f"{len(names)} models are named, and one is measured at a time",
            "To lay results side by side, add --compare and name their JSON files.",
        )
    began = time.monotonic()
    source = open_model(names[0] if names else str(BASE), revision=revision, progress=told)
    refuse_beyond_memory(source.name, source.weight_bytes)
    refuse_few_positions(source)
    tuning = _last("tuning", source, backend, repetitions)
    generating = _last("generating", source, backend, repetitions)
    for note in dict.fromkeys([*tuning["notes"], *generating["notes"]]):
        told(f"note: {note}")
    return Result.of(source, repetitions, tuning, generating, time.monotonic() - began)


def _last(task: str, source: ModelSource, backend: str, repetitions: int) -> Any:
    """What a process of its own measured, with a bar meanwhile."""
    from mlxsft.bench.measure import measured, step_count
    from mlxsft.cli.bytes_bar import bytes_and_steps

    with bytes_and_steps(task) as (_, watch):
        *_, last = watch(measured(task, source, backend, repetitions), task, step_count(repetitions))
    return last


def _show(results: Sequence[Result]) -> None:
    """A table with a column for each result, under what it was made of."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mlxsft.bench.result import COLUMNS, NUMBERS, cells
    from mlxsft.training.report import duration

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    for _ in results:
        table.add_column()
    rows = list(zip(COLUMNS, *map(cells, results), strict=True))
    rows.append(("took", *(f"{duration(r.seconds)}, {r.repetitions} repetitions" for r in results)))
    for row in rows:
        table.add_row(*map(Text, row), style="green" if row is rows[NUMBERS] else None)
    Console(highlight=False).print(table)
