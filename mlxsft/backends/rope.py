"""Rotary positions: what transformers 5 writes into config.json, said as mlx-lm reads it, and checked in its model.

transformers 5 writes `rope_parameters` and no longer `rope_theta` and `rope_scaling`, which most of mlx-lm's models
read: they would take the default of their class in silence, and rotate by other angles than the model was trained with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused

Floats = NDArray[np.float64]
Rotation = tuple[Floats, float]  # radians per position, and by how much a rotated number is multiplied

# The module of one attention: nn.RoPE, Llama3RoPE, YarnRoPE, DeepseekV2YarnRotaryEmbedding, ...
ROTARY = re.compile(r"rope|rotary", re.IGNORECASE)


def complete_rope(config: dict[str, Any]) -> None:
    """Add rope_theta, rope_scaling, ... to a config.json that has only rope_parameters; what is there stays."""
    for place in _places(config):
        rope = place["rope_parameters"]
        nested = _nested(rope)
        _spread(place, nested.get("full_attention", next(iter(nested.values()))) if nested else rope)
        if "rope_theta" in nested.get("sliding_attention", {}):  # Gemma 3
            _fill(place, rope_local_base_freq=nested["sliding_attention"]["rope_theta"])


def _places(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parts of a config.json that have rope_parameters: the whole, and what it says of the text model."""
    for place in (config, config.get("text_config")):
        if isinstance(place, dict) and isinstance(place.get("rope_parameters"), dict) and place["rope_parameters"]:
            yield place


def _nested(rope: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{type of layer: its parameters} where they differ by layer, else empty; a type without rotation has none."""
    return {k: own for k, own in rope.items() if k.endswith("_attention") and isinstance(own, dict) and own}


def _fill(place: dict[str, Any], **values: Any) -> None:
    """Set what is absent or null."""
    place.update({name: value for name, value in values.items() if place.get(name) is None})


def _spread(place: dict[str, Any], rope: dict[str, Any]) -> None:
    """Say one set of parameters under the names of transformers 4."""
    named = dict(rope)
    kind = named.pop("rope_type", None) or named.pop("type", None) or "default"
    if (theta := named.pop("rope_theta", None)) is not None:
        _fill(place, rope_theta=theta, rotary_emb_base=theta)  # the latter is GPT-NeoX's name
    if (share := named.pop("partial_rotary_factor", None)) is not None:
        _fill(place, partial_rotary_factor=share, rotary_pct=share)
        if head := _head_size(place):
            _fill(place, rotary_dim=int(head * share))
    if kind == "default":
        place.setdefault("rope_scaling", None)  # some models want it said
    else:
        _fill(place, rope_scaling={**named, "type": kind, "rope_type": kind})  # old models read `type`


def _head_size(place: dict[str, Any]) -> int | None:
    """How many numbers of a head there are for rotation."""
    for name in ("qk_rope_head_dim", "head_dim"):
        if isinstance(size := place.get(name), int) and size > 0:
            return size
    width, heads = place.get("hidden_size"), place.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads > 0 else None


# ---- LongRoPE -------------------------------------------------------------------------------------------------------


def add_short_factors(model: nn.Module, config: dict[str, Any]) -> None:
    """Let LongRoPE (Phi-3, Phi-4-mini) rotate texts within the original limit as transformers does.

    It has two lists of factors, by the length of the text; mlx-lm takes the long one always.
    """
    text = config.get("text_config")
    for place in (config, text if isinstance(text, dict) else {}):
        rope = place.get("rope_scaling")
        if not isinstance(rope, dict) or not {"short_factor", "long_factor"} <= rope.keys() or "short_mscale" in rope:
            continue
        ratio = mx.array(np.array(rope["short_factor"]) / np.array(rope["long_factor"]), dtype=mx.float32)
        for module in model.modules():
            if type(module).__name__ == "SuScaledRoPE":
                module._short_freqs = module._freqs * ratio
                module.__class__ = _by_length(type(module))


def _by_length(plain: Any) -> type:
    """mlx-lm's class, with the short factors up to the original limit."""

    def call(self: Any, x: mx.array, offset: Any = 0) -> mx.array:
        if not isinstance(offset, int) or offset + x.shape[-2] > self.original_max_position_embeddings:
            turned: mx.array = plain.__call__(self, x, offset)
            return turned
        x = x.at[..., : self.dim].multiply(self._scale)
        return mx.fast.rope(
            x, self.dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._short_freqs
        )

    return type(plain.__name__, (plain,), {"__call__": call, "__module__": plain.__module__})


# ---- the check ------------------------------------------------------------------------------------------------------


def refuse_other_rotation(model: Any, config: dict[str, Any], where: str) -> None:
    """Raise InputRefused where a layer rotates by other angles than config.json's rope_parameters say."""
    for place in _places(config):
        rope, kinds = place["rope_parameters"], place.get("layer_types") or []
        nested = _nested(rope)
        for index, layer in enumerate(getattr(model, "layers", [])):
            own = [nested[kinds[index]]] if index < len(kinds) and kinds[index] in nested else list(nested.values())
            expected = [rotation for parameters in own or [rope] if (rotation := _rotation(place, parameters))]
            for rotary in filter(_is_rotary, layer.modules()):
                if expected and not any(_same(rotary, rotation) for rotation in expected):
                    raise InputRefused(
                        f"{where}: mlx-lm does not read all of this model's rope_parameters: layer {index} would "
                        f"rotate by other angles than config.json says with {_written(own or [rope])}",
                        f"mlx-lm's {config.get('model_type')!r} lacks this; `pip install -U mlx-lm` may bring it.",
                    )


def _written(parameters: list[dict[str, Any]]) -> str:
    return " or ".join(", ".join(f"{name} {value}" for name, value in sorted(p.items())) for p in parameters)[:200]


def _is_rotary(module: nn.Module) -> bool:
    return bool(ROTARY.search(type(module).__name__)) and _dims(module) is not None and not module.children()


def _dims(module: nn.Module) -> int | None:
    found = (getattr(module, name, None) for name in ("dims", "dim"))
    return next((size for size in found if isinstance(size, int)), None)


def _same(rotary: nn.Module, rotation: Rotation) -> bool:
    """Whether a module turns pairs of numbers as it should; pairs are neighbours, or halves of a head apart."""
    angles, factor = rotation
    if (dims := _dims(rotary)) is None or dims != 2 * len(angles):
        return False
    pairs = np.arange(dims).reshape(-1, 2), np.arange(dims).reshape(2, -1).T
    for first, second in (pair.T for pair in pairs):
        unit = np.zeros((1, 1, 1, dims), np.float32)
        unit[..., first] = 1
        with mx.stream(mx.cpu):  # a GPU's fast sine is not exact
            turned = np.array(rotary(mx.array(unit), offset=1)).astype(np.float64).reshape(-1)
        length, angle = np.hypot(turned[first], turned[second]), np.arctan2(turned[second], turned[first])
        if np.allclose(length, factor, rtol=1e-4) and np.allclose(angle, angles, rtol=1e-3, atol=1e-9):
            return True
    return False


def _rotation(place: dict[str, Any], rope: dict[str, Any]) -> Rotation | None:
    """What transformers computes from rope_parameters, for short texts; None for a type that is not known here."""
    head, theta = _head_size(place), rope.get("rope_theta")
    law = LAWS.get(rope.get("rope_type") or rope.get("type") or "default")
    if law is None or head is None or theta is None:
        return None
    share = rope.get("partial_rotary_factor")
    dims = int(head * (1.0 if share is None else share))
    return law(theta ** -(np.arange(0, dims, 2) / dims), {"dims": dims, **rope}, place)


def _unscaled(angles: Floats, rope: dict[str, Any], place: dict[str, Any]) -> Rotation:
    return angles, 1.0


def _linear(angles: Floats, rope: dict[str, Any], place: dict[str, Any]) -> Rotation:
    return angles / rope["factor"], 1.0


def _llama3(angles: Floats, rope: dict[str, Any], place: dict[str, Any]) -> Rotation:
    """Long waves are stretched by the factor, short ones stay, with a ramp between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * angles / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - kept) * angles / rope["factor"] + kept * angles, 1.0


def _yarn(angles: Floats, rope: dict[str, Any], place: dict[str, Any]) -> Rotation:
    """As llama3, the ramp along the index of a pair; and all rotated numbers grow."""
    dims, original, factor = rope["dims"], rope["original_max_position_embeddings"], rope["factor"]

    def index(turns: float) -> float:
        return float(dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"])))

    low, high = index(rope.get("beta_fast") or 32), index(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    stretched = np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)
    return stretched * angles / factor + (1 - stretched) * angles, _yarn_growth(rope, factor)


def _yarn_growth(rope: dict[str, Any], factor: float) -> float:
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    return growth(rope["mscale"]) / growth(rope["mscale_all_dim"]) if both else growth(1)


def _longrope(angles: Floats, rope: dict[str, Any], place: dict[str, Any]) -> Rotation:
    """A factor for each pair; another list of them, for texts longer than the original limit, is left out here."""
    original = place.get("original_max_position_embeddings") or rope["original_max_position_embeddings"]
    factor = rope.get("factor") or place["max_position_embeddings"] / original
    growth = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    given = rope.get("attention_factor")
    return angles / np.array(rope["short_factor"]), growth if given is None else float(given)


LAWS: dict[str, Callable[[Floats, dict[str, Any], dict[str, Any]], Rotation]] = {
    "default": _unscaled,
    "dynamic": _unscaled,  # up to the positions that the model was made for
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
