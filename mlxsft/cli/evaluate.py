"""`mlxsft eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mlxsft.cli.examples import examples
from mlxsft.cli.train import BACKENDS

if TYPE_CHECKING:
    from mlxsft.evaluation.card import Card

PATH = click.Path(path_type=Path)


class _WithMetrics(click.Command):
    """Its help ends with the metrics' names, from the one place where they are declared."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from mlxsft.evaluation.metrics import METRICS

        with formatter.section("Metrics, for --require and in card.json"):
            formatter.write_dl([(name, kind.help) for name, kind in METRICS.items()])


@click.command(
    "eval",
    cls=_WithMetrics,
    epilog=examples("""
    mlxsft eval runs/mine  # was it good? base and tuned side by side
    mlxsft eval runs/mine --rules rules.yaml --judge models/judge --samples 64  # of each set; 16 unless told
    mlxsft eval runs/mine --require "heldout_loss<0.9*base" --require "forgetting<0.05"  # a gate: exit 6 where it fails
    mlxsft eval runs/mine runs/other --compare --html both.html  # side by side
    mlxsft eval runs/mine --ifeval ifeval_en.jsonl --samples 541  # the published prompts with constraints
    """),
)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=PATH)
@click.option("--compare", is_flag=True, help="Lay several runs side by side; cards that are there already are read.")
@click.option(
    "--rows", type=click.IntRange(1), default=512, show_default=True, help="Rows of each set that are judged."
)
@click.option(
    "--samples", type=click.IntRange(0), default=16, show_default=True, help="Prompts of each set that are answered."
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest answer.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of choices and sampling.")
@click.option("--data", type=PATH, help="Rows to judge by, instead of those that the run held out.")
@click.option("--rules", type=PATH, help="YAML with rules for right answers: for all rows, or by category.")
@click.option("--probe", type=PATH, help="General rows of your own, beside the built-in ones.")
@click.option("--ifeval", type=PATH, help="Prompts with constraints in IFEval's layout, instead of the built-in ones.")
@click.option("--judge", metavar="MODEL", help="A local model says which answer is better, asked in both orders.")
@click.option(
    "--benchmark",
    "benchmarks",
    multiple=True,
    metavar="TASK",
    help="A task of lm-eval, which loads its rows from the Hub.",
)
@click.option(
    "--require", "demands", multiple=True, metavar="COMPARISON", help="Exit 6 unless it holds: heldout_loss<0.9*base."
)
@click.option("--out", type=PATH, help="A folder for card.json and card.html; by default the run's own.")
@click.option("--html", type=PATH, help="With --compare: a page of all runs side by side.")
@click.option("--backend", type=BACKENDS, default="auto", show_default=True, help="What computes.")
@click.option("--json", "as_json", is_flag=True, help="Write the card as JSON; with --compare, a list.")
@click.option("--force", is_flag=True, help="Overwrite cards, and make those anew that --compare would read.")
def evaluate(
    runs: tuple[Path, ...],
    compare: bool,
    demands: tuple[str, ...],
    out: Path | None,
    html: Path | None,
    as_json: bool,
    force: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Say whether the tuning of RUN was good: its base and its tuned model side by side.

    Better on held-out rows? Forgetful, narrower, a parrot of its rows? Does it follow instructions, and end? The card
    goes to card.json and card.html in the run folder, with the answers before and after.

    A row says what makes an answer right under `check`, as in {"prompt": …, "completion": …, "check": {"contains":
    "39 euros", "json": true}}: exact, contains, excludes, regex, json, json_schema, rouge_l, chrf, bleu. With --rules,
    a file does: {rules: {json: true}, categories: {slogan: {regex: "!$"}}}.

    --require compares metrics: NAME is the tuned value, `base` the base's; NAME.change, and NAME.low and NAME.high,
    which bound the change with 95 %, are there too. `forgetting<0.05`, `heldout_loss.high<0`.

    A card that is there is read again where nothing that decides it has changed: adapter, rows, prompts, settings,
    versions. Where something has, --force makes it anew.
    """
    import json

    from rich.console import Console

    from mlxsft.errors import GateFailed, UsageError
    from mlxsft.evaluation.card_page import page
    from mlxsft.evaluation.card_text import print_card, print_comparison
    from mlxsft.evaluation.requirements import Requirement
    from mlxsft.outputs import refuse_existing
    from mlxsft.page import write_page

    if len(runs) > 1 and not compare:
        raise UsageError("several runs are given", "Add --compare to lay them side by side.")
    if compare and (len(runs) < 2 or out is not None):
        raise UsageError("--compare is about several runs, whose cards are in their folders", "Name at least two.")
    if html is not None and not compare:
        raise UsageError("--html is a page of several runs", "Of one run, card.html is in its folder.")
    if html is not None:
        refuse_existing(html, force=force)
    required = [Requirement.parse(text) for text in demands]
    cards = _told_apart([_card(run, out or run, settings, keep=compare, force=force) for run in runs], runs)
    if html is not None:
        write_page(page(cards), html, force=force)
    if as_json:
        click.echo(json.dumps([json.loads(c.to_json()) for c in cards], indent=2, ensure_ascii=False)
                   if compare else cards[0].to_json(), nl=compare)  # fmt: skip
    elif compare:
        print_comparison(cards, Console(highlight=False))
    else:
        print_card(cards[0], Console(highlight=False))
        click.echo(f"The card is in {out or runs[0]}: card.html for people, card.json for programs.", err=True)
    named = len(cards) > 1
    failed = [
        f"{card.run}: {said}" if named else said
        for card in cards
        for requirement in required
        if (said := requirement.failure(card.metrics)) is not None
    ]
    if failed:
        raise GateFailed("\n  ".join(["what is required was not reached:", *failed]))


def _told_apart(cards: Sequence[Card], runs: Sequence[Path]) -> list[Card]:
    """The cards; where folders of different places have one name, a run is called by its path as it was given."""
    from dataclasses import replace

    names = [card.run for card in cards]
    return [
        replace(card, run=str(run)) if names.count(card.run) > 1 else card
        for card, run in zip(cards, runs, strict=True)
    ]  # fmt: skip


def _card(run: Path, folder: Path, settings: dict[str, Any], *, keep: bool, force: bool) -> Card:
    """The card of a run, made and written, or read where it is there and may be kept."""
    from mlxsft.cli.bytes_bar import bytes_and_steps
    from mlxsft.errors import UsageError
    from mlxsft.evaluation.card import JSON_NAME, PAGE_NAME, read_card
    from mlxsft.evaluation.card_page import page
    from mlxsft.evaluation.evaluate import Settings, adapter_hash, changed_since
    from mlxsft.evaluation.evaluate import evaluate as evaluate_run
    from mlxsft.outputs import refuse_existing
    from mlxsft.page import write_page
    from mlxsft.terminal import told

    at = folder / JSON_NAME
    if keep and at.exists() and not force:
        card = read_card(at, adapter_hash(run))
        _refuse_other_settings(at, card, Settings(**settings).told())
        return card
    if at.exists() and not force:
        card = read_card(at, adapter_hash(run))
        if changed := changed_since(card, run, Settings(**settings)):
            message = f"{at}: is there already; it was made otherwise: {', '.join(changed)}"
            raise UsageError(message, "Name another folder with --out, or give --force to replace it.")
        if not (folder / PAGE_NAME).exists():
            write_page(page([card]), folder / PAGE_NAME)
        told(f"{at}: read, not made anew, since nothing that decides it has changed; --force makes it anew")
        return card
    refuse_existing(folder / PAGE_NAME, force=force, instead="Name another folder with --out")
    with bytes_and_steps("evaluating") as (_, watch):
        card = evaluate_run(run, Settings(**settings), tell=told, watch=watch)
    folder.mkdir(parents=True, exist_ok=True)
    write_page(card.to_json(), at, force=force)
    write_page(page([card]), folder / PAGE_NAME, force=force)
    return card


def _refuse_other_settings(at: Path, card: Card, told: dict[str, Any]) -> None:
    """Raises UsageError where the command line names settings that a card was not made with."""
    from mlxsft.errors import UsageError

    source = click.get_current_context().get_parameter_source
    named = [name for name in told if source(name) is ParameterSource.COMMANDLINE]
    if other := [f"{n}: {card.settings.get(n)}, not {told[n]}" for n in named if card.settings.get(n) != told[n]]:
        raise UsageError(f"{at}: was made with other settings ({'; '.join(other)})", "--force makes it anew.")
