"""The arithmetic of a LoRA beside a frozen matrix, without the arrays that PEFT's layer makes on the way.

PEFT's forward pass makes the base's output, the adapter's, the scaled one and their sum, each as large as the output.
Here there is one, to which the adapter is added as the last step of a product; so it is in the backward pass. Beside
the time this saves the holes that freed arrays leave: glibc does not put an array of the same size into one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn


def without_detours(layer: nn.Module, name: str) -> None:
    """Let a LoRA layer of PEFT, without dropout and DoRA, compute the same in place; others stay as they are."""
    plain = isinstance(layer, Linear) and name not in layer.lora_variant  # DoRA is a variant
    if plain and isinstance(layer.lora_dropout[name], nn.Identity):
        layer.forward = partial(_forward, layer, name)


def _forward(layer: Any, name: str, x: torch.Tensor) -> torch.Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A[name].weight, layer.lora_B[name].weight
    weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # of GPT-2's Conv1D
    added: torch.Tensor = LowRank.apply(x, weight, base.bias, a, b, layer.scaling[name])
    return added


class LowRank(torch.autograd.Function):  # type: ignore[misc]  # torch is taken without its types
    """x Wᵀ + bias + scale · x Aᵀ Bᵀ, with gradients in x, A [rank, inputs] and B [outputs, rank]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.T
        out = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        out.addmm_(inner, b.T, alpha=scale)
        ctx.save_for_backward(x, inner, weight, a, b)
        ctx.scale = scale
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, weight, a, b = ctx.saved_tensors
        rows = slope.reshape(-1, slope.shape[-1])
        into_inner = (rows @ b).mul_(ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (rows @ weight).addmm_(into_inner, a).view(x.shape)
        of_a = into_inner.T @ x.reshape(-1, x.shape[-1])
        of_b = (rows.T @ inner).mul_(ctx.scale)
        return of_x, None, None, of_a, of_b, None
