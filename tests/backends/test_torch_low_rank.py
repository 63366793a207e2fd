"""LoRA on PyTorch in place: PEFT's outputs and gradients, whatever the base is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import Linear

from mlxsft.backends.torch import TorchBackend
from mlxsft.backends.torch_adapters import low_rank_layers
from mlxsft.backends.torch_low_rank import LowRank
from mlxsft.models.source import open_model
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.test_mlx_parity import save

KINDS = {
    "in-place": AdapterRecipe(rank=4, alpha=8.0),
    "dora": AdapterRecipe(kind="dora", rank=4, alpha=8.0),
    "dropout": AdapterRecipe(rank=4, alpha=8.0, dropout=0.2),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["in-the-middle", "nothing-trained-below"])
def test_gradients_are_those_of_finite_differences(biased: bool, first: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = (
        torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (6, 5), (6,), (2, 5), (6, 2))
    )
    x.requires_grad_(not first)
    a.requires_grad_()
    b.requires_grad_()
    arguments = (x, weight, bias if biased else None, a, b, 0.7)
    assert torch.autograd.gradcheck(LowRank.apply, arguments)
    assert LowRank.apply(*arguments).requires_grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_give_what_pefts_own_forward_gives(tmp_path: Path, family: str, kind: str) -> None:
    """Without biases, with them, and with GPT-2's turned matrices; DoRA and dropout are left to PEFT."""
    backend = TorchBackend(open_model(str(save(tmp_path, family, {}, tie_word_embeddings=True))))
    backend.attach(KINDS[kind], seed=0)
    layers = [layer for layer in low_rank_layers(backend.model).values() if isinstance(layer, Linear)]
    assert layers
    torch.manual_seed(0)
    for layer in layers:
        assert ("forward" in layer.__dict__) == (kind == "in-place")
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        found = []
        for forward in (layer.forward, lambda x, own=layer: type(own).forward(own, x)):
            x = torch.linspace(-1, 1, 2 * 3 * layer.in_features).reshape(2, 3, -1).requires_grad_()
            layer.zero_grad()
            y = forward(x)
            y.square().sum().backward()
            found.append([y.detach(), x.grad, layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
