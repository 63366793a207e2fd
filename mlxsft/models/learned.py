"""Learned quantization on the user's rows, kept only where it beats rounding to nearest on other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.models.headers import some
from mlxsft.models.quality import Compared, Judge, finite, mean_kl
from mlxsft.models.quantize import QuantizationPlan, QuantizeSettings, Scheme, neighbours


@dataclass(frozen=True)
class Choice:
    """The better of the two ways to quantize."""

    plan: QuantizationPlan
    model: Any  # the learned one, for `Conversion.quantize`; None: the plan says all
    compared: Compared


def refuse_at_odds(method: str, settings: QuantizeSettings) -> None:
    """Raise UsageError for what mlx-lm's method has not."""
    if settings.mode != "affine":
        raise UsageError(f"--method {method} with --mode {settings.mode}", "mlx-lm has it for affine only.")
    if method != "dwq" and (settings.mixed or settings.bits_for):
        option = "--mixed" if settings.mixed else "--bits-for"
        raise UsageError(f"--method {method} with {option}: it takes one width for all", "dwq takes any.")
    if method == "dwq" and settings.default().bits == 8:
        raise UsageError("--method dwq with --bits 8: mlx-lm's dwq trains fewer bits only", "Give fewer --bits.")
    if method == "dynamic":
        neighbours(settings.default())


def learn(judge: Judge, plan: QuantizationPlan, method: str, tell: Callable[[str], None]) -> Choice:
    """What the method makes of the model at the plan's size, or the plan itself where it does not win.

    Both are judged on rows that the method did not see. Raises UsageError where the method cannot have this model.
    """
    if method != "dwq" and (left := sorted(judge.shapes.keys() - plan.modules.keys())):
        raise UsageError(
            f"--method {method}: quantizes every matrix, and {some(left)} cannot be with groups of "
            f"{plan.default.group_size}",
            "Another --group-size may divide them; dwq leaves them as they are.",
        )
    tokens = judge.calibration
    tell(f"{method}: learning from {tokens.size:,} tokens in {len(tokens)} rows")
    everything = range(len(judge.batches))
    rounded = judge.planned(plan)
    if method == "dynamic":
        other, model = _dynamic(judge, plan), None
        kl = judge.planned(other)
    else:
        other, model = plan, judge.comparison.learn(method, plan, judge.dtypes, tokens)
        kl = mean_kl(judge.comparison.learned(model, everything))
    compared = Compared(method, finite(kl), finite(rounded))
    return Choice(other, model, compared) if compared.won else Choice(plan, None, compared)


def _dynamic(judge: Judge, plan: QuantizationPlan) -> QuantizationPlan:
    """Every module narrower but those that gain most from being wider, as many as the plan's size allows."""
    low, high = neighbours(plan.default)
    gains = judge.comparison.sensitivities(low, high, judge.calibration)
    modules: dict[str, Scheme] = dict.fromkeys(plan.modules, low)
    limit, size = judge.total_size(plan), judge.total_size(replace(plan, modules=modules))
    for path in sorted(modules, key=lambda path: -gains[path]):
        more = judge.size(path, high) - judge.size(path, low)
        if size + more <= limit:
            modules[path], size = high, size + more
    return QuantizationPlan(low, modules)
