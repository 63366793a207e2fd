"""Cards → one HTML page that needs nothing but itself: the verdict, bars with intervals, answers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from mlxsft.evaluation.card import Card
from mlxsft.evaluation.card_text import (
    best_of,
    differences,
    group_interval,
    interval,
    shown_value,
    sides_of,
    signed,
    with_error,
)
from mlxsft.evaluation.metrics import ALONE, METRICS, SECTIONS, Metric, verdict_of
from mlxsft.page import document, model_name

_STYLE = """
:root{--base:#8a949e;--a:#2f6fdb;--b:#c2570c;--c:#8a3fc0;--d:#1b8a4b;--good:#1b8a4b;--bad:#c62f35}
@media(prefers-color-scheme:dark){:root{--base:#77828d;--a:#7aa5f5;--b:#f2a65a;--c:#c99bf0;--d:#63c98c;
--good:#63c98c;--bad:#ff7b7f}}
.verdict{border-left:5px solid var(--c0);font-size:1.05rem;margin-top:1rem}.verdict ul{margin:.5rem 0 0;
padding-left:1.2rem;font-size:.95rem}.verdict.good{--c0:var(--good)}.verdict.mixed{--c0:var(--warning)}
table.metrics td{vertical-align:middle}table.metrics tr:first-child td{border-top:0}
.metrics td:first-child{width:34%}.metrics td:first-child span{display:block;font-size:.82rem;color:var(--dim)}
td.bar{width:34%;padding-right:1.2rem}td.num{font-variant-numeric:tabular-nums;white-space:nowrap;font-size:.9rem}
td.num b{font-weight:600}.better{color:var(--good)}.worse{color:var(--bad)}
svg text{fill:var(--dim);font:11px system-ui,sans-serif}svg .axis{stroke:var(--line);stroke-width:1}
svg .whisker{stroke:var(--fg);stroke-width:1.3;opacity:.85}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;color:var(--dim);margin:.6rem 0}
.key i{display:inline-block;width:.8rem;height:.8rem;border-radius:2px;margin-right:.4rem;vertical-align:-.1rem}
.sides{display:grid;gap:.7rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));margin:.6rem 0 .3rem}
.side{background:var(--bg);border-radius:7px;padding:.5rem .75rem;border-top:3px solid var(--c0);min-width:0}
.side p{white-space:pre-wrap;overflow-wrap:anywhere}.side small,.tag{color:var(--dim);font-size:.8rem}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;font-weight:600}details{margin:.6rem 0}
summary{cursor:pointer;color:var(--dim)}.scroll{overflow-x:auto}
@media(max-width:40rem){.metrics td{display:inline-block;border-top:0;padding-right:1rem}.metrics td:first-child,
.metrics td.bar{display:block;width:auto;padding-right:0}.metrics tr{display:block;border-top:1px solid var(--line);
padding:.4rem 0}.metrics tr:first-child{border-top:0}}
"""
_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")
_BASE = "var(--base)"
_WIDTH, _BAR, _GAP = 300, 11, 4  # of a bar chart, in its own units
_SETS = {
    "heldout": "Held-out prompts",
    "probe": "General questions",
    "instructions": "Instructions with constraints",
    "training": "Training prompts",
}
_SHOWN = 8  # answers of a set that are not folded away


def page(cards: Sequence[Card]) -> str:
    """The HTML of one card, or of several side by side. Every text from outside is escaped."""
    title = " · ".join(card.run for card in cards)
    parts = [f"<h1>{escape(title)}</h1>"]
    for card in cards:
        parts += [_head(card, named=len(cards) > 1)]
    parts += [f'<div class="card">{escape(sentence)}</div>' for sentence in differences(cards)]
    parts.append(_key(cards))
    for section, question in SECTIONS.items():
        names = [name for name in METRICS if METRICS[name].section == section]
        rows = [_row(name, cards) for name in names if any(name in card.metrics for card in cards)]
        if rows:
            parts += [f"<h2>{question}</h2>", f'<div class="card"><table class="metrics">{"".join(rows)}</table>']
            parts += [_forms(cards)] if section == "narrower" else []
            parts += ["</div>"]
    parts += _groups(cards)
    for card in cards:
        parts += _benchmarks(card, named=len(cards) > 1)
    parts += _answers(cards)
    for card in cards:
        parts += [f'<p class="dim">{escape(note)}</p>' for note in card.notes]
        asked = ", ".join(f"{name} {value}" for name, value in card.settings.items() if value is not None)
        parts.append(f'<p class="dim">{escape(f"mlxsft {card.mlxsft}: {asked}")}</p>')
    return document(title, parts, _STYLE)


def _head(card: Card, *, named: bool) -> str:
    said = escape(card.verdict.partition(". ")[0] + "." if card.warnings else card.verdict)
    warnings = "".join(f"<li>{escape(_capital(warning))}.</li>" for warning in card.warnings)
    listed = f"<ul>{warnings}</ul>" if warnings else ""
    name = f"{escape(card.run)}: " if named else ""
    facts = escape(f"{model_name(card.model)} · {card.backend}")
    return (
        f'<p class="dim">{facts}</p><div class="card verdict {"good" if card.good else "mixed"}">'
        f"<b>{name}{said}</b>{listed}</div>"
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _key(cards: Sequence[Card]) -> str:
    sides = [("base", _BASE), *((card.run if len(cards) > 1 else "tuned", _colour(i)) for i, card in enumerate(cards))]
    names = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in sides)
    return f'<div class="key">{names}<span>lines: 95 % intervals, from resampling</span></div>'


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _row(name: str, cards: Sequence[Card]) -> str:
    """A metric: what it is, its bars, its values and their change."""
    metrics = [card.metrics.get(name) for card in cards]
    known = [m for m in metrics if m is not None]
    base = next((m for m in known if m.base is not None), None)
    values = [f"{shown_value(name, base.base)} → "] if base is not None and len(cards) == 1 else []
    best = best_of(name, metrics)
    values += [
        f"<b{' class=better' * (i in best)}>{shown_value(name, m.tuned)}</b>" if m else "–"
        for i, m in enumerate(metrics)
    ]
    said = "".join(values) if len(cards) == 1 else " · ".join(values)
    change = _change(name, known[0]) if len(cards) == 1 else ""
    kind = METRICS[name]
    better = f" ({kind.better} is better)" if kind.better else ""
    return (
        f"<tr><td>{name.replace('_', ' ')}<span>{escape(kind.help)}{better}</span></td>"
        f'<td class="bar">{_bars(name, metrics)}</td><td class="num">{said}{change}</td></tr>'
    )


def _change(name: str, metric: Metric) -> str:
    within = interval(name, metric)
    if name in ALONE:
        return f'<br><span class="dim">{within}</span>' if within else ""
    if metric.change is None:
        return ""
    shown = signed(shown_value(name, metric.change))
    said = f" ({within})" if within else ""
    return f'<br><span class="{verdict_of(name, metric) or "dim"}">{shown}</span><span class="dim">{said}</span>'


def _bars(name: str, metrics: Sequence[Metric | None]) -> str:
    """A bar for the base and one for each run, over one scale from zero, each with its interval."""
    base = next((m for m in metrics if m is not None and m.base is not None), None)
    bars: list[tuple[str, float, float | None, float | None, str]] = []
    if base is not None and base.base is not None:
        bars.append((_BASE, base.base, base.base_low, base.base_high, "base"))
    for i, m in enumerate(metrics):
        if m is not None:
            low, high = (m.low, m.high) if name in ALONE else (m.tuned_low, m.tuned_high)
            bars.append((_colour(i), m.tuned, low, high, "tuned"))
    ends = [v for _, value, low, high, _ in bars for v in (value, low, high) if v is not None]
    share = METRICS[name].form.endswith("%")
    left, right = min(0.0, *ends), max(1.0 if share else 0.0, *ends)
    right = right if right > left else left + 1

    def x(value: float) -> float:
        return round(2 + (value - left) / (right - left) * (_WIDTH - 4), 1)

    height = len(bars) * (_BAR + _GAP) + _GAP
    shapes = [f'<line class="axis" x1="{x(0)}" x2="{x(0)}" y1="0" y2="{height}"/>']
    if name == "win_rate":
        shapes.append(f'<line class="axis" x1="{x(0.5)}" x2="{x(0.5)}" y1="0" y2="{height}"/>')
    for i, (colour, value, low, high, who) in enumerate(bars):
        top = _GAP + i * (_BAR + _GAP)
        begin, end = sorted((x(0), x(value)))
        told = f"{who}: {shown_value(name, value)}"
        if low is not None and high is not None:
            told += f", {shown_value(name, low)} to {shown_value(name, high)}"
        shapes.append(
            f'<rect x="{begin}" y="{top}" width="{max(1.0, round(end - begin, 1))}" height="{_BAR}" rx="2" '
            f'style="fill:{colour}"><title>{escape(told)}</title></rect>'
        )
        if low is not None and high is not None:
            shapes.append(_whisker(x(low), x(high), top + _BAR / 2))
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(name)}">{"".join(shapes)}</svg>'


def _whisker(low: float, high: float, y: float) -> str:
    return (
        f'<path class="whisker" fill="none" d="M{low} {y}H{high}M{low} {y - 3}V{y + 3}M{high} {y - 3}V{y + 3}"/>'
    )  # fmt: skip


def _forms(cards: Sequence[Card]) -> str:
    """The share of answers in each form."""
    names = list(dict.fromkeys(name for card in cards for name in card.forms))
    if names in ([], ["prose"]):
        return ""
    rows = []
    for name in names:
        shares = [card.forms.get(name, (0.0, 0.0)) for card in cards]
        values = [shares[0][0], *(after for _, after in shares)]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td class=num>{v:.0%}</td>' for v in values)}</tr>")
    heads = ["base", *(card.run if len(cards) > 1 else "tuned" for card in cards)]
    head = "".join(f'<td class="num dim">{escape(h)}</td>' for h in heads)
    return f'<table><tr><td class="dim">form of sampled answers</td>{head}</tr>{"".join(rows)}</table>'


def _groups(cards: Sequence[Card]) -> list[str]:
    """Held-out answers by category and by rule."""
    names = list(dict.fromkeys((g.name, g.measure) for card in cards for g in card.groups))
    if not names:
        return []
    rows = []
    for name, measure in names:
        found = [next((g for g in card.groups if (g.name, g.measure) == (name, measure)), None) for card in cards]
        known = next(g for g in found if g is not None)
        values = [known.base, *(g.tuned if g else None for g in found)]
        bars = "".join(_share_bar(v, _BASE if i == 0 else _colour(i - 1)) for i, v in enumerate(values))
        shown = " → ".join("–" if v is None else f"{v:.0%}" for v in values)
        within = group_interval(known) if len(cards) == 1 else ""
        shown += f'<br><span class="dim">change {within}</span>' if within else ""
        told = f"{known.count:,} prompt{'s' * (known.count != 1)}{f', by {measure}' * (not name.endswith(measure))}"
        rows.append(
            f"<tr><td>{escape(name)}<span>{escape(told)}</span></td>"
            f'<td class="bar">{bars}</td><td class="num">{shown}</td></tr>'
        )
    return [
        "<h2>Held-out answers by part</h2>",
        f'<div class="card"><table class="metrics">{"".join(rows)}</table></div>',
    ]


def _share_bar(value: float | None, colour: str) -> str:
    width = 100 * min(1.0, max(0.0, value or 0.0))
    return (
        '<div style="height:8px;margin:3px 0;background:var(--line);border-radius:2px">'
        f'<div style="height:8px;border-radius:2px;width:{width:.1f}%;background:{colour}"></div></div>'
    )


def _benchmarks(card: Card, *, named: bool) -> list[str]:
    """lm-eval's tasks, each value with its standard error."""
    rows = [
        f"<tr><td>{escape(b.task)}<span>{escape(b.metric)}</span></td>"
        f'<td class="bar">{_share_bar(b.base, _BASE)}{_share_bar(b.tuned, _colour(0))}</td>'
        f'<td class="num">{" → ".join(with_error(value, error) for value, error in sides_of(b))}</td></tr>'
        for b in card.benchmarks
    ]
    if not rows:
        return []
    whose = f" of {escape(card.run)}" * named
    table = f'<table class="metrics">{"".join(rows)}</table>'
    return [f"<h2>Benchmarks (lm-eval){whose}</h2>", f'<div class="card">{table}</div>']


def _answers(cards: Sequence[Card]) -> list[str]:
    """Every prompt with its answers; of many, the rest is folded away."""
    parts: list[str] = []
    for kind, title in _SETS.items():
        asked = [a for card in cards for a in card.answers if a.set == kind]
        prompts = list(dict.fromkeys((a.place, a.prompt) for a in asked))
        shown = [_answer(prompt, cards, kind) for prompt in prompts]
        if shown:
            parts += [f"<h2>{title}</h2>", *shown[:_SHOWN]]
        if rest := shown[_SHOWN:]:
            parts += [f"<details><summary>{len(rest)} more</summary>", *rest, "</details>"]
    return parts


def _answer(prompt: tuple[str, str], cards: Sequence[Card], kind: str) -> str:
    found = [
        next((a for a in card.answers if a.set == kind and (a.place, a.prompt) == prompt), None) for card in cards
    ]  # fmt: skip
    known = next(a for a in found if a is not None)
    sides = [_side("base", _BASE, known.base, _facts(known.base_ends, known.base_score))]
    for i, (card, answer) in enumerate(zip(cards, found, strict=True)):
        if answer is not None:
            name = card.run if len(cards) > 1 else "tuned"
            facts = _facts(answer.tuned_ends, answer.tuned_score, answer.won)
            sides.append(_side(name, _colour(i), answer.tuned, facts))
    if known.reference:
        sides.append(_side("the row's own", "var(--line)", known.reference, ""))
    tag = " · ".join(filter(None, (known.category, known.place)))
    return (
        f'<div class="card"><div class="prompt">{escape(known.prompt)}</div><div class="tag">{escape(tag)}</div>'
        f'<div class="sides">{"".join(sides)}</div></div>'
    )


def _side(name: str, colour: str, text: str, facts: str) -> str:
    shown = escape(text.strip()) or '<span class="dim">(nothing)</span>'
    return (
        f'<div class="side" style="--c0:{colour}"><small>{escape(name)}{escape(facts)}</small><p>{shown}</p></div>'
    )  # fmt: skip


def _facts(ends: bool, score: float | None, won: float | None = None) -> str:
    facts: Iterable[str] = filter(
        None,
        (
            "" if score is None else f"score {score:.0%}",
            "" if ends else "cut off",
            {1.0: "wins", 0.0: "loses"}.get(won, "") if won is not None else "",
        ),
    )
    return "".join(f" · {fact}" for fact in facts)
