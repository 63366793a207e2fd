"""Bits where they help most: the order in which modules are raised, and how far, by what quantizing each alone does.

Divergence grows with the square of what is added to a weight, so a module's effect at other bits follows from the one
measured and the weight errors at both. That orders the raises, by KL saved a byte; how many of them are taken is
decided by measuring the whole model.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mlxsft.errors import UsageError
from mlxsft.models.quality import Judge
from mlxsft.models.quantize import QuantizationPlan, Scheme, raised

NO_NUMBERS = 1e9  # nats saved by raising a module that leaves the model without numbers: it comes first


@dataclass(frozen=True)
class Raise:
    """A module gets a wider scheme; None: it is not quantized."""

    module: str
    scheme: Scheme | None
    size: int  # bytes more than before


def choose_bits(judge: Judge, plan: QuantizationPlan, fixed: Collection[str]) -> QuantizationPlan:
    """The plan with as few raises as reach the target of KL, measured on all rows, or with all that the size allows.

    Modules of `fixed` stay as they are. Raises UsageError where the plan is over the size limit from the start.
    """
    target, limit = judge.settings.target_kl, judge.settings.max_bytes
    total = judge.total_size(plan)
    if limit is not None and total > limit:
        raise UsageError(
            f"--max-size {limit}: with {plan.default.bits} bits the model has {total} bytes already",
            "Give fewer --bits to start from, or a larger size.",
        )
    if target is not None and judge.planned(plan) <= target:
        return plan
    raises = []
    for more in _in_order(judge, plan, fixed):
        if limit is None or total + more.size <= limit:
            raises.append(more)
            total += more.size
    if target is None:
        return _with(plan, raises)
    low, high = 0, len(raises)  # too few, enough as far as anybody can know
    while high - low > 1:
        middle = (low + high) // 2
        if judge.planned(_with(plan, raises[:middle])) <= target:
            high = middle
        else:
            low = middle
    return _with(plan, raises[:high])


def _in_order(judge: Judge, plan: QuantizationPlan, fixed: Collection[str]) -> Iterator[Raise]:
    """Every raise of every module, the one that saves most a byte first; each module's in the order of its bits."""
    waiting: list[tuple[float, str, int]] = []  # (KL saved a byte, negative; module; which of its raises)
    steps: dict[str, list[tuple[float, Raise]]] = {}
    candidates = [(path, scheme) for path, scheme in plan.modules.items() if path not in fixed]
    for path, scheme in judge.watch(candidates, "each module alone", len(candidates)):
        steps[path] = list(_steps(judge, path, scheme, plan.default))
        heapq.heappush(waiting, (-steps[path][0][0], path, 0))
    while waiting:
        _, path, i = heapq.heappop(waiting)
        yield steps[path][i][1]
        if i + 1 < len(steps[path]):
            heapq.heappush(waiting, (-steps[path][i + 1][0], path, i + 1))


def _steps(judge: Judge, path: str, scheme: Scheme, default: Scheme) -> Iterator[tuple[float, Raise]]:
    """(KL saved a byte, raise) from each width of a module to the next."""
    effect, error = judge.effect(path, scheme), judge.weight_error(path, scheme)
    before, size = effect, judge.size(path, scheme)
    for wider in raised(scheme, default, judge.layouts[f"{path}.weight"].shape):
        after = effect * (judge.weight_error(path, wider) / error) ** 2 if error else 0.0
        more = judge.size(path, wider) - size
        saved = before - after if math.isfinite(before - after) else NO_NUMBERS
        yield saved / max(more, 1), Raise(path, wider, more)
        before, size = after, size + more


def _with(plan: QuantizationPlan, raises: list[Raise]) -> QuantizationPlan:
    wider = {more.module: more.scheme for more in raises}
    modules = {path: wider.get(path, scheme) for path, scheme in plan.modules.items()}
    return replace(plan, modules={path: scheme for path, scheme in modules.items() if scheme})
