"""mlx-lm's learned quantization, on rows that are given: its commands would download text of their own.

Each works on the whole model in memory. AWQ scales and clips weights by what flows through them, GPTQ rounds column by
column and moves the error on, DWQ trains scales and biases on the unquantized model's answers, and dynamic tells from
gradients which modules need more bits.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxsft.backends.blas import load_blas
from mlxsft.errors import InputRefused

load_blas()  # before MLX is imported, which would take its own

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from mlxsft.backends.mlx_models import LOADING_ERRORS, mlx_lm  # noqa: E402

if TYPE_CHECKING:
    from mlxsft.models.quantize import QuantizationPlan, Scheme

Tokens = NDArray[np.int32]  # [N, T]
BATCH_ROWS = 4  # computed at once
# Of dwq: shorter rows give more updates; where they are few they are taken again.
DWQ_TOKENS = 128
DWQ_STEPS = 64
DWQ_RATE = 1e-4  # mlx-lm's 1e-6 is meant for thousands of rows


def sensitivities(model: nn.Module, low: Scheme, high: Scheme, tokens: Tokens) -> dict[str, float]:
    """What each module would gain from `high` over `low`, per parameter, by the gradient of the KL divergence."""
    with _of_mlx_lm("dynamic_quant", "dynamic") as quant:
        widths = (low.bits, low.group_size, high.bits, high.group_size)
        return dict(quant.estimate_sensitivities(model, mx.array(tokens), *widths, batch_size=BATCH_ROWS))


def learned(
    method: str, model: nn.Module, model_type: str, plan: QuantizationPlan, quantized: nn.Module, tokens: Tokens
) -> nn.Module:
    """The model quantized by a method as the plan says; `quantized` is the model rounded by it, which dwq begins with.

    Raises InputRefused where mlx-lm's method cannot do that.
    """
    return _METHODS[method](model, model_type, plan, quantized, tokens)


def _awq(model: nn.Module, model_type: str, plan: QuantizationPlan, quantized: nn.Module, tokens: Tokens) -> nn.Module:
    scheme, trial = plan.default, copy.deepcopy(model)
    with _of_mlx_lm("awq", "awq") as quant:
        if model_type not in quant.AWQ_MODEL_CONFIGS:
            known = ", ".join(sorted(quant.AWQ_MODEL_CONFIGS))
            raise InputRefused(f"--method awq: mlx-lm has it for {known}, and not for {model_type}", "Try dwq.")
        embedding = {"embed_bits": scheme.bits, "embed_group_size": scheme.group_size}
        config, widths = quant.AWQ_MODEL_CONFIGS[model_type], {"bits": scheme.bits, "group_size": scheme.group_size}
        quant.awq_quantize(trial, mx.array(tokens), config, **widths, **embedding)
    return trial


def _gptq(model: nn.Module, model_type: str, plan: QuantizationPlan, quantized: nn.Module, tokens: Tokens) -> nn.Module:
    scheme, trial = plan.default, copy.deepcopy(model)
    if scheme.bits not in (2, 4, 8):
        raise InputRefused(f"--method gptq: mlx-lm has it for 2, 4 and 8 bits, and not for {scheme.bits}", "Try dwq.")
    with _of_mlx_lm("gptq", "gptq") as quant:
        widths = (scheme.bits, scheme.group_size)
        quant.gptq_quantize(trial, mx.array(tokens), *widths, *widths, batch_size=BATCH_ROWS)
    return trial


def _dwq(model: nn.Module, model_type: str, plan: QuantizationPlan, quantized: nn.Module, tokens: Tokens) -> nn.Module:
    length = DWQ_TOKENS if tokens.size % DWQ_TOKENS == 0 else tokens.shape[1]
    rows = [(row, 0) for row in tokens.reshape(-1, length).tolist()]
    size = min(BATCH_ROWS, len(rows))
    again = -(-DWQ_STEPS * size // len(rows))
    with _of_mlx_lm("dwq", "dwq") as quant:
        quant.dwq_quantize(
            quantized,
            lambda batch, index, split: model(batch),
            optimizers.Adam(learning_rate=DWQ_RATE, bias_correction=True),
            rows * again,
            rows[:size],
            batch_size=size,
            max_seq_length=length,
            seed=0,
            dtype=mx.float32,
        )
    quantized.eval()
    return quantized


_METHODS: dict[str, Callable[..., nn.Module]] = {"awq": _awq, "gptq": _gptq, "dwq": _dwq}


@contextmanager
def _of_mlx_lm(module: str, method: str) -> Iterator[Any]:
    """A module of mlx_lm.quant that says nothing on our terminal; what it raises is an InputRefused."""
    quant = mlx_lm(f"quant.{module}")
    plain = quant.tqdm

    class Silent(plain):  # type: ignore[misc, valid-type]  # a class at run time
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        @classmethod
        def write(cls, *args: Any, **kwargs: Any) -> None:
            pass

    quant.tqdm, state = Silent, np.random.get_state()
    mx.random.seed(0)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield quant
    except LOADING_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise InputRefused(
            f"--method {method}: mlx-lm's {method} fails on this model: {reason}", "Leave out --method, or try dwq."
        ) from error
    finally:
        quant.tqdm = plain
        np.random.set_state(state)
