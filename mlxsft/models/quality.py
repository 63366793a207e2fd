"""What quantizing cost, measured on rows: perplexity, divergence from the unquantized model, and each module's part.

The rows go the way of training rows: rendered with the model's template, judged where training would train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlxsft.backends import Comparison, Divergence, load_comparison
from mlxsft.data.batches import Batch, batches
from mlxsft.data.render import load_renderer
from mlxsft.errors import InputRefused
from mlxsft.models.check import BUILT_IN, CheckSettings, called, read_rows, segments
from mlxsft.models.quantize import QuantizationPlan, Scheme, Shape, raised
from mlxsft.models.shards import WIDTHS, Layout
from mlxsft.models.source import ModelSource, open_model

CALIBRATION_TOKENS = 512  # of a row that is learned from
BATCH_TOKENS = 512  # computed at once
EFFECT_TOKENS = 512  # judged at least, where there are so many, to measure the effect of a module alone
WORST = 5  # modules that are shown

Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]  # passes (items, what they are, how many) through


def unwatched(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """Watch, without anybody who does."""
    return items


@dataclass(frozen=True)
class Effect:
    """What rounding one module to nearest does while all others are as they were, and what its next width costs."""

    module: str  # its path
    bits: int
    kl: float | None  # nats a token; None where the model then gives no numbers
    weight_error: float | None  # ‖quantized − plain‖ / ‖plain‖; None where that is no number
    next_bits: int  # 16: not quantized
    next_bytes: int  # more than now


@dataclass(frozen=True)
class Compared:
    """A learned quantization against rounding to nearest at the same size, on rows that it did not learn from."""

    method: str
    kl: float | None  # nats a token; None where its model gives no numbers
    rounded_kl: float | None  # nats a token, likewise

    @property
    def won(self) -> bool:
        return self.kl is not None and (self.rounded_kl is None or self.kl < self.rounded_kl)

    def sentence(self) -> str:
        verdict = "is kept" if self.won else "did not win, so that rounding is kept"
        learned, rounded = ("no number of" if kl is None else f"{kl:.3g}" for kl in (self.kl, self.rounded_kl))
        return f"{self.method} has {learned} nats a token, rounding to nearest {rounded}: it {verdict}"


@dataclass(frozen=True)
class Quality:
    """What was measured on the rows."""

    rows: str  # the file's name
    tokens: int  # judged
    base_perplexity: float  # of the unquantized model
    perplexity: float
    kl: float  # mean over tokens, nats
    changed_share: float  # of tokens, whose likeliest choice is another one; 0 to 1
    effects: list[Effect]  # of every module, the largest first
    effect_tokens: int  # judged for those
    peak_bytes: int  # of arrays in memory while it was measured
    compared: Compared | None = None  # where a method learned
    failed: str | None = None  # why what was demanded is not reached, as a sentence

    def sentence(self) -> str:
        learned = f"; {self.compared.sentence()}" if self.compared else ""
        return (
            f"on {self.tokens:,} tokens of {self.rows}: perplexity {self.base_perplexity:.4g} before and "
            f"{self.perplexity:.4g} after, KL divergence {self.kl:.3g} nats a token, "
            f"another top choice for {self.changed_share:.1%} of the tokens{learned}"
        )

    def worst(self) -> list[str]:
        """Lines of a table of the modules whose quantization moves the model most."""
        if not self.effects:
            return []
        rows = [("module", "bits", "KL alone", "weight error", "next width")]
        for e in self.effects[:WORST]:
            wider = f"{e.next_bits if e.next_bits < 16 else 'none'}: +{e.next_bytes / 1e6:.2f} MB"
            alone = "no number" if e.kl is None else f"{e.kl:.3g}"
            error = "no number" if e.weight_error is None else f"{e.weight_error:.1%}"
            rows.append((e.module, str(e.bits), alone, error, wider))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@dataclass
class Judge:
    """Measures quantized models against the checkpoint that they are made of, on rows."""

    source: ModelSource
    settings: CheckSettings
    layouts: Mapping[str, Layout]  # the tensors as they are before quantization
    shapes: Mapping[str, Shape]  # of what can be quantized, by module path
    watch: Watch = unwatched
    _effects: dict[tuple[str, Scheme], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read the rows. Raises InputRefused for those that cannot be used."""
        renderer = load_renderer(self.source)
        judged, learned, self.notes = read_rows(self.settings, renderer)
        self.batches = list(batches(judged, BATCH_TOKENS, positions=renderer.positions))
        longest = min(renderer.positions or CALIBRATION_TOKENS, CALIBRATION_TOKENS)
        self.calibration = segments(learned, longest)
        self.sample = sample(self.batches)
        self.dtypes = {name.removesuffix(".weight"): layout.dtype for name, layout in self.layouts.items()}

    @cached_property
    def comparison(self) -> Comparison:
        return load_comparison(self.source, self.batches)

    def planned(self, plan: QuantizationPlan) -> float:
        """Mean KL in nats of all judged tokens when the model is quantized so; infinite where it gives no numbers."""
        which = self.watch(range(len(self.batches)), "judging the bits chosen", len(self.batches))
        return mean_kl(self.comparison.planned(plan.modules, self.dtypes, which))

    def effect(self, path: str, scheme: Scheme) -> float:
        """Mean KL in nats of a sample of the tokens when this module alone is quantized; infinite as for `planned`."""
        if (path, scheme) not in self._effects:
            self._effects[path, scheme] = mean_kl(self.comparison.planned({path: scheme}, self.dtypes, self.sample))
        return self._effects[path, scheme]

    def weight_error(self, path: str, scheme: Scheme | None) -> float:
        return self.comparison.weight_error(path, scheme, self.dtypes[path]) if scheme else 0.0

    def size(self, path: str, scheme: Scheme | None) -> int:
        """Bytes of a module's weight."""
        layout = self.layouts[f"{path}.weight"]
        return scheme.size(layout.shape, WIDTHS[layout.dtype]) if scheme else layout.size

    def total_size(self, plan: QuantizationPlan) -> int:
        """Bytes of all tensors."""
        dense = sum(layout.size for layout in self.layouts.values())
        return dense + sum(self.size(path, scheme) - self.size(path, None) for path, scheme in plan.modules.items())

    def quality(self, folder: Path, plan: QuantizationPlan, compared: Compared | None = None) -> Quality:
        """What the checkpoint in the folder is worth, which was quantized by this plan."""
        which = self.watch(range(len(self.batches)), "judging", len(self.batches))
        found = self.comparison.stored(open_model(str(folder)), which)
        _refuse_no_numbers(found, self.source)
        modules = self.watch(list(plan.modules.items()), "each module alone", len(plan.modules))
        effects = [self._told(path, scheme, plan.default) for path, scheme in modules]
        kl = found.kl / found.tokens
        return Quality(
            rows=self._rows(),
            tokens=found.tokens,
            base_perplexity=_perplexity(found.base_loss / found.tokens),
            perplexity=_perplexity(found.loss / found.tokens),
            kl=kl,
            changed_share=found.changed / found.tokens,
            effects=sorted(effects, key=lambda effect: -math.inf if effect.kl is None else -effect.kl),
            effect_tokens=sum(int(self.batches[i].mask.sum()) for i in self.sample),
            peak_bytes=self.comparison.peak_bytes(),
            compared=compared,
            failed=self._failed(kl),
        )

    def _rows(self) -> str:
        named = self.settings.rows
        if named in (None, BUILT_IN):
            held_out = self.settings.calibration if named is None else None
            return f"rows held out of {held_out.name}" if held_out else "the built-in text"
        return called(named)

    def _told(self, path: str, scheme: Scheme, default: Scheme) -> Effect:
        wider = next(iter(raised(scheme, default, self.layouts[f"{path}.weight"].shape)))
        more = self.size(path, wider) - self.size(path, scheme)
        kl, error = finite(self.effect(path, scheme)), finite(self.weight_error(path, scheme))
        return Effect(path, scheme.bits, kl, error, wider.bits if wider else 16, more)

    def _failed(self, kl: float) -> str | None:
        limits = (("--target-kl", self.settings.target_kl), ("--max-kl", self.settings.max_kl))
        over = [f"{option} {limit:g}" for option, limit in limits if limit is not None and kl > limit]
        if not over:
            return None
        limited = self.settings.target_kl is not None and self.settings.max_bytes is not None
        within = f" within --max-size {self.settings.max_bytes}" if limited else ""
        return f"the KL divergence is {kl:.3g} nats a token{within}, over {' and '.join(over)}"


def mean_kl(found: Divergence) -> float:
    """Nats a token; infinite, and so worse than any other, where it is no number."""
    return found.kl / found.tokens if math.isfinite(found.kl) else math.inf


def finite(number: float) -> float | None:
    """The number, or None where it is none that JSON has."""
    return number if math.isfinite(number) else None


def sample(judged: Sequence[Batch]) -> list[int]:
    """Some of the batches, whatever their length, with EFFECT_TOKENS judged tokens, or all of them."""
    chosen, tokens = list[int](), 0
    for i in np.random.default_rng(0).permutation(len(judged)).tolist():
        if tokens < EFFECT_TOKENS:
            chosen.append(i)
            tokens += int(judged[i].mask.sum())
    return chosen


def _refuse_no_numbers(found: Divergence, source: ModelSource) -> None:
    if not math.isfinite(found.base_loss):
        raise InputRefused(f"{source.name}: its loss on these rows is {found.base_loss}, so nothing can be compared")
    if not math.isfinite(found.loss + found.kl):
        raise InputRefused(f"{source.name}: quantized so, its loss is {found.loss}", "Take more bits, or another mode.")


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # of a float, no more is finite
