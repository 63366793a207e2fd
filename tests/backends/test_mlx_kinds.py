"""Every kind of adapter on MLX: unchanged at the start, PEFT's gradient, mlx-lm's logits, exact when resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlxsft.backends.mlx import MlxBackend, mx, tree_flatten
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.data.batches import Batch
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import OPTIMIZERS, AdapterRecipe
from tests.backends.conftest import (
    leave_little_memory,
    losses_of,
    make_batch,
    quantized_llama,
    rows_of,
    training,
)
from tests.tiny import write_llama

Trainer = Callable[..., MlxBackend]
WHOLE = ("all-linear", "model.embed_tokens")
LORA = AdapterRecipe(rank=4, alpha=8.0, targets=WHOLE)
RSLORA = AdapterRecipe(rank=4, alpha=8.0, rslora=True)
DORA = AdapterRecipe(kind="dora", rank=4, alpha=8.0, targets=WHOLE)
PISSA = AdapterRecipe(rank=4, alpha=8.0, init="pissa", targets=WHOLE)
FULL = AdapterRecipe.model_validate({"kind": "full", "targets": ("all", "model.embed_tokens", "model.norm")})
KINDS = {"lora": LORA, "rslora": RSLORA, "dora": DORA, "pissa": PISSA, "full": FULL}
kinds = pytest.mark.parametrize("adapter", KINDS.values(), ids=KINDS)


def mlx_lm_losses(folder: Path, adapter: Path, batch: Batch) -> np.ndarray:
    """[B, T-1] of mlx-lm's model with the saved adapter."""
    model, _ = mlx_lm("utils").load(str(folder), adapter_path=str(adapter))
    model.set_dtype(mx.float32)
    logits = model(mx.array(batch.tokens[:, :-1]))
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return -np.take_along_axis(logprobs, batch.tokens[:, 1:, None], axis=-1)[..., 0] * batch.mask[:, 1:]


# ---- start, out and in ----------------------------------------------------------------------------------------------


@kinds
def test_a_new_adapter_changes_nothing(llama: ModelSource, trainer: Trainer, adapter: AdapterRecipe) -> None:
    batch = make_batch()
    expected = MlxBackend(llama).losses(batch)
    np.testing.assert_allclose(trainer(adapter, learned=False).losses(batch), expected, rtol=1e-5, atol=1e-5)


@kinds
def test_a_saved_adapter_comes_back_and_mlx_lm_loads_it(
    tmp_path: Path, llama: ModelSource, trainer: Trainer, adapter: AdapterRecipe
) -> None:
    backend, batch = trainer(adapter), make_batch()
    losses_of(backend, steps=3)
    expected = backend.losses(batch)
    save_adapter(tmp_path, backend.adapter_state(), backend.adapter_config())
    saved, again = load_adapter(tmp_path), MlxBackend(llama)
    again.attach_saved(saved.config, saved.tensors)
    np.testing.assert_allclose(again.losses(batch), expected, rtol=1e-6, atol=1e-6)
    assert again.adapter_config() == backend.adapter_config()
    assert again.parameters()[0] == backend.parameters()[0]
    np.testing.assert_allclose(mlx_lm_losses(llama.folder, tmp_path, batch), expected[:, 1:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("adapter", "bits"), [(LORA, 3), (LORA, 4), (PISSA, 6), (DORA, 4), (DORA, 8)])
@pytest.mark.parametrize("packed", [True, False])
def test_mlx_lm_loads_an_adapter_of_a_quantized_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: AdapterRecipe, bits: int, packed: bool
) -> None:
    if adapter.kind == "dora":  # mlx-lm has none for quantized embeddings
        adapter = adapter.model_copy(update={"targets": "all-linear"})
    source, batch = quantized_llama(tmp_path, bits, dtype="float32"), make_batch()
    if packed:
        leave_little_memory(monkeypatch)
    backend = training(source, adapter)
    assert losses_of(backend, steps=3)[-1] > 0
    save_adapter(tmp_path / "run", backend.adapter_state(), backend.adapter_config())
    found = mlx_lm_losses(source.folder, tmp_path / "run", batch)
    np.testing.assert_allclose(found, backend.losses(batch)[:, 1:], rtol=1e-4, atol=1e-4)


FORMATS = [(2, "affine"), (5, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8"), (4, "nvfp4"), (4, "mixed_3_6")]


@pytest.mark.parametrize(("bits", "mode"), FORMATS)
def test_lora_on_a_quantized_base_is_lora_on_the_dequantized_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, mode: str
) -> None:
    mixed = mode if mode.startswith("mixed") else None
    source = quantized_llama(tmp_path, bits, "affine" if mixed else mode, dtype="float32", mixed=mixed)
    expected = losses_of(training(source, LORA, learned=False), rate=3e-3)
    leave_little_memory(monkeypatch)
    packed = training(source, LORA, learned=False)
    linear = [m.linear for layer in packed.model.layers for _, m in layer.named_modules() if "lora_a" in m]
    assert all("scales" in module for module in linear)
    assert {module.bits for module in linear} == ({3, 6} if mixed else {bits})
    found = losses_of(packed, rate=3e-3)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.99 * found[0]


# ---- PEFT -----------------------------------------------------------------------------------------------------------

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# PEFT asks transformers under a name that transformers has given up.
from_peft = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def peft_model(folder: Path, rank: int = 4, **settings: Any) -> Any:
    """With the scale 2."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, **settings)
    return peft.get_peft_model(base, config).eval()


def peft_parameters(model: Any, name: str) -> torch.nn.Parameter:
    """PEFT's parameter for one of mlx-lm's names."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(f"base_model.model.{path}")
    if leaf == "m":
        return module.lora_magnitude_vector["default"].weight
    return {"lora_a": module.lora_A, "lora_b": module.lora_B}[leaf]["default"].weight


def load_into_peft(model: Any, state: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        for name, array in state.items():
            peft_parameters(model, name).copy_(torch.from_numpy(array.T.copy()))


def peft_losses(model: Any, batch: Batch) -> torch.Tensor:
    """[B, T-1]: the cross-entropy of each trained token."""
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    logits = model(tokens).logits[:, :-1].transpose(1, 2)
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    return losses * torch.from_numpy(batch.mask[:, 1:])


def peft_backward(model: Any, batch: Batch) -> None:
    (peft_losses(model, batch).sum() / batch.mask.sum()).backward()


def first_gradient(backend: MlxBackend, batch: Batch) -> dict[str, np.ndarray]:
    """The gradient, from the velocity of SGD after one update."""
    backend.accumulate(batch)
    backend.apply(1e-3, None)
    state = backend.optimizer_state()
    return {name.partition(".")[2]: array for name, array in state.items() if name.startswith("velocity.")}


@from_peft
@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        (AdapterRecipe(rank=4, alpha=8.0), {}),
        (RSLORA, {"use_rslora": True}),
        (AdapterRecipe(kind="dora", rank=4, alpha=8.0), {"use_dora": True}),
    ],
    ids=["lora", "rslora", "dora"],
)
def test_the_gradient_is_pefts(
    llama: ModelSource, trainer: Trainer, adapter: AdapterRecipe, settings: dict[str, Any]
) -> None:
    backend, batch, model = trainer(adapter, optimizer="sgd"), make_batch(), peft_model(llama.folder, **settings)
    load_into_peft(model, backend.adapter_state())
    peft_backward(model, batch)
    for name, gradient in first_gradient(backend, batch).items():
        expected = peft_parameters(model, name).grad.numpy().T
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@from_peft
def test_pissa_begins_as_pefts(llama: ModelSource, trainer: Trainer) -> None:
    """Up to the sign of each singular vector, which is nobody's choice."""
    adapter = AdapterRecipe(rank=4, alpha=8.0, init="pissa")
    backend, batch = trainer(adapter, optimizer="sgd", learned=False), make_batch()
    model = peft_model(llama.folder, init_lora_weights="pissa")
    state = backend.adapter_state()
    peft_backward(model, batch)
    for name, gradient in first_gradient(backend, batch).items():
        expected = peft_parameters(model, name)
        trained = state[name][:, :4] if name.endswith("a") else state[name][:4]
        np.testing.assert_allclose(np.abs(trained), np.abs(expected.detach().numpy().T), atol=1e-3, err_msg=name)
        size = np.abs(expected.grad.numpy().T)
        np.testing.assert_allclose(np.abs(gradient), size, atol=5e-3 * size.max(), err_msg=name)


@from_peft
def test_a_trained_pissa_is_an_ordinary_lora_for_peft(llama: ModelSource, trainer: Trainer) -> None:
    backend, batch = trainer(AdapterRecipe(rank=4, alpha=8.0, init="pissa"), learned=False), make_batch()
    losses_of(backend)
    model = peft_model(llama.folder, rank=8)
    load_into_peft(model, backend.adapter_state())
    with torch.no_grad():
        expected = peft_losses(model, batch).numpy()
    np.testing.assert_allclose(backend.losses(batch)[:, 1:], expected, rtol=1e-5, atol=2e-5)


# ---- PiSSA ----------------------------------------------------------------------------------------------------------


def test_pissa_is_a_lora_of_twice_the_rank_whose_second_half_stays(trainer: Trainer) -> None:
    backend = trainer(PISSA, learned=False, weight_decay=0.1)
    parameters = backend.adapter_config()["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (8, 2.0)
    before = backend.adapter_state()
    losses = losses_of(backend)
    assert losses[-1] < 0.95 * losses[0]
    after = backend.adapter_state()
    a, b = "model.layers.0.mlp.up_proj.lora_a", "model.layers.0.mlp.up_proj.lora_b"
    assert before[a].shape == (32, 8)
    assert np.array_equal(before[a][:, 4:], after[a][:, 4:])
    assert np.array_equal(before[b][4:], after[b][4:])
    assert np.array_equal(before[b][:4], -before[b][4:])
    assert not np.array_equal(before[a][:, :4], after[a][:, :4])
    assert backend.parameters()[1] == sum(array.size for array in before.values()) // 2


def test_pissa_needs_as_many_singular_values(trainer: Trainer) -> None:
    with pytest.raises(UsageError, match=r"adapter\.rank: 17, but .*[kv]_proj has 16 singular values"):
        trainer(AdapterRecipe(rank=17, init="pissa", targets=("k_proj", "v_proj")))


# ---- LoRA+ ----------------------------------------------------------------------------------------------------------


def test_loraplus_lets_b_learn_faster(trainer: Trainer) -> None:
    plain, plus = (
        trainer(optimizer="sgd"),
        trainer(AdapterRecipe(rank=4, alpha=8.0, loraplus_lr_ratio=16.0), optimizer="sgd"),
    )
    start = plain.adapter_state()
    losses_of(plain, steps=1, rate=0.1)
    losses_of(plus, steps=1, rate=0.1)
    one, other = plain.adapter_state(), plus.adapter_state()
    for name in start:
        ratio = 16.0 if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(other[name] - start[name], ratio * (one[name] - start[name]), rtol=0.01, atol=1e-7)


# ---- full -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "targets", "expected"),
    [
        (1, "all", {"input_layernorm", "post_attention_layernorm", *LINEAR}),
        (1, "all-linear", set(LINEAR)),
        (1, ("q_proj", "input_layernorm"), {"q_proj", "input_layernorm"}),
        (1, ("model.norm", "model.embed_tokens", "lm_head"), {"norm", "embed_tokens", "lm_head"}),
    ],
)
def test_full_trains_what_is_named(tmp_path: Path, layers: Any, targets: Any, expected: set[str]) -> None:
    source = open_model(str(write_llama(tmp_path, tied=False)))
    backend = training(source, AdapterRecipe(kind="full", layers=layers, targets=targets), learned=False)
    names = set(backend.adapter_state())
    assert {name.split(".")[-2] for name in names} == expected
    assert not any(".layers.0." in name for name in names)
    losses = losses_of(backend)
    assert losses[-1] < losses[0] - 2
    assert backend.parameters()[0] == MlxBackend(source).parameters()[0]


def test_full_tunings_gradient_is_pytorchs(llama: ModelSource, trainer: Trainer) -> None:
    backend, batch = trainer(FULL, learned=False, optimizer="sgd"), make_batch()
    model = AutoModelForCausalLM.from_pretrained(llama.folder, dtype=torch.float32, attn_implementation="eager").eval()
    peft_backward(model, batch)
    for name, gradient in first_gradient(backend, batch).items():
        expected = model.get_parameter(name).grad.numpy()
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("packed", [True, False])
def test_a_quantized_base_has_no_weights_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    if packed:
        leave_little_memory(monkeypatch)
    with pytest.raises(UsageError, match=r"adapter\.kind: full, but the model is quantized: 14 modules, model"):
        training(quantized_llama(tmp_path), AdapterRecipe(kind="full"))


def test_small_updates_of_half_precision_weights_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained numbers are float32, whatever the model computes with."""
    leave_little_memory(monkeypatch)
    folder = write_llama(tmp_path / "base")
    mlx_lm("utils")
    from mlx_lm.convert import convert

    convert(str(folder), str(tmp_path / "half"), dtype="bfloat16")
    backend = training(open_model(str(tmp_path / "half")), AdapterRecipe(kind="full"), learned=False)
    before = backend.adapter_state()
    losses_of(backend, steps=4, rate=1e-6)
    after = backend.adapter_state()
    assert {array.dtype for _, array in tree_flatten(backend.model.parameters())} == {mx.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    assert 2e-6 < np.abs(after[name] - before[name]).max() < 5e-6


def test_a_full_adapter_that_does_not_fit_is_refused(llama: ModelSource) -> None:
    tensors = {"model.norm.weight": np.ones(5, np.float32), "model.layers.9.mlp.weight": np.ones(3, np.float32)}
    with pytest.raises(InputRefused) as caught:
        MlxBackend(llama).attach_saved({"fine_tune_type": "full"}, tensors)
    assert "model.layers.9.mlp.weight: the model has no such tensor" in caught.value.message
    assert "model.norm.weight: got (5,), expected (32,)" in caught.value.message
    assert "is missing" not in caught.value.message


# ---- resumed --------------------------------------------------------------------------------------------------------


def go(backend: MlxBackend, steps: range) -> None:
    for step in steps:
        for part in rows_of(make_batch(seed=step), 4):
            backend.accumulate(part)
        backend.apply(1e-3, 1.0)


@pytest.mark.parametrize(
    ("adapter", "optimizer"),
    [*((AdapterRecipe(rank=4, dropout=0.2), name) for name in OPTIMIZERS), *((kind, "adamw") for kind in (DORA, PISSA)),
     (FULL, "muon"), (FULL, "adafactor")],
)  # fmt: skip
def test_a_resumed_run_is_the_same_bit_for_bit(trainer: Trainer, adapter: AdapterRecipe, optimizer: str) -> None:
    settings: dict[str, Any] = {"optimizer": optimizer, "weight_decay": 0.1, "neftune_alpha": 5.0}
    straight, begun, resumed = (trainer(adapter, learned=False, **settings) for _ in range(3))
    go(straight, range(4))
    go(begun, range(2))
    resumed.load_adapter_state(begun.adapter_state())
    resumed.load_optimizer_state(begun.optimizer_state())
    go(resumed, range(2, 4))
    assert_identical(straight.adapter_state(), resumed.adapter_state())
    assert_identical(straight.optimizer_state(), resumed.optimizer_state())


def assert_identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@kinds
def test_activations_computed_again_make_the_same_updates(trainer: Trainer, adapter: AdapterRecipe) -> None:
    kept, again = trainer(adapter), trainer(adapter, checkpoint_activations=True)
    go(kept, range(3))
    go(again, range(3))
    one, other = kept.adapter_state(), again.adapter_state()
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 2e-6
