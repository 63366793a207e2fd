"""`--require` → whether a card reaches what is demanded: comparisons of metrics, read by a parser, never run."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from mlxsft.errors import UsageError
from mlxsft.evaluation.metrics import METRICS, Metric

LONGEST = 200  # characters
FIELDS = ("base", "tuned", "change", "low", "high")
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[float, float], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
}  # fmt: skip
_ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


class _Unmeasured(Exception):
    """A value that this card does not have."""


@dataclass(frozen=True)
class Requirement:
    """`heldout_loss<0.9*base`: a comparison that a card has to meet.

    A metric's name is its tuned value, `base` the base's value of the metric that is named first; `NAME.base`,
    `NAME.change`, and `NAME.low` and `NAME.high`, which bound the change, are there too.
    """

    text: str
    comparison: ast.Compare
    metric: str  # that is named first

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """Raises UsageError for what is no comparison of metrics, with the list where a metric is unknown."""
        try:
            if len(text) > LONGEST:
                raise ValueError
            body = ast.parse(text.strip(), mode="eval").body
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            body = None
        if not isinstance(body, ast.Compare):
            raise _wrong(text, "expected a comparison such as heldout_loss<0.9*base or forgetting<0.05")
        names = [node for node in ast.walk(body) if isinstance(node, ast.Name)]
        named = [name for name in names if name.id != "base"]
        for name in named:
            if name.id not in METRICS:
                raise _wrong(text, f"{name.id} is no metric", f"The metrics are {', '.join(METRICS)}.")
        if not named:
            raise _wrong(text, "no metric is named", f"The metrics are {', '.join(METRICS)}.")
        first = min(named, key=lambda name: name.col_offset)
        for part in (body.left, *body.comparators):
            _refuse_unknown(part, text)
        if not all(type(op) in _COMPARISONS for op in body.ops):
            raise _wrong(text, "a comparison is one of < <= > >= ==")
        return cls(text, body, first.id)

    def failure(self, metrics: Mapping[str, Metric]) -> str | None:
        """Why the card does not reach it, as a clause with the values; None where it does."""
        parts = [self.comparison.left, *self.comparison.comparators]
        try:
            values = [self._value(part, metrics) for part in parts]
        except _Unmeasured as missing:
            return f"{self.text}: {missing}"
        except ZeroDivisionError:
            return f"{self.text}: something is divided by zero"
        pairs = zip(self.comparison.ops, values, values[1:], strict=False)
        if all(_COMPARISONS[type(op)](a, b) for op, a, b in pairs):
            return None
        said = " and ".join(f"{value:.4g}" for value in values)
        return f"{self.text}: the sides are {said}"

    def _value(self, node: ast.expr, metrics: Mapping[str, Metric]) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return float(number)
            case ast.UnaryOp(operand=operand):
                return -self._value(operand, metrics)
            case ast.BinOp(left=left, op=op, right=right):
                return _ARITHMETIC[type(op)](self._value(left, metrics), self._value(right, metrics))
            case ast.Name(id="base"):
                return _field(metrics, self.metric, "base")
            case ast.Name(id=name):
                return _field(metrics, name, "tuned")
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return _field(metrics, name, attribute)
        raise AssertionError(ast.dump(node))  # `parse` lets nothing else through


def _field(metrics: Mapping[str, Metric], name: str, attribute: str) -> float:
    metric = metrics.get(name)
    value: float | None = None if metric is None else getattr(metric, attribute)
    if value is None:
        what = name if attribute == "tuned" else f"{name}.{attribute}"
        raise _Unmeasured(f"{what} was not measured")
    return value


def _refuse_unknown(node: ast.expr, text: str) -> None:
    """Raises UsageError for everything but numbers, metrics, their fields, and + - * / of these."""
    for part in _parts(node):
        match part:
            case ast.Constant(value=bool()):
                pass
            case ast.Constant(value=int() | float()) | ast.Name():
                continue
            case ast.UnaryOp(op=ast.USub()):
                continue
            case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
                continue
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name != "base" and attribute in FIELDS:
                continue
        raise _wrong(
            text,
            "only numbers, metrics and + - * / of them can be compared",
            f"A metric also has {', '.join(f'NAME.{f}' for f in FIELDS)}.",
        )


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """The node and all expressions in it, but for the name that a field belongs to."""
    yield node
    if not isinstance(node, ast.Attribute):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _parts(child)


def _wrong(text: str, what: str, hint: str | None = None) -> UsageError:
    return UsageError(f"--require {text!r}: {what}", hint or "`mlxsft eval --help` has the names of the metrics.")
