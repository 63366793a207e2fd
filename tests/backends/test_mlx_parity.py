"""Families of models as transformers 5 saves them: the same losses as transformers' own, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mlxsft.backends.mlx import MlxBackend
from mlxsft.data.batches import Batch
from mlxsft.errors import InputRefused
from mlxsft.models.source import open_model
from tests.tiny import write_tokenizer

SIZES = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False},
    **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"moe_intermediate_size": 24, "first_k_dense_replace": 1},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
HALF = {"partial_rotary_factor": 0.5}
TIED = {"tie_word_embeddings": True}
WINDOWS = {
    **{"sliding_window": 16, "num_hidden_layers": 4},
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": {},
    "cohere": TIED,
    "cohere2": TIED | WINDOWS,
    "deepseek_v3": ROUTED | LATENT | {"num_key_value_heads": 4},
    "dots1": ROUTED | {"head_dim": 8, "sliding_window": None, "layer_types": ["full_attention"] * 2},
    "ernie4_5": {"head_dim": 8},
    "gemma": TIED | {"head_dim": 8},
    "gemma2": TIED | {"head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gemma3_text": TIED | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "num_hidden_layers": 6},
    "glm4": HALF | {"head_dim": 8},
    "glm4_moe": HALF | ROUTED | {"head_dim": 8},
    "gpt_neox": HALF | {"intermediate_size": 128},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "lfm2": TIED | {"layer_types": ["conv", "full_attention"]},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nemotron": HALF,
    "olmo2": {},
    "olmo3": WINDOWS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": HALF,
    "phi3": {"sliding_window": None},
    "qwen2": {},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "smollm3": {"num_hidden_layers": 4},
    "stablelm": HALF,
    "starcoder2": {},
}
NESTED = {"gemma3_text": 30.0, "olmo3": 50.0}  # theta of the layers with a window
# mlx-lm takes another form of GELU, or rounds Gemma's scale of the embeddings to bfloat16.
INEXACT = {"gemma": 2e-3, "gemma3_text": 2e-3, "gpt_neox": 2e-3, "starcoder2": 2e-3}

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 4.0, 5.0]}
TOKENS = np.random.default_rng(0).integers(4, 256, (2, 48), dtype=np.int32)


def save(folder: Path, family: str, rope: dict[str, Any], **changes: Any) -> Path:
    """A random model as transformers saves it, its weights so large that positions matter."""
    fields = SIZES | FAMILIES.get(family, {}) | changes
    rope = {"rope_type": "default", "rope_theta": 50.0, **rope}
    if "partial_rotary_factor" in fields:
        rope["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
    if family in NESTED:
        local = {"rope_type": "default", "rope_theta": NESTED[family]}
        rope = {"full_attention": rope, "sliding_attention": local}
    config = AutoConfig.for_model(family, vocab_size=write_tokenizer(folder), rope_parameters=rope, **fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    return folder


def ours(folder: Path) -> np.ndarray:
    mask = np.ones(TOKENS.shape, bool)
    mask[:, 0] = False
    return MlxBackend(open_model(str(folder))).losses(Batch(TOKENS, mask))[:, 1:]


def theirs(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return np.asarray(losses.numpy())


def change_rope(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    rope.get("full_attention", rope).update(values)
    if config["model_type"] == "olmo3" and "rope_theta" in values:  # one theta for all layers is all that mlx-lm has
        rope["sliding_attention"].update(values)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_losses_of_transformers(tmp_path: Path, family: str) -> None:
    folder = save(tmp_path, family, {})
    losses = ours(folder)
    np.testing.assert_allclose(losses, theirs(folder), rtol=1e-5, atol=INEXACT.get(family, 1e-4))
    change_rope(folder, rope_theta=5.0)
    assert np.abs(ours(folder) - losses).max() > 0.05


@pytest.mark.parametrize("scaling", [LLAMA3, LINEAR, YARN], ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3", "gemma3_text", "olmo3"])
def test_stretched_positions_are_those_of_transformers(tmp_path: Path, family: str, scaling: dict[str, Any]) -> None:
    folder = save(tmp_path, family, scaling)
    losses = ours(folder)
    np.testing.assert_allclose(losses, theirs(folder), rtol=1e-5, atol=INEXACT.get(family, 1e-4))
    change_rope(folder, factor=2.0)
    assert np.abs(ours(folder) - losses).max() > 0.05


@pytest.mark.parametrize("original", [16, 60])
def test_longrope_takes_its_factors_by_the_length_of_the_text(tmp_path: Path, original: int) -> None:
    limits = {"original_max_position_embeddings": original, "max_position_embeddings": 4 * original}
    folder = save(tmp_path, "phi3", LONG | {"factor": 4.0, "original_max_position_embeddings": original}, **limits)
    losses = ours(folder)
    np.testing.assert_allclose(losses, theirs(folder), rtol=1e-5, atol=1e-4)
    change_rope(folder, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    assert np.abs(ours(folder) - losses).max() > 0.05


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("qwen3_moe", YARN),
        ("cohere2", LINEAR),
        ("mixtral", LLAMA3),
        ("glm", HALF),
        ("llama", YARN | {"attention_factor": 2.0}),
    ],
)
def test_what_mlx_lm_does_not_read_is_refused(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    folder = save(tmp_path, family, rope, head_dim=8)
    with pytest.raises(InputRefused, match="mlx-lm does not read all of this model's rope_parameters: layer 0"):
        MlxBackend(open_model(str(folder)))


def test_another_theta_at_the_top_is_refused(tmp_path: Path) -> None:
    """transformers believes rope_parameters, mlx-lm the old key."""
    folder = save(tmp_path, "llama", {})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 60.0}))
    with pytest.raises(InputRefused, match=r"rope_theta 50\.0"):
        MlxBackend(open_model(str(folder)))


def test_layers_with_another_theta_are_refused_where_mlx_lm_has_one(tmp_path: Path) -> None:
    folder = save(tmp_path, "olmo3", {"rope_theta": 70.0})
    with pytest.raises(InputRefused, match=r"layer 0 would rotate .* rope_theta 50\.0"):
        MlxBackend(open_model(str(folder)))


def test_experts_chosen_by_a_tensor_that_mlx_lm_drops(tmp_path: Path) -> None:
    sizes = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0}
    folder = save(tmp_path, "ernie4_5_moe", {}, **sizes)
    with pytest.raises(InputRefused, match="e_score_correction_bias: mlx-lm does not read this tensor"):
        MlxBackend(open_model(str(folder)))
