"""Runs → one HTML page that needs nothing but itself: curves, samples, settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mlxsft.page import document, model_name
from mlxsft.recipe import flattened
from mlxsft.training.events import Sampled, Stepped
from mlxsft.training.history import History, Point, share_of_points, thinned
from mlxsft.training.report import finish_line, size
from mlxsft.training.run_text import begun, differing_settings, results, state

_STYLE = """
:root{--a:#2f6fdb;--b:#c2570c;--c:#8a3fc0;--d:#1b8a4b;--e:#b3246b;--f:#5b6570}
@media(prefers-color-scheme:dark){:root{--a:#7aa5f5;--b:#f2a65a;--c:#c99bf0;--d:#63c98c;--e:#f08cb8;--f:#a7b1bb}}
.card>h3{margin-bottom:.4rem}.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;color:var(--dim);
margin:.4rem 0 0}.key i{display:inline-block;width:1.1rem;height:0;border-top:2px solid;vertical-align:middle;
margin-right:.35rem}.key i.dot{width:.55rem;height:.55rem;border:0;border-radius:50%}
svg text{fill:var(--dim);font:11px system-ui,sans-serif}svg .axis{stroke:var(--line);stroke-width:1}
svg polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}svg polygon{stroke:none;opacity:.16}
svg .thin{stroke-width:1.3;stroke-dasharray:5 4}
.facts{align-items:stretch;grid-template-columns:repeat(auto-fit,minmax(6.4rem,1fr))}.facts .card{padding:.6rem .75rem}
.facts b{display:block;font-size:1.1rem;font-weight:600;font-variant-numeric:tabular-nums}.facts span{font-size:.8rem}
td:first-child{width:16rem;color:var(--dim)}td.step{width:8rem;white-space:nowrap}td.text{white-space:pre-wrap}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
tr.best td.step{font-weight:600;color:var(--b)}
tr:first-child td{border-top:0}
"""
_COLOURS = tuple(f"var(--{letter})" for letter in "abcdef")
_POINTS = 150  # of a training curve: means, with their range as a band
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 22  # margins of a chart, in its own units


@dataclass(frozen=True)
class _Series:
    """A line; with `band` its range behind it, with `dots` its values on it, the best of them ringed."""

    name: str
    points: Sequence[Point]
    colour: str
    band: bool = False
    dots: bool = False
    best: float | None = field(default=None)


def page(runs: Sequence[History]) -> str:
    """The HTML of one run, or of several laid over each other. Every text from outside is escaped."""
    title = " · ".join(run.path.resolve().name for run in runs)
    losses = [series for i, run in enumerate(runs) for series in _losses(run, i, runs)]
    parts = [f"<h1>{escape(title)}</h1>", *(_head(run) for run in runs)]
    parts += [_facts(runs[0])] if len(runs) == 1 else _side_by_side(runs)
    parts += ["<h2>Losses</h2>", _chart("nats a trained token", losses, 640, 220)]
    parts += ["<h2>On the way</h2>", '<div class="grid charts">', *_side_charts(runs), "</div>"]
    for run in runs:
        parts += _words(run, named=len(runs) > 1)
    if len(runs) == 1:
        for heading, values in (("Settings", runs[0].recipe), ("What it stands on", runs[0].lock)):
            parts += [f"<h2>{heading}</h2>", _table([(name, [_text(v)]) for name, v in flattened(values).items()])]
    return document(title, parts, _STYLE)


def _head(run: History) -> str:
    start = run.start
    said = [state(run)]
    if start:
        said += [model_name(start.model), f"{start.backend} on {start.device}", f"begun {begun(start.time)}"]
        said += [", ".join(f"{n:,} {what}" for what, n in start.ledger.items())]
    return f'<p class="dim">{escape(" · ".join(said))}</p>'


def _facts(run: History) -> str:
    start = run.start
    facts = [(name, values[0]) for name, values in results([run]) if values[0] and name != "state"]
    if start:
        facts.append(("trainable", f"{start.trainable_parameters:,}"))
    facts.append(("on disk", size(run.size_bytes)))
    cards = "".join(f'<div class="card"><b>{escape(v)}</b><span class="dim">{escape(n)}</span></div>' for n, v in facts)
    ended = "".join(f"<p>{escape(line)}</p>" for line in finish_line(run.end).splitlines()) if run.end else ""
    return f'<div class="grid facts" style="margin:1rem 0">{cards}</div>{ended}'


def _side_by_side(runs: Sequence[History]) -> list[str]:
    differing = differing_settings(runs)
    return [
        "<h2>Results</h2>",
        _table([("", [str(run.path) for run in runs]), *results(runs)]),
        "<h2>Settings that differ</h2>",
        _table(differing) if differing else '<p class="dim">None.</p>',
    ]


def _losses(run: History, index: int, runs: Sequence[History]) -> list[_Series]:
    """Training and validation; one run has a colour for each, several a colour a run."""
    of = len(runs)
    name = "" if of == 1 else f"{run.path.resolve().name}: "
    training, valid = (_COLOURS[0], _COLOURS[1]) if of == 1 else (_COLOURS[index % 6],) * 2
    judged = [(e.step, e.loss) for e in run.evaluations if e.loss is not None]
    steps = [(e.step, e.loss) for e in run.steps if e.loss is not None]
    return [
        _Series(f"{name}training", thinned(steps, share_of_points(run, runs, _POINTS)), training, band=of == 1),
        _Series(
            f"{name}validation",
            thinned(judged, len(judged) or 1),
            valid,
            dots=True,
            best=run.best.step if run.best else None,
        ),
    ]


def _side_charts(runs: Sequence[History]) -> list[str]:
    def series(value: Callable[[Stepped], float | None]) -> list[_Series]:
        return [
            _Series(
                run.path.resolve().name if len(runs) > 1 else "",
                thinned(found, share_of_points(run, runs, _POINTS)),
                _COLOURS[i % 6],
            )
            for i, run in enumerate(runs)
            if (found := [(e.step, v) for e in run.steps if (v := value(e)) is not None])
        ]

    return [
        f"<div><h3>{title}</h3>{_chart('', series(value), 340, 130)}</div>"
        for title, value in (
            ("Learning rate", lambda e: e.learning_rate),
            ("Gradient norm, before clipping", lambda e: e.gradient_norm),
            ("Tokens a second", lambda e: e.tokens / max(e.seconds, 1e-9)),
            ("Peak memory in GB", lambda e: e.peak_bytes / 1e9),
        )
    ]


def _chart(unit: str, series: Sequence[_Series], width: int, height: int) -> str:
    """Lines over steps, with the numbers of a point as its tooltip."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return '<div class="card dim">Nothing yet.</div>'
    points = [p for s in drawn for p in s.points]
    left, right = min(p.step for p in points), max(p.step for p in points)
    bottom, top = (
        min(p.low if s.band else p.mean for s in drawn for p in s.points),
        max(p.high if s.band else p.mean for s in drawn for p in s.points),
    )
    left, right = (left, right) if right > left else (left - 1, right + 1)
    bottom, top = (bottom, top) if top > bottom else (bottom - abs(bottom) / 2 - 1e-9, top + abs(top) / 2 + 1e-9)

    def x(step: float) -> float:
        return round(_LEFT + (step - left) / (right - left) * (width - _LEFT - _RIGHT), 1)

    def y(value: float) -> float:
        return round(_TOP + (top - value) / (top - bottom) * (height - _TOP - _BOTTOM), 1)

    shapes = [_grid(y, bottom, top, width)]
    shapes += [
        f'<text x="{x(left)}" y="{height - 6}">{left:,.0f}</text>'
        f'<text x="{width - _RIGHT}" y="{height - 6}" text-anchor="end">{right:,.0f} steps</text>'
    ]
    shapes += [shape for s in drawn for shape in _shapes(s, x, y)]
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(unit or "a curve")}">'
    return f'<div class="card">{svg}{"".join(shapes)}</svg>{_key(drawn, unit)}</div>'


def _grid(y: Callable[[float], float], bottom: float, top: float, width: int) -> str:
    lines = []
    for i in range(4):
        value = bottom + (top - bottom) * i / 3
        lines.append(
            f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(value)}" y2="{y(value)}"/>'
            f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{_number(value, top - bottom)}</text>'
        )
    return "".join(lines)


def _shapes(series: _Series, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    points, colour = series.points, series.colour
    shapes = []
    if series.band:
        ring = [(p.step, p.high) for p in points] + [(p.step, p.low) for p in reversed(points)]
        shapes.append(f'<polygon fill="{colour}" points="{" ".join(f"{x(a)},{y(b)}" for a, b in ring)}"/>')
    line = " ".join(f"{x(p.step)},{y(p.mean)}" for p in points)
    thin = ' class="thin"' if series.dots else ""
    shapes.append(f'<polyline{thin} stroke="{colour}" points="{line}"><title>{escape(series.name)}</title></polyline>')
    if series.dots:
        for p in points:
            best = p.step == series.best
            circle = (
                f'<circle cx="{x(p.step)}" cy="{y(p.mean)}" r="8" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
            said = f"step {p.step:,.0f}: {p.mean:.4f}{' (best)' * best}"
            shapes.append(
                f'{circle * best}<circle cx="{x(p.step)}" cy="{y(p.mean)}" r="3.6" fill="{colour}">'
                f"<title>{said}</title></circle>"
            )
    return shapes


def _key(drawn: Sequence[_Series], unit: str) -> str:
    names = [
        f'<span><i style="border-color:{s.colour};{"border-top-style:dashed" * s.dots}"></i>{escape(s.name)}'
        f"{', best ringed' * (s.best is not None)}</span>"
        for s in drawn
        if s.name
    ]
    return f'<div class="key">{"".join(names)}<span>{escape(unit)}</span></div>' if names or unit else ""


def _words(run: History, *, named: bool) -> list[str]:
    """What the run answered and what was noted."""
    parts: list[str] = []
    whose = f" of {escape(run.path.resolve().name)}" * named
    if run.notes:
        parts += [f"<h2>Notes{whose}</h2>", *(f'<div class="card">{escape(note)}</div>' for note in run.notes)]
    parts += [f"<h2>Samples{whose}</h2>"] if run.samples else []
    for prompt, answers in run.samples.items():
        rows = "".join(_answer(a, best=run.best is not None and a.step == run.best.step) for a in answers)
        parts.append(f'<div class="card"><h3>{escape(prompt)}</h3><table>{rows}</table></div>')
    if run.left_out:
        rows = "".join(f"<tr><td>{escape(row)}</td></tr>" for row in run.left_out[:50])
        more = f'<p class="dim">and {len(run.left_out) - 50:,} more</p>' * (len(run.left_out) > 50)
        parts += [f"<h2>Rows left out{whose}</h2>", f'<div class="card"><table>{rows}</table>{more}</div>']
    return parts


def _answer(answer: Sampled, *, best: bool) -> str:
    return (
        f'<tr{" class=best" * best}><td class="step">step {answer.step:,}{", best" * best}</td>'
        f'<td class="text">{escape(answer.answer.strip()) or "(nothing)"}</td></tr>'
    )


def _table(rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>" for name, values in rows
    )
    return f'<div class="card"><table>{lines}</table></div>'


def _number(value: float, span: float) -> str:
    """A label of an axis, with as many digits as tell it from its neighbours."""
    if span < 1e-2:
        return f"{value:.1e}" if value else "0"
    return f"{value:,.{0 if span >= 50 else 1 if span >= 5 else 2 if span >= 0.2 else 3}f}"


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
