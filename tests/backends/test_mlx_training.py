"""One update on MLX: equal to PyTorch's, the same for every division into micro-batches, exact when resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.data.batches import Batch
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from tests.backends.conftest import ADAPTER, learned_adapter, make_batch, rows_of

Trainer = Callable[..., MlxBackend]
DROPOUT = AdapterRecipe(rank=4, alpha=8.0, dropout=0.3)


def largest_difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


def run(backend: MlxBackend, steps: range, *, rows: int = 8, rate: float = 1e-2) -> None:
    """Updates of 8 rows each, `rows` at a time."""
    for step in steps:
        for part in rows_of(make_batch(seed=step), rows):
            backend.accumulate(part)
        backend.apply(rate, 1.0)


def reference(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def reference_losses(
    model: torch.nn.Module, batch: Batch, weights: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """[B, T]: the cross-entropy of each trained token by transformers' forward pass, 0 elsewhere."""
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    logits = torch.func.functional_call(model, weights or {}, (tokens,)).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return torch.nn.functional.pad(losses, (1, 0)) * torch.from_numpy(batch.mask)


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_transformers(llama: ModelSource) -> None:
    batch = make_batch()
    losses = MlxBackend(llama).losses(batch)
    assert losses.dtype == np.float32
    assert losses.shape == batch.tokens.shape
    assert not losses[~batch.mask].any()
    with torch.no_grad():
        expected = reference_losses(reference(llama.folder), batch).numpy()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-656k-llama", "tinystories-656k-llama-original"])
def test_losses_of_real_checkpoints_are_those_of_transformers(real: Path, name: str) -> None:
    folder = real / "models" / name
    batch = make_batch(rows=4, width=64, vocabulary=500)
    losses = MlxBackend(open_model(str(folder))).losses(batch)
    with torch.no_grad():
        expected = reference_losses(reference(folder), batch).numpy()
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_accumulate_returns_the_sum_of_the_losses(trainer: Trainer) -> None:
    backend, batch = trainer(), make_batch()
    loss, trained = backend.accumulate(batch)
    assert trained == int(batch.mask.sum())
    assert loss == pytest.approx(float(backend.losses(batch).sum()), rel=1e-6)


def test_label_smoothing_is_pytorchs_and_stays_out_of_validation(llama: ModelSource, trainer: Trainer) -> None:
    backend, batch = trainer(label_smoothing=0.1, learned=False), make_batch()
    assert np.array_equal(backend.losses(batch), trainer(learned=False).losses(batch))
    tokens = torch.from_numpy(batch.tokens.astype(np.int64))
    with torch.no_grad():
        logits = reference(llama.folder)(tokens).logits[:, :-1].transpose(1, 2)
    smooth = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none", label_smoothing=0.1)
    expected = float((smooth * torch.from_numpy(batch.mask[:, 1:])).sum())
    assert backend.accumulate(batch)[0] == pytest.approx(expected, rel=1e-5)


# ---- the gradient ---------------------------------------------------------------------------------------------------


def test_the_gradient_is_pytorchs(llama: ModelSource, trainer: Trainer) -> None:
    backend, batch = trainer(), make_batch()
    adapter = {name: torch.tensor(array, requires_grad=True) for name, array in backend.adapter_state().items()}
    backend.accumulate(batch)
    norm = backend.apply(1e-3, None)
    model, scale = reference(llama.folder), ADAPTER.alpha / ADAPTER.rank
    weights = {}
    for name in {name.rpartition(".")[0] for name in adapter}:
        delta = scale * (adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]).T
        weights[f"{name}.weight"] = model.get_parameter(f"{name}.weight").detach() + delta
    (reference_losses(model, batch, weights).sum() / batch.mask.sum()).backward()
    moments = backend.optimizer_state()  # after one update, the first moment is a tenth of the gradient
    for name, tensor in adapter.items():
        np.testing.assert_allclose(10 * moments[f"first.{name}"], tensor.grad.numpy(), rtol=1e-4, atol=1e-6)
    expected = torch.linalg.vector_norm(torch.cat([tensor.grad.flatten() for tensor in adapter.values()]))
    assert norm == pytest.approx(float(expected), rel=1e-5)


def drift(one: MlxBackend, other: MlxBackend) -> tuple[float, float]:
    """The largest and the mean difference of the adapters' values."""
    a, b = one.adapter_state(), other.adapter_state()
    differences = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in a])
    return float(differences.max()), float(differences.mean())


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("adapter", "noise"), [(ADAPTER, None), (DROPOUT, 5.0)], ids=["plain", "dropout and noise"])
def test_micro_batches_make_the_same_updates(
    trainer: Trainer, adapter: AdapterRecipe, noise: float | None, rows: int
) -> None:
    """8 = 2 × 4 = 8 × 1, over a trajectory of 20 updates that moves values by up to 0.016."""
    whole, parts = (trainer(adapter, neftune_alpha=noise) for _ in range(2))
    run(whole, range(20), rate=1e-3)
    run(parts, range(20), rate=1e-3, rows=rows)
    largest, mean = drift(whole, parts)
    assert largest < 1e-6
    assert mean < 1e-7


def test_micro_batches_have_the_same_gradient(trainer: Trainer) -> None:
    norms = []
    for rows in (8, 4, 1):
        backend = trainer()
        for part in rows_of(make_batch(), rows):
            backend.accumulate(part)
        norms.append(backend.apply(1e-3, None))
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-6)


def test_padding_changes_nothing(trainer: Trainer) -> None:
    batch = make_batch()
    wider = Batch(np.pad(batch.tokens, ((0, 0), (0, 9))), np.pad(batch.mask, ((0, 0), (0, 9))))
    backend = trainer()
    norms = []
    for each in (batch, wider):
        backend.accumulate(each)
        norms.append(backend.apply(0.0, None))
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# ---- the update -----------------------------------------------------------------------------------------------------


def test_updates_are_those_of_torch_adamw(trainer: Trainer) -> None:
    backend = trainer(weight_decay=0.1, beta1=0.8, beta2=0.95)
    names = list(backend.adapter_state())
    ours = backend.adapter_state()
    theirs = [torch.nn.Parameter(torch.tensor(ours[name])) for name in names]
    optimizer = torch.optim.AdamW(theirs, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    before = backend.optimizer_state()
    for step in range(8):
        rate = 1e-3 * (step + 1)
        backend.accumulate(make_batch(seed=step))
        backend.apply(rate, None)
        after = backend.optimizer_state()
        for name, parameter in zip(names, theirs, strict=True):  # the gradient, from what it did to the first moment
            first = f"first.{name}"
            parameter.grad = torch.tensor((after[first].astype(np.float64) - 0.8 * before[first]) / 0.2).float()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        before = after
    for name, parameter in zip(names, theirs, strict=True):
        np.testing.assert_allclose(backend.adapter_state()[name], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert before["step"].tolist() == [8.0]


def test_the_gradient_is_clipped_by_its_norm(trainer: Trainer) -> None:
    def first_moments(clip_norm: float | None) -> tuple[float, dict[str, np.ndarray]]:
        backend = trainer()
        backend.accumulate(make_batch())
        norm = backend.apply(1e-3, clip_norm)
        return norm, {n: a for n, a in backend.optimizer_state().items() if n.startswith("first.")}

    norm, free = first_moments(None)
    same_norm, clipped = first_moments(norm / 4)
    _, loose = first_moments(norm * 2)
    assert same_norm == norm  # what is returned is the norm before clipping
    assert np.sqrt(sum(np.square(10 * a).sum() for a in clipped.values())) == pytest.approx(norm / 4, rel=1e-5)
    assert largest_difference({n: a / 4 for n, a in free.items()}, clipped) < 1e-8
    assert largest_difference(free, loose) == 0


def test_a_step_that_is_not_finite_leaves_no_trace(trainer: Trainer) -> None:
    straight, hurt = trainer(), trainer()
    run(straight, range(2))
    run(hurt, range(2))
    good = hurt.adapter_state(), hurt.optimizer_state()
    broken = {name: np.full_like(array, 1e30) for name, array in good[0].items()}
    hurt.load_adapter_state(broken)
    loss, _ = hurt.accumulate(make_batch())
    assert not np.isfinite(loss)
    hurt.accumulate(make_batch(seed=1))
    assert not np.isfinite(hurt.apply(1e-2, 1.0))
    assert largest_difference(hurt.adapter_state(), broken) == 0
    assert largest_difference(hurt.optimizer_state(), good[1]) == 0
    hurt.load_adapter_state(good[0])
    run(straight, range(2, 4))
    run(hurt, range(2, 4))
    assert largest_difference(straight.adapter_state(), hurt.adapter_state()) == 0


def test_an_update_needs_a_trained_token(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match="nothing was accumulated"):
        trainer().apply(1e-3, None)


# ---- dropout, activations, state ------------------------------------------------------------------------------------


def test_dropout_depends_on_seed_step_and_row_alone(trainer: Trainer) -> None:
    batch = make_batch()
    others = replace(batch, numbers=np.indices(batch.tokens.shape)[0] + 8)

    def losses(seed: int) -> list[float]:
        backend = trainer(DROPOUT, seed=seed)
        found = []
        for _ in range(2):
            found += [backend.accumulate(batch)[0], backend.accumulate(others)[0]]
            backend.losses(batch)  # no dropout, and no influence on the next one
            mx.random.seed(len(found))  # nor has the global state
            assert backend.accumulate(batch)[0] == found[-2]
            backend.apply(0.0, None)
        return found

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 8
    plain = trainer().losses(batch)
    assert np.array_equal(trainer(DROPOUT).losses(batch), plain)


def test_dropout_keeps_the_expected_value(trainer: Trainer) -> None:
    backend, plain, batch = trainer(DROPOUT, seed=3), trainer(), make_batch()
    rows = np.indices(batch.tokens.shape)[0]
    mean = np.mean([backend.accumulate(replace(batch, numbers=rows + 8 * i))[0] for i in range(40)])
    assert mean == pytest.approx(plain.accumulate(batch)[0], rel=0.02)


def test_activations_computed_again_make_the_same_updates(llama: ModelSource, trainer: Trainer) -> None:
    """With dropout: the zeros of the second computation must be those of the first."""
    kept, again = trainer(DROPOUT), trainer(DROPOUT, checkpoint_activations=True)
    other = MlxBackend(llama)
    run(kept, range(20), rows=4, rate=1e-3)
    run(again, range(20), rows=4, rate=1e-3)
    largest, mean = drift(kept, again)
    assert largest < 1e-6
    assert mean < 1e-7
    assert {type(layer) for layer in again.model.layers} == {type(other.model.layers[0])}


def test_a_resumed_run_is_the_same_bit_for_bit(trainer: Trainer) -> None:
    straight, begun = trainer(DROPOUT), trainer(DROPOUT)
    run(straight, range(6), rows=4)
    run(begun, range(3), rows=4)
    resumed = trainer(DROPOUT, learned=False)
    resumed.load_adapter_state(begun.adapter_state())
    resumed.load_optimizer_state(begun.optimizer_state())
    run(resumed, range(3, 6), rows=4)
    assert largest_difference(straight.adapter_state(), resumed.adapter_state()) == 0
    assert largest_difference(straight.optimizer_state(), resumed.optimizer_state()) == 0


def test_state_that_does_not_fit_is_named(trainer: Trainer) -> None:
    backend = trainer()
    state = backend.optimizer_state()
    name = sorted(state)[0]
    with pytest.raises(InputRefused, match=f"{name}: is missing"):
        backend.load_optimizer_state({n: a for n, a in state.items() if n != name})


def test_facts(llama: ModelSource, trainer: Trainer) -> None:
    backend = trainer()
    base = sum(int(np.prod(info.shape)) for info in llama.tensors.values())
    # rank 4 × (inputs + outputs) of q, k, v, o, gate, up and down, in two layers
    trained = 2 * 4 * ((32 + 32) + (32 + 16) + (32 + 16) + (32 + 32) + (32 + 64) + (32 + 64) + (64 + 32))
    assert backend.parameters() == (base + trained, trained)
    assert backend.device == "cpu"
    assert backend.peak_bytes() > 4 * base


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles for the CPU with g++")
@pytest.mark.parametrize("train", [{}, {"checkpoint_activations": True, "label_smoothing": 0.1}])
def test_the_step_compiled_as_on_the_gpu_makes_the_same_updates(
    llama: ModelSource, trainer: Trainer, train: dict[str, object]
) -> None:
    plain = trainer(**train)
    compiled = MlxBackend(llama)
    compiled._compiled = True
    mx.enable_compile()
    try:
        compiled.attach(ADAPTER, seed=0)
        compiled.load_adapter_state(learned_adapter(compiled))
        compiled.optimize(TrainRecipe.model_validate({"steps": 1, **train}))
        run(compiled, range(6), rate=1e-3)
    finally:
        mx.disable_compile()
    run(plain, range(6), rate=1e-3)
    assert largest_difference(plain.adapter_state(), compiled.adapter_state()) < 1e-6
