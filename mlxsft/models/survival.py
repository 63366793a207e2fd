"""What a fused model has kept of its adapter: measured on rows, as the share of the adapter's own effect.

With KL the mean Kullback-Leibler divergence of the next token's distribution over judged tokens, in nats,

    share = 1 − KL(base + adapter ‖ fused) ÷ KL(base + adapter ‖ base):

1 where the fused model says what base and adapter say, 0 where it is as far from that as the base is, below 0 where
rounding has moved it further away than the adapter had moved the base. Where the adapter's own effect is not above
NOISE, there is nothing to divide by: two ways of computing the same in float32 differ by up to a tenth of that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mlxsft.backends import Comparison, Divergence, Reference, load_comparison, load_reference
from mlxsft.data.batches import batches
from mlxsft.data.render import Example, Renderer
from mlxsft.errors import InputRefused
from mlxsft.models.adapter import Adapter
from mlxsft.models.names import LAYER
from mlxsft.models.quality import BATCH_TOKENS, Watch, sample, unwatched
from mlxsft.models.quantize import Scheme
from mlxsft.models.source import ModelSource

NOISE = 1e-5  # nats a token
HELD = 0.9  # share of the effect that has to survive

Schemes = Mapping[str, Scheme | None]  # by module path; None: plain numbers


@dataclass(frozen=True)
class Survival:
    """How far a model is from base + adapter, and how much of what the adapter does that leaves."""

    rows: str  # what they are called
    tokens: int  # judged
    effect_kl: float  # KL(base + adapter ‖ base), mean over tokens in nats
    kl: float  # KL(base + adapter ‖ fused), mean over tokens in nats
    agreement: float  # share of the tokens for which the likeliest choice is that of base + adapter
    base_agreement: float  # of the base, as that

    @property
    def share(self) -> float | None:
        """Of the adapter's effect; None where it has none that could be measured."""
        return 1 - self.kl / self.effect_kl if self.effect_kl > NOISE else None

    def kept(self) -> str:
        """How much survived, in words."""
        if self.share is None:
            return "the adapter has no effect that could be measured here"
        if self.share < 0:
            return f"nothing of the tuning survived, rounding moved the model {1 - self.share:.3g} times as far as it"
        return f"{self.share:.1%} of the tuning survived"

    def sentence(self) -> str:
        return (
            f"on {self.tokens:,} tokens of {self.rows}: {self.kept()}; KL divergence {self.kl:.3g} nats a token where "
            f"the base has {self.effect_kl:.3g}, the same top choice for {self.agreement:.1%} of the tokens where the "
            f"base has {self.base_agreement:.1%}"
        )


@dataclass(frozen=True)
class Lost:
    """What rounding one layer alone does, or a module that is in no layer."""

    layer: str  # model.layers.3
    kl: float  # nats a token, KL(base + adapter ‖ base + adapter with this layer as it is written)


@dataclass
class Survivors:
    """Base and adapter in memory, side by side, and what is held against them."""

    source: ModelSource
    adapter: Adapter
    backend: str  # mlx | torch
    rows: Sequence[Example]
    called: str  # what the rows are called
    renderer: Renderer
    watch: Watch = unwatched
    _planned: dict[tuple[tuple[str, Scheme | None], ...], Survival] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batches = list(batches(self.rows, BATCH_TOKENS, positions=self.renderer.positions))

    @cached_property
    def reference(self) -> Reference:
        return self.comparison if self.backend == "mlx" else load_reference(self.source, self.batches, self.adapter)

    @cached_property
    def comparison(self) -> Comparison:
        """The reference on MLX, which quantizes."""
        return load_comparison(self.source, self.batches, self.adapter)

    @cached_property
    def effect(self) -> Divergence:
        """Of the base."""
        found = self.reference.stored(self.source, self._all("judging the base"))
        _refuse_no_numbers(found.base_loss, f"{self.source.name} with its adapter")
        _refuse_no_numbers(found.loss, self.source.name)
        return found

    def stored(self, source: ModelSource) -> Survival:
        """Of a fused checkpoint."""
        effect = self.effect  # so that no two models but the reference are in memory
        found = self.reference.stored(source, self._all("judging the fused model"))
        return self._survival(effect, found)

    def planned(self, schemes: Schemes, dtypes: Mapping[str, str]) -> Survival:
        """Of the model as it would be written with these schemes; `dtypes` as `Comparison` takes them."""
        key = tuple(sorted(schemes.items(), key=lambda item: item[0]))
        if key not in self._planned:
            which = self._all("judging the bits")
            self._planned[key] = self._survival(self.effect, self.comparison.planned(schemes, dtypes, which))
        return self._planned[key]

    def lost(self, schemes: Schemes, dtypes: Mapping[str, str]) -> list[Lost]:
        """What is lost in each layer, most first, by a part of the tokens."""
        layers: dict[str, dict[str, Scheme | None]] = defaultdict(dict)
        for path, scheme in schemes.items():
            layers[_layer_of(path)][path] = scheme
        chosen, found = sample(self.batches), []
        for layer, own in self.watch(list(layers.items()), "each layer alone", len(layers)):
            moved = self.comparison.planned(own, dtypes, chosen)
            found.append(Lost(layer, moved.kl / moved.tokens))
        return sorted(found, key=lambda lost: -lost.kl)

    def _all(self, doing: str) -> Iterable[int]:
        return self.watch(range(len(self.batches)), doing, len(self.batches))

    def _survival(self, effect: Divergence, found: Divergence) -> Survival:
        _refuse_no_numbers(found.loss + found.kl, "the fused model")
        return Survival(
            rows=self.called,
            tokens=found.tokens,
            effect_kl=effect.kl / effect.tokens,
            kl=found.kl / found.tokens,
            agreement=1 - found.changed / found.tokens,
            base_agreement=1 - effect.changed / effect.tokens,
        )


def _layer_of(path: str) -> str:
    found = LAYER.search(f"{path}.")
    return f"{path}."[: found.end() - 1] if found else path


def _refuse_no_numbers(loss: float, what: str) -> None:
    if not math.isfinite(loss):
        raise InputRefused(f"{what}: its loss on these rows is {loss}, so nothing can be compared")
