"""How transformers and mlx-lm name the modules of one model, and which layer a module is in."""

from __future__ import annotations

import re

# Beginnings of module paths by model_type, as (transformers, mlx-lm); all other models have the same in both. A head
# comes first, because its name in mlx-lm begins as that of the layers does.
NESTED = ("gemma3", "mistral3", "qwen2_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe")  # that see, too
_NESTED = (("model.language_model.", "language_model.model."), ("lm_head", "language_model.lm_head"))
RENAMED = {
    "gpt2": (("transformer.", "model."),),
    "gptj": (("transformer.", "model."),),
    "gpt_neox": (
        *(("lm_head", "model.embed_out"), ("embed_out", "model.embed_out")),  # the second until transformers 4
        *(("gpt_neox.layers.", "model.h."), ("gpt_neox.", "model.")),
    ),
    **dict.fromkeys(NESTED, _NESTED),
}
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# GPT-2's matrices, [inputs, outputs] for transformers and turned for mlx-lm.
TURNED = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def mlx_name(kind: str, path: str) -> str:
    """What mlx-lm calls the module or tensor that transformers calls `path`, in a model of this model_type."""
    for theirs, other in RENAMED.get(kind, ()):
        if path.startswith(theirs):
            return other + path.removeprefix(theirs)
    return path


def transformers_name(kind: str, path: str) -> str:
    """The reverse of `mlx_name`."""
    for theirs, other in RENAMED.get(kind, ()):
        if path.startswith(other):
            return theirs + path.removeprefix(other)
    return path


def layer_of(path: str) -> tuple[int, str] | None:
    """(number of its layer, path within that) of a module or tensor; None where it is in no layer."""
    found = LAYER.search(path)
    return (int(found[1]), path[found.end() :]) if found else None
