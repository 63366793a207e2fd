"""Adapters on MLX: what is tuned, and that mlx-lm reads what comes out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsft.backends.initial_values import initial_lora_a
from mlxsft.backends.mlx import MlxBackend, mx, nn
from mlxsft.backends.mlx_models import mlx_lm, target_keys
from mlxsft.data.batches import Batch
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.source import ModelSource
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from tests.backends.conftest import learned_adapter, losses_of, make_batch

Trainer = Callable[..., MlxBackend]
LINEAR = [
    "mlp.down_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
]


def modules(backend: MlxBackend) -> set[str]:
    return {name.rpartition(".")[0] for name in backend.adapter_state()}


# ---- a new adapter --------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_begins_as_the_seam_says(llama: ModelSource, trainer: Trainer) -> None:
    batch = make_batch()
    backend = trainer(learned=False)
    assert np.array_equal(backend.losses(batch), MlxBackend(llama).losses(batch))
    state = backend.adapter_state()
    name = "model.layers.1.mlp.down_proj.lora_a"
    assert np.array_equal(state[name], initial_lora_a(name, 0, (64, 4)))
    assert not state["model.layers.1.mlp.down_proj.lora_b"].any()
    assert len(state) == 2 * 2 * len(LINEAR)


@pytest.mark.parametrize(
    ("layers", "targets", "expected"),
    [
        ("all", "all-linear", {f"model.layers.{i}.{path}" for i in (0, 1) for path in LINEAR}),
        (1, "all-linear", {f"model.layers.1.{path}" for path in LINEAR}),
        ("all", ("q_proj",), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (1, ("self_attn.v_proj", "up_proj"), {"model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"}),
        (1, ("model.embed_tokens",), {"model.embed_tokens"}),
        (1, ("o_proj", "model.embed_tokens"), {"model.layers.1.self_attn.o_proj", "model.embed_tokens"}),
        (
            1,
            ("all-linear", "model.embed_tokens"),
            {"model.embed_tokens", *(f"model.layers.1.{path}" for path in LINEAR)},
        ),
    ],
)
def test_targets(trainer: Trainer, layers: Any, targets: Any, expected: set[str]) -> None:
    backend = trainer(AdapterRecipe(rank=2, alpha=4.0, layers=layers, targets=targets))
    assert modules(backend) == expected


def test_targets_that_match_nothing_are_all_named(trainer: Trainer) -> None:
    with pytest.raises(UsageError) as caught:
        trainer(AdapterRecipe(targets=("q_prj", "o_proj", "input_layernorm", "proj")))
    assert "is named q_prj, input_layernorm, proj; did you mean q_proj" in caught.value.message
    assert caught.value.hint is not None
    assert "down_proj, gate_proj, k_proj" in caught.value.hint
    assert "model.embed_tokens" in caught.value.hint


def test_a_head_that_is_the_embedding_is_said_to_be_so(trainer: Trainer) -> None:
    with pytest.raises(UsageError) as caught:
        trainer(AdapterRecipe(targets=("lm_head",)))
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("v_proj. This model has no head of its own; its embeddings are that too.")


def test_more_layers_than_there_are(trainer: Trainer) -> None:
    with pytest.raises(UsageError, match=r"adapter\.layers: 3, but the model has 2 layers"):
        trainer(AdapterRecipe(layers=3))


# ---- experts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture() -> Any:
    """A random mixture of four experts, two layers, as mlx-lm builds it."""
    mlx_lm("utils")
    from mlx_lm.models.mixtral import Model, ModelArgs

    mx.random.seed(0)
    arguments = ModelArgs(
        model_type="mixtral",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = Model(arguments)
    model.freeze()
    return model


def test_all_linear_takes_the_experts_and_leaves_the_router(mixture: Any) -> None:
    experts = [f"block_sparse_moe.switch_mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert target_keys(mixture, 2, "all-linear") == sorted([*experts, *LINEAR[3:]])
    assert target_keys(mixture, 2, ("gate",)) == ["block_sparse_moe.gate"]  # by name it can be had
    assert target_keys(mixture, 1, ("lm_head",)) == ["lm_head"]


def with_experts(trainer: Trainer, mixture: Any, adapter: AdapterRecipe, **train: Any) -> MlxBackend:
    backend = trainer()
    backend.model = copy.deepcopy(mixture)
    backend.attach(adapter, seed=0)
    backend.optimize(TrainRecipe(checkpoint_activations=True, **train))
    return backend


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"init": "pissa"}, {"kind": "full"}], ids=str)
@pytest.mark.parametrize("bits", [None, 4])
def test_experts_are_trained(mixture: Any, trainer: Trainer, settings: dict[str, Any], bits: int | None) -> None:
    if bits is not None and "kind" in settings:
        return
    base = copy.deepcopy(mixture)
    if bits is not None:
        nn.quantize(base, group_size=32, bits=bits)
    lora = {"rank": 2, "alpha": 4.0} if "kind" not in settings else {}
    backend = with_experts(trainer, base, AdapterRecipe.model_validate(settings | lora))
    if "dropout" in settings:
        name = "model.layers.0.block_sparse_moe.switch_mlp.up_proj.lora_a"
        assert np.array_equal(backend.adapter_state()[name], initial_lora_a(name, 0, (4, 2, 32)))
    before = base(mx.array([[3, 4, 5]]))
    np.testing.assert_allclose(np.array(backend.model(mx.array([[3, 4, 5]]))), np.array(before), atol=1e-5)
    losses = losses_of(backend, steps=10, vocabulary=64)
    assert losses[-1] < 0.9 * losses[0]


def test_muon_trains_a_stack_of_experts(mixture: Any, trainer: Trainer) -> None:
    losses = losses_of(with_experts(trainer, mixture, AdapterRecipe(rank=2), optimizer="muon"), vocabulary=64)
    assert losses[-1] < 0.95 * losses[0]


def test_experts_take_no_dora(mixture: Any, trainer: Trainer) -> None:
    with pytest.raises(UsageError, match=r"switch_mlp\.\w+ takes no DoRA: .* LoRASwitchLinear"):
        with_experts(trainer, mixture, AdapterRecipe(kind="dora"))
    attention = AdapterRecipe(kind="dora", targets=("q_proj", "v_proj"))
    losses = losses_of(with_experts(trainer, mixture, attention), vocabulary=64)
    assert losses[-1] < losses[0]


def test_full_tuning_of_all_takes_the_router_too(mixture: Any, trainer: Trainer) -> None:
    router = "model.layers.0.block_sparse_moe.gate.weight"
    assert router in with_experts(trainer, mixture, AdapterRecipe(kind="full")).adapter_state()
    linear = AdapterRecipe(kind="full", targets="all-linear")
    assert router not in with_experts(trainer, mixture, linear).adapter_state()


# ---- in and out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", 1])
def test_mlx_lm_loads_the_adapter(tmp_path: Path, llama: ModelSource, trainer: Trainer, layers: Any) -> None:
    backend = trainer(AdapterRecipe(rank=4, alpha=6.0, layers=layers, dropout=0.1, targets=("q_proj", "mlp.up_proj")))
    config = backend.adapter_config()
    assert config == {
        "fine_tune_type": "lora",
        "num_layers": 2 if layers == "all" else 1,
        "lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.1, "keys": ["mlp.up_proj", "self_attn.q_proj"]},
    }
    save_adapter(tmp_path, backend.adapter_state(), config)
    batch = make_batch()
    model, _ = mlx_lm("utils").load(str(llama.folder), adapter_path=str(tmp_path))
    logits = model(mx.array(batch.tokens[:, :-1]))
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    expected = -np.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0] * batch.mask[:, 1:]
    np.testing.assert_allclose(backend.losses(batch)[:, 1:], expected, rtol=1e-5, atol=1e-6)


def test_a_saved_adapter_comes_back(tmp_path: Path, llama: ModelSource, trainer: Trainer) -> None:
    backend, batch = trainer(), make_batch()
    save_adapter(tmp_path, backend.adapter_state(), backend.adapter_config())
    saved = load_adapter(tmp_path)
    again = MlxBackend(llama)
    again.attach_saved(saved.config, saved.tensors)
    assert np.array_equal(again.losses(batch), backend.losses(batch))
    assert again.adapter_config() == backend.adapter_config()


def test_an_adapter_that_does_not_fit_is_refused_with_every_tensor(llama: ModelSource, trainer: Trainer) -> None:
    backend = trainer()
    config, tensors = backend.adapter_config(), backend.adapter_state()
    missing, wrong = "model.layers.0.mlp.up_proj.lora_b", "model.layers.1.self_attn.q_proj.lora_a"
    del tensors[missing]
    tensors[wrong] = np.zeros((32, 5), dtype=np.float32)
    tensors["model.layers.7.mlp.up_proj.lora_b"] = np.zeros((4, 64), dtype=np.float32)
    with pytest.raises(InputRefused) as caught:
        MlxBackend(llama).attach_saved(config, tensors)
    assert f"{missing}: is missing, expected (4, 64)" in caught.value.message
    assert f"{wrong}: got (32, 5), expected (32, 4)" in caught.value.message
    assert "model.layers.7.mlp.up_proj.lora_b: the model has no such tensor" in caught.value.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "ia3", "num_layers": 1, "lora_parameters": {}}, "fine_tune_type is 'ia3'"),
        ({"num_layers": 1}, "lora_parameters"),
        ({"num_layers": 1, "lora_parameters": {"rank": 4, "alpha": 8}}, "'alpha' instead"),
        ({"num_layers": 1, "lora_parameters": {"rank": 4, "scale": 1.0, "keys": ["mlp"]}}, "MLP"),
    ],
)
def test_an_adapter_config_that_makes_no_layers(llama: ModelSource, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        MlxBackend(llama).attach_saved(config, {})


def test_a_real_adapter_of_another_model_is_refused(real: Path, llama: ModelSource) -> None:
    saved = load_adapter(real / "adapters" / "mlx-qwen2.5-0.5b-identity")
    with pytest.raises(InputRefused, match="does not fit this model"):
        MlxBackend(llama).attach_saved(saved.config, saved.tensors)


def test_training_goes_on_from_a_saved_adapter(llama: ModelSource, trainer: Trainer) -> None:
    first = trainer()
    second = MlxBackend(llama)
    second.attach_saved(first.adapter_config(), learned_adapter(first))
    assert second.parameters() == first.parameters()
    batch: Batch = make_batch()
    second.optimize(TrainRecipe())
    assert second.accumulate(batch) == first.accumulate(batch)
    assert second.apply(1e-3, 1.0) == first.apply(1e-3, 1.0)
