"""Models that cannot be taken apart at their layers are found out, and why is said in words of models."""

from __future__ import annotations

from typing import Any

import pytest

from mlxsft.backends.mlx import mx, nn
from mlxsft.backends.mlx_head import Head
from mlxsft.backends.mlx_layers import ByLayer


class Layer(nn.Module):
    """A layer that hands on its result alone, or with something beside."""

    def __init__(self, beside: int) -> None:
        super().__init__()
        self.linear, self._beside = nn.Linear(8, 8), beside

    def __call__(self, x: mx.array) -> Any:
        x = x + self.linear(x)
        return (x, *[x.sum()] * self._beside) if self._beside else x


class Model(nn.Module):
    """Two layers, between which the model multiplies by `scale`."""

    def __init__(self, beside: int, scale: float) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.layers = [Layer(beside), Layer(beside)]
        self._beside, self._scale = beside, scale

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
            if self._beside:
                x, *_ = x
            x = x * self._scale if self._scale != 1 else x
        return self.lm_head(x)


@pytest.mark.parametrize(
    ("beside", "scale", "why"),
    [
        (0, 1.0, None),
        (1, 1.0, "its layers hand on more than one array"),
        (2, 1.0, "its layers hand on more than one array"),
        (0, 2.0, "it does more between its layers than to hand on what they give"),
    ],
)
def test_why_a_model_cannot_be_computed_layer_by_layer(beside: int, scale: float, why: str | None) -> None:
    model = Model(beside, scale)
    head = Head(model, dict)
    assert head.why_not() is None
    assert ByLayer(model, head).why_not() == why


class SecondInput(nn.Module):
    """A model whose layer gets, beside x, what a matrix outside of the layers makes of it, as in Gemma 3n."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.project, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)
        self.layers = [Sum(), Sum()]

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed_tokens(tokens)
        second = self.project(x)
        for layer in self.layers:
            x = layer(x, second)
        return self.lm_head(x)


class Sum(nn.Module):
    """A layer of two arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def __call__(self, x: mx.array, second: mx.array) -> mx.array:
        return x + self.linear(x) * second


def test_a_second_input_of_layers_must_not_be_trained() -> None:
    model = SecondInput()
    head = Head(model, dict)
    assert head.why_not() is None
    why = "its layers are given more than one array, and what makes those is trained"
    assert ByLayer(model, head).why_not() == why
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    assert ByLayer(model, head).why_not() is None
