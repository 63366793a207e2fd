"""An audit → one HTML page that needs nothing but itself."""

from __future__ import annotations

import os
import re
from html import escape

from mlxsft.data.audit import Audit
from mlxsft.data.audit_text import MEASURES, by_severity, share
from mlxsft.data.findings import Finding
from mlxsft.data.lengths import Lengths
from mlxsft.page import document

_STYLE = """
.track{height:6px;border-radius:3px;background:var(--line);margin:.15rem 0 .5rem}.track i{display:block;height:6px;
border-radius:3px;background:var(--bar)}.finding{border-left:4px solid var(--c)}
.error{--c:var(--error)}.warning{--c:var(--warning)}.note{--c:var(--note)}.tag{color:var(--c);font-weight:600;
font-size:.75rem;text-transform:uppercase;letter-spacing:.05em}
td.place{font:13px/1.7 ui-monospace,monospace;color:var(--dim);width:1%;white-space:nowrap}
code{font:.9em ui-monospace,monospace;background:var(--bg);border-radius:4px;padding:.1em .3em}
@media(max-width:40rem){td{display:block;padding:0 0 .25rem}td.place{border-top:1px solid var(--line);width:auto;
padding-top:.25rem}td.place+td{border-top:0}}
dl{display:grid;grid-template-columns:repeat(5,auto);gap:0 .8rem;margin:.5rem 0 0}dt{grid-row:1;color:var(--dim);
font-size:.8rem}dd{margin:0;grid-row:2;font-variant-numeric:tabular-nums}
svg rect{fill:var(--bar)}svg text{fill:var(--dim);font:11px system-ui,sans-serif}
"""


def page(audit: Audit, title: str) -> str:
    """The HTML. Every text from outside is escaped."""
    usable = audit.ledger["usable"]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="dim">{audit.ledger["read"]:,} rows read, {usable:,} usable, {_found(audit)}</p>',
        "<h2>Every row accounted for</h2>",
        '<div class="grid">',
        *(_counts(name, ledger) for name, ledger in {"rows": audit.ledger, **audit.held_out}.items()),
        "</div>",
        "<h2>Lengths in tokens</h2>",
        '<div class="grid">',
        *(_lengths(name, lengths) for name, lengths in audit.lengths.items()),
        "</div>",
        "<h2>Findings</h2>",
        *(map(_finding, by_severity(audit.findings))),
        "" if audit.findings else '<div class="card">Nothing was found.</div>',
        "<h2>What the rows are like</h2>",
        '<div class="grid">',
        *(_counts(name, counts, most=8) for name, counts in audit.profile.items()),
        "</div>",
        *(f'<p class="dim">{escape(note)}</p>' for note in audit.notes),
    ]
    return document(title, parts, _STYLE)


def _found(audit: Audit) -> str:
    kinds = [f.kind.severity for f in audit.findings]
    return ", ".join(f"{kinds.count(s)} {s}{'s' * (kinds.count(s) != 1)}" for s in ("error", "warning", "note"))


def _counts(name: str, counts: dict[str, int], most: int = 20) -> str:
    """A card of numbers, each with a bar; the largest is the whole of a ledger."""
    whole = counts.get("read") or sum(counts.values()) or 1
    lines = [
        f'<div class="row"><span>{escape(key or "(none)")}</span><span class="num">{n:,}</span></div>'
        f'<div class="track"><i style="width:{100 * n / whole:.1f}%"></i></div>'
        for key, n in list(counts.items())[:most]
    ]
    return f'<div class="card"><h3>{escape(name)}</h3>{"".join(lines)}</div>'


def _lengths(name: str, lengths: Lengths) -> str:
    summary = lengths.summary()
    if not summary:
        return ""
    numbers = "".join(f"<dt>{m}</dt><dd>{summary[m]:,.0f}</dd>" for m in MEASURES)
    return f'<div class="card"><h3>{escape(name)}</h3>{_svg(lengths)}<dl>{numbers}</dl></div>'


def _svg(lengths: Lengths) -> str:
    """The histogram, with the range and the count of a bar as its tooltip."""
    bins = lengths.histogram()
    top = max(count for _, _, count in bins)
    width = 300 / len(bins)
    bars = "".join(
        f'<rect x="{i * width + 1:.1f}" y="{90 - (height := 84 * n / top):.1f}" width="{max(1, width - 2):.1f}" '
        f'height="{height:.1f}"><title>{low:,} to {high:,} tokens: {n:,}</title></rect>'
        for i, (low, high, n) in enumerate(bins)
    )
    first, last = bins[0][0], bins[-1][0]
    end = f"{last:,}" if bins[-1][1] == last else f"{last:,} to {bins[-1][1]:,}"
    labels = f'<text x="0" y="104">{first:,}</text><text x="300" y="104" text-anchor="end">{end}</text>'
    return f'<svg viewBox="0 0 300 108" role="img" aria-label="histogram of lengths in tokens">{bars}{labels}</svg>'


def _finding(finding: Finding) -> str:
    kind = finding.kind
    rows = "".join(
        f'<tr><td class="place" title="{escape(e.place)}">{escape(os.path.basename(e.place))}</td>'
        f"<td>{escape(e.excerpt)}</td></tr>"
        for e in finding.examples
    )
    advice = re.sub("`([^`]+)`", r"<code>\1</code>", escape(kind.advice))
    detail = f"<p>{escape(finding.detail)}</p>" if finding.detail else ""
    return (
        f'<div class="card finding {kind.severity}"><div class="row"><div><span class="tag">{kind.severity}</span>'
        f'<h3>{escape(kind.title)}</h3></div><div class="num">{finding.count:,} · {share(finding.share)}</div></div>'
        f'{detail}<table>{rows}</table><p>{advice} <span class="dim">{escape(finding.id)}</span></p></div>'
    )
