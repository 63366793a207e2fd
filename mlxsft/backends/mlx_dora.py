"""DoRA layers for MLX, https://arxiv.org/abs/2402.09353, on bases of every number format, with mlx-lm's parameters.

mlx-lm's own take the size of a 3-, 5- or 6-bit matrix wrongly, and hold every dequantized matrix of the model until the
backward pass. These multiply with the quantized matrix. The length of a row of the adapted matrix W + s·VUᵀ comes
without that matrix too: ‖wᵢ‖² + 2s·(WU)ᵢ·vᵢ + s²·vᵢ(UᵀU)vᵢᵀ.
"""

from __future__ import annotations

from typing import Any

from mlxsft.backends.blas import load_blas

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlxsft.backends.mlx_lora import LowRankLinear  # noqa: E402


class DoRALinear(LowRankLinear):
    """A linear module with a low-rank change and a trained length of each row; made from mlx-lm's LoRALinear."""

    def __init__(self, lora: Any) -> None:
        super().__init__(lora)
        self._squares = row_squares(self.linear)
        self.m = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> Any:
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        out = product(x, self.linear) + (self.scale * z).astype(x.dtype)
        lengths = row_lengths(self.linear, self._squares, self.scale, self.lora_a, self.lora_b.T)
        out = (self.m / lengths).astype(x.dtype) * out
        return out + self.linear.bias if "bias" in self.linear else out


class DoRAEmbedding(nn.Module):  # type: ignore[misc]  # MLX comes without types
    """An embedding with the same, and the head of a tied model; made from mlx-lm's LoRAEmbedding."""

    def __init__(self, lora: Any) -> None:
        super().__init__()
        self.embedding, self.dropout, self.scale = lora.embedding, lora.dropout, lora.scale
        self.lora_a, self.lora_b = lora.lora_a, lora.lora_b
        self._squares = row_squares(self.embedding)
        self.m = mx.sqrt(self._squares)

    def __call__(self, tokens: mx.array) -> Any:
        y, change = self.embedding(tokens), self.scale * (self.lora_a[tokens] @ self.lora_b)
        lengths = root(mx.square(mx.stop_gradient(y.astype(mx.float32) + change)).sum(axis=-1))
        out = y + self.dropout(change).astype(y.dtype)
        return (self.m[tokens] / lengths)[..., None].astype(y.dtype) * out

    def as_linear(self, x: mx.array) -> Any:
        z = (self.dropout(x) @ self.lora_b.T) @ self.lora_a.T
        out = product(x, self.embedding) + (self.scale * z).astype(x.dtype)
        lengths = row_lengths(self.embedding, self._squares, self.scale, self.lora_b.T, self.lora_a)
        return (self.m / lengths).astype(x.dtype) * out


def dense_weight(base: nn.Module) -> mx.array:
    """The weight of a linear module, of an embedding or of experts, float32, dequantized where it must be."""
    if "scales" not in base:
        weight: mx.array = base.weight
    else:
        weight = mx.dequantize(base.weight, base.scales, base.get("biases"), **_sizes(base))
    return weight.astype(mx.float32)


def product(x: mx.array, base: nn.Module) -> Any:
    """x [..., inputs] times the transposed weight of a linear module or an embedding, without its bias."""
    if "scales" not in base:
        return x @ base.weight.T
    return mx.quantized_matmul(x, base.weight, base.scales, base.get("biases"), transpose=True, **_sizes(base))


def _sizes(base: nn.Module) -> dict[str, Any]:
    return {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}


def row_squares(base: nn.Module) -> mx.array:
    """The squared length of each row of a weight, float32."""
    return mx.square(dense_weight(base)).sum(axis=1)


def row_lengths(base: nn.Module, squares: mx.array, scale: float, u: mx.array, v: mx.array) -> mx.array:
    """The lengths of the rows of W + scale·VUᵀ; constants for the gradient, as in section 4.3 of the paper."""
    u, v = mx.stop_gradient(u), mx.stop_gradient(v)
    crossed = product(u.T, base).T  # WU
    change = 2 * scale * (crossed * v).sum(axis=1) + scale**2 * ((v @ (u.T @ u)) * v).sum(axis=1)
    return root(squares + change)


def root(squares: mx.array) -> mx.array:
    """Lengths from their squares, none of them zero: an unused token's row is often all zeros."""
    return mx.sqrt(mx.maximum(squares, 1e-20))
