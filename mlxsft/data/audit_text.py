"""An audit → what a terminal shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxsft.data.audit import Audit
from mlxsft.data.findings import Finding

if TYPE_CHECKING:
    from mlxsft.data.lengths import Lengths

_STYLE = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
_BLOCKS = " ▁▂▃▄▅▆▇█"
MEASURES = ("min", "median", "mean", "p95", "max")


def print_audit(audit: Audit, console: Console) -> None:
    """Ledger, lengths, profile and findings, the gravest first."""
    _ledger(audit, console)
    _lengths(audit, console)
    for name, counts in audit.profile.items():
        total = sum(counts.values())
        shown = ", ".join(f"{key or '(none)'} {n / total:.0%}" for key, n in list(counts.items())[:6])
        console.print(Text.assemble((f"{name:<10}", "bold"), shown))
    console.print()
    for finding in by_severity(audit.findings):
        _finding(finding, console)
    if not audit.findings:
        console.print("Nothing was found.")
    for note in audit.notes:
        console.print(Text(f"note: {note}"))


def by_severity(findings: list[Finding]) -> list[Finding]:
    """Errors, then warnings, then notes."""
    return sorted(findings, key=lambda f: list(_STYLE).index(f.kind.severity))


def _ledger(audit: Audit, console: Console) -> None:
    for name, ledger in {"rows": audit.ledger, **audit.held_out}.items():
        (first, total), *parts = ledger.items()
        line = Text.assemble((f"{name:<10}", "bold"), f"{total:,} {first} = ")
        console.print(line.append(" + ".join(f"{n:,} {reason}" for reason, n in parts)))
    console.print()


def _lengths(audit: Audit, console: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens", style="bold", no_wrap=True)
    for measure in MEASURES:
        table.add_column(measure, justify="right", no_wrap=True)
    table.add_column("histogram", no_wrap=True)
    for name, lengths in audit.lengths.items():
        if summary := lengths.summary():
            table.add_row(name, *(f"{summary[m]:,.0f}" for m in MEASURES), _bars(lengths))
    if table.row_count:
        console.print(table)
        console.print()


def _bars(lengths: Lengths) -> str:
    counts = [count for _, _, count in lengths.histogram()]
    return "".join(_BLOCKS[-(-8 * n // max(counts))] for n in counts)


def _finding(finding: Finding, console: Console) -> None:
    head = Text.assemble((f"{finding.kind.severity:<8}", _STYLE[finding.kind.severity]), (finding.kind.title, "bold"))
    head.append(f": {finding.count:,} ({share(finding.share)})  [{finding.id}]")
    console.print(head)
    if finding.detail:
        console.print(Text(f"        {finding.detail}"))
    for example in finding.examples:
        console.print(Text.assemble("        ", (example.place, "cyan"), f"  {example.excerpt}"))
    console.print(Text(f"        {finding.kind.advice}", style="italic"))
    console.print()


def share(value: float) -> str:
    """A share as people write it: `12 %`, `0.4 %`, `under 0.1 %`."""
    if 0 < value < 0.001:
        return "under 0.1 %"
    return f"{value:.1%}".replace(".0%", "%").replace("%", " %")
