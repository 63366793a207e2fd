"""A card → what `mlxsft eval` writes in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxsft.evaluation.benchmarks import Benchmark
from mlxsft.evaluation.card import Card, Group
from mlxsft.evaluation.metrics import ALONE, FEWEST_ROWS, METRICS, SECTIONS, Metric, verdict_of
from mlxsft.terminal import printable

_STYLES = {"better": "green", "worse": "red", "": ""}


def print_card(card: Card, console: Console) -> None:
    """Metrics by the question that they answer, groups, warnings, notes, and the verdict last."""
    for section, question in SECTIONS.items():
        found = [name for name in METRICS if METRICS[name].section == section and name in card.metrics]
        if not found:
            continue
        table = _table(question, "base", "tuned", "change", "95 % interval")
        for name in found:
            metric = card.metrics[name]
            style = _STYLES[verdict_of(name, metric)]
            shown = [shown_value(name, v) for v in (metric.base, metric.tuned, metric.change)]
            table.add_row(Text(name), shown[0], shown[1], Text(signed(shown[2]), style), interval(name, metric))
        console.print(table)
        console.print()
    if card.groups:
        console.print(_groups(card.groups))
        console.print()
    if card.benchmarks:
        console.print(_benchmarks(card.benchmarks))
        console.print()
    for note in card.notes:
        console.print(Text.assemble(("note  ", "bold"), printable(note)), soft_wrap=True)
    style = "bold green" if card.good else "bold yellow"
    console.print(Text(printable(card.verdict), style), soft_wrap=True)


def print_comparison(cards: Sequence[Card], console: Console) -> None:
    """The runs' tuned values side by side, with the base's; and what makes them hard to compare."""
    for section, question in SECTIONS.items():
        found = [name for name in METRICS if METRICS[name].section == section]
        found = [name for name in found if any(name in card.metrics for card in cards)]
        if not found:
            continue
        table = _table(question, "base", *(printable(card.run) for card in cards))
        for name in found:
            values = [card.metrics.get(name) for card in cards]
            base = next((m.base for m in values if m is not None and m.base is not None), None)
            best = best_of(name, values)
            shown = [
                Text("" if m is None else shown_value(name, m.tuned), "green" if i in best else "")
                for i, m in enumerate(values)
            ]
            table.add_row(Text(name), shown_value(name, base), *shown)
        console.print(table)
        console.print()
    for sentence in differences(cards):
        console.print(Text.assemble(("note  ", "bold"), printable(sentence)), soft_wrap=True)
    for card in cards:
        console.print(Text.assemble((f"{printable(card.run)}  ", "bold"), printable(card.verdict)), soft_wrap=True)


def differences(cards: Sequence[Card]) -> list[str]:
    """Why the cards cannot simply be held against each other, as sentences."""
    said = []
    for what, values in (
        ("bases", [card.model for card in cards]),
        ("settings", [repr(card.settings) for card in cards]),
        ("held-out rows", [repr(_asked(card)) for card in cards]),
    ):
        if len(set(values)) > 1:
            said.append(f"the {what} differ, so that the values do not say which run is better")
    return said


def best_of(name: str, values: Sequence[Metric | None]) -> set[int]:
    """Which of the runs has the best value; none where there is no better, or all are equal."""
    better = METRICS[name].better
    known = [m.tuned for m in values if m is not None]
    if not better or len(set(known)) < 2:
        return set()
    best = min(known) if better == "lower" else max(known)
    return {i for i, m in enumerate(values) if m is not None and m.tuned == best}


def shown_value(name: str, value: float | None) -> str:
    """A value of this metric, in its form; empty where there is none."""
    shown = "" if value is None else format(value, METRICS[name].form).removesuffix(".")
    return f"{value:,.0f}" if "e+" in shown and abs(value or 0) < 1e6 else shown


def interval(name: str, metric: Metric) -> str:
    """The interval of the change, or of a metric that is a comparison already."""
    if metric.low is None or metric.high is None:
        return ""
    low, high = (shown_value(name, bound) for bound in (metric.low, metric.high))
    return f"{low} to {high}" if name in ALONE else f"{signed(low)} to {signed(high)}"


def signed(written: str) -> str:
    return (
        f"+{written}" if written and written[0].isdigit() and float(written.rstrip("%").replace(",", "")) else written
    )


def _table(title: str, *columns: str, width: int = 28) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text(title, "bold"), min_width=width)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _groups(groups: Sequence[Group]) -> Table:
    table = _table("Held-out answers by part", "by", "prompts", "base", "tuned", "95 % interval", width=0)
    for group in groups:
        values = (f"{value:.1%}" for value in (group.base, group.tuned))
        within = group_interval(group)
        table.add_row(Text(printable(group.name)), printable(group.measure), f"{group.count:,}", *values, within)
    return table


def group_interval(group: Group) -> str:
    """The interval of the change; empty over too few prompts to tell."""
    if group.low is None or group.high is None or group.count < FEWEST_ROWS:
        return ""
    return f"{signed(f'{group.low:.1%}')} to {signed(f'{group.high:.1%}')}"


def _benchmarks(found: Sequence[Benchmark]) -> Table:
    table = _table("Benchmarks (lm-eval)", "metric", "base", "tuned", "change")
    for b in found:
        change = signed(f"{b.tuned - b.base:.3f}")
        table.add_row(Text(printable(b.task)), b.metric, *(with_error(*side) for side in sides_of(b)), change)
    return table


def sides_of(b: Benchmark) -> list[tuple[float, float | None]]:
    """Value and standard error of both models."""
    return [(b.base, b.base_error), (b.tuned, b.tuned_error)]


def with_error(value: float, error: float | None) -> str:
    """A value with its standard error, where that is known."""
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"


def _asked(card: Card) -> list[tuple[str, str]]:
    return [(answer.place, answer.prompt) for answer in card.answers if answer.set == "heldout"]
