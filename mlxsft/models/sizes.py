"""Whether the sizes in config.json can be those of a model with these tensors: before anything is made of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import psutil

from mlxsft.errors import InputRefused, OutOfResources
from mlxsft.models.checks import walk
from mlxsft.models.headers import TensorInfo

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
# Whole numbers from 1, or from 0 where some architectures have none; null is left to the architecture's default.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "vocab_size", *LAYERS), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 1),
    **dict.fromkeys(("intermediate_size", "head_dim"), 0),
}
POSITIVE = ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
COUNTS = re.compile(r"_(size|dim|heads?|layers?|experts|rank|labels|embd|inner|model)$")
FREE = 1 << 20  # a count up to this costs little, whatever is made of it
PACKED = 16  # numbers of 2 bits in one of 32


def refuse_impossible_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Counts below 1 or far beyond what is stored, of which layers and lists would be made; what is no number."""
    longest = max((size for info in tensors.values() for size in info.shape), default=0)
    most = max(FREE, PACKED * longest)
    text_config = config.get("text_config")
    for place in (config, text_config if isinstance(text_config, dict) else {}):
        for name, least in SIZES.items():
            _refuse_no_size(name, place.get(name), least)
        for name in POSITIVE:
            _refuse_no_number(name, place.get(name))
        for name in LAYERS:
            if isinstance(layers := place.get(name), int) and layers > len(tensors):
                raise InputRefused(f"config.json: {name} is {layers}, but only {len(tensors)} tensors are stored")
    for path, key, value in walk(config):
        if COUNTS.search(key) and isinstance(value, (int, float)) and not abs(value) <= most:
            raise InputRefused(f"config.json: {path} is {value}, more than any of the tensors is long")


def layer_count(config: Mapping[str, Any]) -> int:
    """The number of layers of a model, by its config.json; 0 where it does not say."""
    text_config = config.get("text_config")
    for place in (text_config if isinstance(text_config, dict) else {}, config):
        for name in LAYERS:
            if isinstance(layers := place.get(name), int):
                return layers
    return 0


def _refuse_no_size(name: str, value: object, least: int) -> None:
    """A list has one for each layer, and may leave some out."""
    if value is None or isinstance(value, list):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputRefused(f"config.json: {name} is {value!r}, expected a whole number from {least}")


def _refuse_no_number(name: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputRefused(f"config.json: {name} is {value!r}, expected a number above 0")


def refuse_beyond_memory(what: str, size: int) -> None:
    """More bytes than this machine has memory: reading them would end this process, and others."""
    memory = psutil.virtual_memory().total + psutil.swap_memory().total
    if size > memory:
        raise OutOfResources(
            f"{what}: holds {size / 2**30:,.1f} GiB, and this machine has {memory / 2**30:,.1f} GiB of memory",
            "Take a smaller or a quantized one.",
        )
