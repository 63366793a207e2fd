"""What llama.cpp calls a model's tensors and settings, and how its numbers lie where they lie otherwise.

As llama.cpp's own convert_hf_to_gguf.py has it: https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused
from mlxsft.models.headers import some

Array = NDArray[Any]
Json = Mapping[str, Any]
Value = str | int | float | bool | list[Any]  # whole numbers become uint32, others float32


@dataclass(frozen=True)
class Family:
    """How llama.cpp computes the models of a model_type."""

    arch: str
    activation: str = "silu"
    interleaved: bool = False  # neighbours are rotated together, where Hugging Face rotates the halves of a head
    shifted_norms: bool = False  # norms multiply by 1 + weight, where llama.cpp multiplies by the weight
    head: bool = False  # the output matrix has to be there, tied or not


_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "mixtral": Family("llama", interleaved=True),
    "smollm3": Family("smollm3", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "olmo2": Family("olmo2", head=True),
    "phi3": Family("phi3"),
    "gemma2": Family("gemma2", _GELU, shifted_norms=True),
    "gemma3": Family("gemma3", _GELU, shifted_norms=True),
    "gemma3_text": Family("gemma3", _GELU, shifted_norms=True),
    "gpt2": Family("gpt2", "gelu_new"),
}
# Numbers that published files of a family leave to the default of its class.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rope_theta": 1e6},
    "gemma2": {"head_dim": 256, "sliding_window": 4096},
}
DEFAULTS["gemma3"] |= {"vocab_size": 262_208, "sliding_window": 4096, "max_position_embeddings": 131_072}
EVERY = ({"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "query_pre_attn_scalar": 256}, {"layer_norm_epsilon": 1e-5})
GPT2_NAMES = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
GPT2_NAMES |= {"n_head": "num_attention_heads", "n_inner": "intermediate_size"}

# A GPT-2 mask, angles of rotary positions: computed, not learned; and other modalities, which another file would hold.
_LEFT_OUT = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$|^(vision_tower|multi_modal_projector)\.")
_WRAPPED = re.compile(r"^(?:language_model\.model|model\.language_model|language_model|transformer|model)\.(?=\w)")
_EXPERT = re.compile(r"layers\.(\d+)\.(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w1|w2|w3)\.weight")
_EXPERTS = re.compile(r"layers\.(\d+)\.block_sparse_moe\.switch_mlp\.(gate|up|down)_proj\.weight")
_PART = {"w1": "gate", "w2": "down", "w3": "up"}
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


@dataclass(frozen=True)
class Place:
    """Where a tensor of the checkpoint goes."""

    name: str  # llama.cpp's
    expert: int | None  # which part of a stack of experts it is
    change: Callable[[Array], Array]


class Names:
    """The names of one model."""

    def __init__(self, config: Json) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self.family, self.config = family_of(config), text_config(config)
        arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.family.arch)
        self._map = get_tensor_name_map(arch, self.config["num_hidden_layers"])
        self._scale = _query_scale(self.family, self.config)

    def place(self, name: str) -> Place | None:
        """Where a tensor goes; None for what is left out. Raises InputRefused for what llama.cpp has no place for."""
        if _LEFT_OUT.search(name.removeprefix("model.")):
            return None
        bare = _WRAPPED.sub("", name)
        if found := _EXPERT.fullmatch(bare):
            return Place(f"blk.{found[1]}.ffn_{_PART[found[3]]}_exps.weight", int(found[2]), _same)
        if found := _EXPERTS.fullmatch(bare):
            return Place(f"blk.{found[1]}.ffn_{found[2]}_exps.weight", None, _same)
        whole = bare if bare.startswith(("lm_head", "h.", "wte", "wpe", "ln_f")) else f"model.{bare}"
        known: str | None = self._map.get_name(whole, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputRefused(f"{name}: llama.cpp has no place for it in a model of {self.family.arch}")
        return Place(known, None, self._change(name, known))

    def rows_of(self, place: Place) -> Callable[[Array], Array]:
        """What is done to the rows of a matrix, and so to the outputs of a LoRA's B."""
        return _same if place.change is np.transpose else place.change

    def _change(self, name: str, known: str) -> Callable[[Array], Array]:
        """What llama.cpp wants to have been done to the numbers."""
        if self.family.shifted_norms and name.endswith("norm.weight"):
            scale = self._scale if known.endswith("attn_q_norm.weight") else 1.0
            return lambda array: np.multiply(array + np.float32(1), scale, dtype=np.float32)
        found = re.search(r"\.attn_([qk])\.(?:weight|bias)$", known)
        if found and self.family.interleaved and not self.config.get("rope_traditional"):
            heads = self.config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
            return lambda array: interleaved(array, heads)
        if found and found[1] == "q" and self.family.arch == "gemma2" and self._scale != 1:
            return lambda array: np.multiply(array, self._scale, dtype=np.float32)
        # mlx-lm's own files begin with `model.` and are transposed already.
        if self.family.arch == "gpt2" and _CONV1D.search(name) and not name.startswith("model."):
            return np.transpose
        return _same


def _same(array: Array) -> Array:
    return array


def interleaved(array: Array, heads: int) -> Array:
    """The rows of each head in the order 0, n/2, 1, n/2 + 1, ..."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _query_scale(family: Family, config: Json) -> float:
    """By how much queries must be longer, so that llama.cpp's 1/√n times them is the model's own scale."""
    if not family.shifted_norms:
        return 1.0
    head = config["head_dim"]
    largest = {"gemma2": 46, "gemma3": 62}[family.arch]  # the 27B, for which llama.cpp takes another n
    implied = config["hidden_size"] / config["num_attention_heads"] if config["num_hidden_layers"] == largest else head
    return math.sqrt(implied / config["query_pre_attn_scalar"])


# ---- settings -------------------------------------------------------------------------------------------------------


def family_of(config: Json) -> Family:
    """Raises InputRefused for models that are not exported."""
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise InputRefused(
            f"config.json: model_type {kind!r} is not exported to GGUF", f"These are: {', '.join(FAMILIES)}."
        )
    return FAMILIES[kind]


def text_config(config: Json) -> dict[str, Any]:
    """config.json of the language model alone, in the names of Llama, with the numbers that a family leaves out."""
    family = family_of(config)
    inner = config.get("text_config")
    own = {k: v for k, v in {**config, **(inner if isinstance(inner, dict) else {})}.items() if v is not None}
    named = {GPT2_NAMES.get(k, k): v for k, v in own.items()} if family.arch == "gpt2" else own
    full = {**EVERY[family.arch == "gpt2"], **DEFAULTS.get(family.arch, {}), **named}
    if family.arch == "gpt2":
        full = {"intermediate_size": 4 * full.get("hidden_size", 0), **full}
    full = {"num_key_value_heads": full.get("num_attention_heads"), **full}
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    for name in needed:
        if not isinstance(full.get(name), int) or isinstance(full[name], bool) or full[name] < 1:
            raise InputRefused(f"config.json: {name} is {full.get(name)!r}, expected a whole number from 1")
    return {"head_dim": full["hidden_size"] // full["num_attention_heads"], **full}


def settings(config: Json, rows: int) -> dict[str, Value]:
    """The keys of GGUF that say how to compute the model, whose embedding has so many `rows`."""
    family, own = family_of(config), text_config(config)
    _refuse_variants(family, own)
    found: dict[str, Value] = {
        "context_length": own.get("max_position_embeddings", 2048),
        "embedding_length": own["hidden_size"],
        "block_count": own["num_hidden_layers"],
        "feed_forward_length": own["intermediate_size"],
        "vocab_size": rows,
        "attention.head_count": own["num_attention_heads"],
        "attention.head_count_kv": own["num_key_value_heads"],
        "attention.key_length": own["head_dim"],
        "attention.value_length": own["head_dim"],
    }
    if family.arch == "gpt2":
        return _keyed(family, found | {"attention.layer_norm_epsilon": own["layer_norm_epsilon"]})
    found |= {"attention.layer_norm_rms_epsilon": own["rms_norm_eps"], **_rotation(family, own)}
    if config["model_type"] == "mixtral":
        found |= {"expert_count": own["num_local_experts"], "expert_used_count": own["num_experts_per_tok"]}
    if family.arch == "phi3":
        found["attention.sliding_window"] = own.get("sliding_window", 0)
    if family.shifted_norms:
        found["attention.sliding_window"] = own["sliding_window"]
    if family.arch == "gemma3":
        found["attention.sliding_window_pattern"] = _window_pattern(own)
    caps = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    found |= {key: float(own[name]) for name, key in caps.items() if family.shifted_norms and name in own}
    return _keyed(family, found)


def _keyed(family: Family, found: Mapping[str, Value]) -> dict[str, Value]:
    numbers = {k: float(v) if "epsilon" in k or "base" in k or "factor" in k else v for k, v in found.items()}  # type: ignore[arg-type]
    return {f"{family.arch}.{key}": value for key, value in numbers.items()}


def _refuse_variants(family: Family, own: Json) -> None:
    """Settings that llama.cpp would compute otherwise, all of them at once."""
    wrong = []
    activations = ("hidden_activation", "hidden_act", "activation_function")
    activation = next((own[name] for name in activations if name in own), family.activation)
    same = {"gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"} if family.activation != "silu" else {"silu", "swish"}
    if activation not in same:
        wrong.append(f"the activation is {activation}, which llama.cpp has as {family.activation}")
    if family.arch == "gemma2" and not {"attn_logit_softcapping", "final_logit_softcapping"} <= own.keys():
        wrong.append("its soft-caps are null, and llama.cpp has them always")
    if family.arch == "smollm3":
        layers, step = own["num_hidden_layers"], own.get("no_rope_layer_interval", 4)
        rotated = own.get("no_rope_layers") or [int((i + 1) % step != 0) for i in range(layers)]
        if list(rotated) != [int((i + 1) % 4 != 0) for i in range(layers)]:
            wrong.append("other layers than every fourth are without rotary positions")
    if own.get("scale_attn_by_inverse_layer_idx") or own.get("scale_attn_weights", True) is False:
        wrong.append("its attention is scaled otherwise than GPT-2's")
    if wrong:
        raise InputRefused(f"config.json: {'; '.join(wrong)}", "llama.cpp would give other answers.")


def _window_pattern(own: Json) -> int:
    """Of how many layers one sees everything."""
    kinds = own.get("layer_types")
    pattern = own.get("sliding_window_pattern", own.get("_sliding_window_pattern", 6))
    if kinds and "full_attention" in kinds:
        pattern = kinds.index("full_attention") + 1
    expected = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(own["num_hidden_layers"])]
    if kinds and kinds != expected[: len(kinds)] and "full_attention" in kinds:
        raise InputRefused("config.json: layer_types do not repeat, which llama.cpp needs of Gemma 3")
    return int(pattern)


# ---- rotary positions -----------------------------------------------------------------------------------------------


def _rope(own: Json) -> tuple[dict[str, Any], dict[str, Any]]:
    """(how layers that see everything rotate, how those with a window do), in transformers 4's and 5's words alike."""
    said: dict[str, Any] = own.get("rope_parameters") or {}
    whole: dict[str, Any] = said.get("full_attention", said)
    old: dict[str, Any] = own.get("rope_scaling") or {}
    merged: dict[str, Any] = {"rope_theta": own.get("rope_theta", 10_000.0), **old, **whole}
    merged["rope_type"] = merged.get("rope_type") or merged.get("type") or "default"
    local = {"rope_theta": own.get("rope_local_base_freq", 10_000.0), **(said.get("sliding_attention") or {})}
    return merged, local


def _rotation(family: Family, own: Json) -> dict[str, Value]:
    """rope.* of GGUF."""
    rope, local = _rope(own)
    kind, share = rope["rope_type"], rope.get("partial_rotary_factor", own.get("partial_rotary_factor", 1.0))
    found: dict[str, Value] = {
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": int(share * own["head_dim"]),
    }
    if family.arch == "gemma3":
        found["rope.freq_base_swa"] = local["rope_theta"]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    elif kind in ("longrope", "su") and family.arch == "phi3":
        found["rope.scaling.attn_factor"] = rope.get("attention_factor") or _long_attention(own, rope)
    elif kind not in ("default", "llama3", "dynamic"):  # dynamic: nothing within the length it was trained for
        raise InputRefused(f"config.json: rotary positions of the kind {kind!r} are not exported")
    original = rope.get("original_max_position_embeddings", own.get("original_max_position_embeddings"))
    if original and kind in ("yarn", "longrope", "su"):
        found["rope.scaling.original_context_length"] = int(original)
    return found


def _long_attention(own: Json, rope: Json) -> float:
    """Phi-3's factor of attention: https://arxiv.org/abs/2402.13753"""
    trained = rope.get("original_max_position_embeddings", own.get("original_max_position_embeddings"))
    scale = own["max_position_embeddings"] / trained
    return math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0


def rotary_tensors(config: Json) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, divisors of the frequencies) that llama.cpp wants as tensors: Llama 3's and Phi-3's."""
    family, own = family_of(config), text_config(config)
    rope, _ = _rope(own)
    if rope["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(own, rope)
    if rope["rope_type"] in ("longrope", "su") and family.arch == "phi3":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32)


def _llama3_divisors(own: Json, rope: Json) -> NDArray[np.float32]:
    """transformers.modeling_rope_utils._compute_llama3_parameters, as what each frequency is divided by."""
    width = own["head_dim"]
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, width, 2) / width)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    smooth = (trained / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(waves < trained / high, 1.0, np.where(waves > trained / low, factor, between))
    return divisors.astype(np.float32)


def window_note(config: Json) -> str | None:
    """A sentence for models whose sliding window llama.cpp does not apply; None where it does as the model does."""
    own = text_config(config)
    window = own.get("sliding_window")
    applied = family_of(config).arch in ("gemma2", "gemma3", "phi3")
    if applied or not window or own.get("use_sliding_window", True) is False:
        return None
    if window >= own.get("max_position_embeddings", window):
        return None
    return f"llama.cpp does not apply the window of {window} tokens: texts longer than that are seen whole"


def refuse_incomplete(names: set[str], family: Family, layers: int) -> None:
    """Raises InputRefused where a layer has not what the first one has."""
    per_layer = [{n.split(".", 2)[2] for n in names if n.startswith(f"blk.{i}.")} for i in range(layers)]
    missing = [f"blk.{i}.{n}" for i, own in enumerate(per_layer) for n in sorted(per_layer[0] - own)]
    missing += [n for n in ("token_embd.weight", "output_norm.weight") if n not in names]
    if missing or not per_layer[0]:
        raise InputRefused(f"the checkpoint lacks {some(missing or ['every layer'])}", f"An incomplete {family.arch}.")
