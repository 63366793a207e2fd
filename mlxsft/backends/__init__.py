"""The seam: what training, evaluation and chat ask of an array library, at the level of a step.

Sums cross it, never means: losses are summed nats, gradients are added up inside, and `apply` divides by the trained
tokens of the whole step. One row at a time, all rows at once and two machines therefore make the same update.
`backends/mlx.py` and `backends/torch.py` have the same verbs in the same order, so that they read side by side.
Converting and fusing are the other things that are asked: tensors cross one by one, as bytes (`Rewrite`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import UsageError

if TYPE_CHECKING:
    from mlxsft.data.batches import Batch
    from mlxsft.models.adapter import Adapter
    from mlxsft.models.quantize import QuantizationPlan, Scheme
    from mlxsft.models.shards import Layout
    from mlxsft.models.source import ModelSource
    from mlxsft.recipe_training import AdapterRecipe, TrainRecipe

Tensors = Mapping[str, NDArray[Any]]
Watch = Callable[[int, NDArray[np.float32]], None]  # a token, and the log-probabilities [V] it was chosen from, in nats
# What one answer may go on with: the token that was chosen last, None before the first → whether each token may be
# chosen next. It is asked once for every token, and also behind the end, where a backend computes ahead.
Constraint = Callable[[int | None], NDArray[np.bool_]]

# How a launcher tells a process its rank: mlx.launch and `mlxsft train --ranks`, Open MPI, other MPIs.
RANK_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


class Ranks(Protocol):
    """The processes that train one model together, each on its share of every update's rows."""

    rank: int  # of this process, from 0; rank 0 alone writes
    count: int

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        """The values of all ranks added up, in their dtype; the same bits on every rank. All ranks have to call it."""


class Alone:
    """One process, without others."""

    rank, count = 0, 1

    def sum(self, values: NDArray[Any]) -> NDArray[Any]:
        return values


# OpenMP reads it when torch is imported, which transformers may do first. By default its threads wait for each other in
# a loop, and where another program wants a core, that takes the time of the work several times over: measured 2.9 s
# against 1.5 s for a micro-batch of SmolLM2-135M beside one busy process on two cores, and without bound beside two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

BACKENDS = ("auto", "mlx", "torch")


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the defaults are greedy."""

    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # only the likeliest tokens that together have this probability; 1: all
    top_k: int = 0  # only the k likeliest tokens; 0: all
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest; 0: all
    repetition_penalty: float | None = None  # of the last 20 tokens of this prompt and answer; above 1 repeats less
    seed: int | None = None  # the same seed gives the same tokens; None: other ones each time


def may_follow(constraint: Constraint, last: int | None, rows: int) -> NDArray[np.bool_]:
    """[rows]: what a constraint says, for a model with so many rows of logits; tokens it knows nothing of may not."""
    known = constraint(last)[:rows]
    return np.concatenate([known, np.zeros(rows - len(known), np.bool_)])


class Streams(Protocol):
    """Answers that are computed together, a token of each at a time; they begin and end independently."""

    capacity: int  # how many are computed at once; more wait

    def add(self, number: int, tokens: list[int], sampling: Sampling, constraint: Constraint | None = None) -> None:
        """Begin with the answer to a prompt of at least one token, called by a number."""

    def step(self) -> list[tuple[int, int]]:
        """(number, next token) of those that have one; an answer goes on until it is removed."""

    def remove(self, number: int) -> None:
        """End an answer."""

    def close(self) -> None:
        """End all of them and give their memory back."""


class Backend(Protocol):
    """A checkpoint in memory, frozen, with at most one adapter that can be trained, or several that answer in turn."""

    name: str  # mlx | torch
    device: str  # cpu | gpu
    in_use: str | None  # the name of the adapter that answers; None: the base, or an adapter without a name
    notes: list[str]  # what the person should know, as sentences
    ranks: Ranks  # what `apply` adds up the gradient over; Alone() unless replaced

    # ---- adapter

    def attach(self, adapter: AdapterRecipe, seed: int) -> None:
        """Add a new adapter with the values of `initial_values.py`, so that the model answers as before.

        Raises UsageError for targets or layers that the model does not have, all of them in one message.
        """

    def attach_saved(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        """Add a saved adapter: mlx-lm's adapter_config.json and its tensors.

        Raises InputRefused with every missing, unexpected and wrongly shaped tensor.
        """

    def add_adapter(self, name: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        """Keep a saved adapter in memory under a name, beside others of any kind, rank and layers; `use` chooses it.

        Who answers stays as it is, also where this raises as `attach_saved` does. Not for a model that is trained.
        """

    def use(self, name: str | None) -> None:
        """Answer with this adapter from now on, or as the base; nothing is read or computed.

        What a cache holds was computed with the adapter that was in use then: it is of no use to another one.
        """

    def adapter_config(self) -> dict[str, Any]:
        """The adapter that is in use, as mlx-lm's adapter_config.json describes it."""

    # ---- training

    def optimize(self, train: TrainRecipe) -> None:
        """Begin training: optimizer state zero, step 0."""

    def accumulate(self, batch: Batch) -> tuple[float, int]:
        """(summed loss in nats, trained tokens) of a batch; the gradient of the sum is added up inside."""

    def apply(self, learning_rate: float, clip_norm: float | None) -> float:
        """One optimizer update from everything accumulated since the last one; its gradient norm before clipping.

        The gradient is the accumulated one divided by all its trained tokens, both added up over the ranks. When norm
        or loss is not finite nothing is updated, the accumulated gradient is dropped, and the norm returned is not
        finite either.
        """

    def losses(self, batch: Batch) -> NDArray[np.float32]:
        """[B, T]: the cross-entropy in nats of each `tokens[b, t]` that `mask` trains, 0 elsewhere; dropout is off."""

    def trunk_layers(self) -> int:
        """How many of the lowest layers have nothing trained in or below them; their outputs never change."""

    def trunk(self, batch: Batch) -> NDArray[Any]:
        """[B, T, D]: what those layers give, for `Batch.trunk`; numbers of the model's type, bfloat16 as its bits."""

    def release_trunk(self) -> None:
        """Give back the memory of those layers; they are read again when they are needed, in an answer for instance."""

    def why_not_packed(self, packed: Batch, padded: Batch) -> str | None:
        """Why this model cannot take packed rows, as a clause; None where it can.

        The two batches hold the same rows in the same order. Where the model can take them packed, each token has the
        same loss in both.
        """

    # ---- generation

    def new_cache(self) -> Any:
        """An empty key-value cache for `stream`."""

    def trim(self, cache: Any, tokens: int) -> bool:
        """Forget the last tokens of a cache; False where this model's cache cannot, and must then be thrown away."""

    def read(self, tokens: list[int], cache: Any) -> None:
        """Put tokens (at least one) into the cache, the beginning of a prompt that `stream` then goes on with."""

    def stream(
        self,
        tokens: list[int],
        sampling: Sampling,
        cache: Any,
        watch: Watch | None = None,
        constraint: Constraint | None = None,
    ) -> Generator[int, None, None]:
        """Token ids that follow the cache and `tokens` (at least one), without end; the caller closes it.

        Whenever a token has been yielded, the cache holds the prompt and every token yielded, that one included.
        `watch` is told of each token before it is yielded; the log-probabilities are those after the repetition
        penalty and among the tokens that `constraint` allows, before temperature and filters.
        """

    def streams(self, at_once: int) -> Streams:
        """Up to so many answers at once, with the adapter in use; one at a time where model or backend cannot more."""

    # ---- state

    def adapter_state(self) -> dict[str, NDArray[np.float32]]:
        """The adapter's tensors, under mlx-lm's names and in mlx-lm's shapes."""

    def load_adapter_state(self, tensors: Tensors) -> None:
        """Put `adapter_state()` of another process back. Raises InputRefused as `attach_saved` does."""

    def optimizer_state(self) -> dict[str, NDArray[np.float32]]:
        """Everything beside the adapter that the next update depends on; `step` is the number of updates made."""

    def load_optimizer_state(self, tensors: Tensors) -> None:
        """Put `optimizer_state()` of another process back. Raises InputRefused as `attach_saved` does."""

    # ---- facts

    def peak_bytes(self) -> int:
        """The most memory that arrays took since the model was loaded; on PyTorch, that the process grew by."""

    def memory_bytes(self) -> int:
        """The memory that this process may take now: what is free, or on a GPU the working set that it recommends."""

    def matmul_rate(self) -> float:
        """Floating-point operations a second in float32 products of two 1024 by 1024 matrices, measured now."""

    def multiplies_with(self) -> str:
        """What makes those products, by name and version: a library on a CPU, or the GPU."""

    def parameters(self) -> tuple[int, int]:
        """(numbers in the model with its adapter, those of them that are trained)."""

    def close(self) -> None:
        """Give the memory back; the backend is of no use afterwards."""


class Rewrite(Protocol):
    """A checkpoint on its way to another one: what it is to become is said first, and numbers are read last.

    On MLX the result has MLX's layout, on PyTorch that of transformers.
    """

    config: dict[str, Any]  # config.json as it will be
    framework: str  # mlx | pt, as safetensors files name who wrote them

    def parameters(self) -> int:
        """How many numbers the model has; a quantized one as many as before."""

    def fuse(self, config: Mapping[str, Any], tensors: Tensors, dtype: str | None) -> None:
        """Give the model the weights that it has with a saved adapter; what is quantized becomes plain numbers.

        They are of the type float32, float16 or bfloat16; None: of the one that config.json says, or as stored. Raises
        InputRefused as `Backend.attach_saved`, and for adapters that cannot be fused.
        """

    def layouts(self) -> dict[str, Layout]:
        """The tensors of the result, in the order of `read`."""

    def read(self) -> Iterator[tuple[str, memoryview]]:
        """(name, bytes) of each tensor of the result. It gives memory back as it goes, and can be asked for once.

        Raises InputRefused for files that cannot be read, OutOfResources where memory does not suffice.
        """

    def write_config(self, path: str) -> None:
        """Write config.json."""

    def peak_bytes(self) -> int:
        """The most memory that arrays took so far; on PyTorch, that the process grew by."""


class Conversion(Rewrite, Protocol):
    """A rewrite to MLX's layout that can quantize.

    Only MLX has one, because the layout and the rules of each architecture are mlx-lm's.
    """

    def quantized(self) -> set[str]:
        """Paths of the modules whose weights are quantized."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[..., rows, columns] of each weight that can be quantized, by module path."""

    def preferred(self, scheme: Scheme, mixed: str | None) -> dict[str, Scheme | None]:
        """What each of those modules gets by mlx-lm's rules, where `scheme` is asked for; None: it stays as it is.

        `mixed` is a name of `quantize.MIXED`, else the architecture's own rules count. Raises UsageError where mlx-lm
        has no mixed bits for the architecture.
        """

    def cast(self, dtype: str | None) -> None:
        """Turn the numbers into float32, float16 or bfloat16; None: into what config.json says, if it says anything."""

    def dequantize(self) -> None:
        """Make plain numbers of what is quantized. Raises InputRefused where mlx-lm cannot."""

    def quantize(self, plan: QuantizationPlan, learned: Any = None) -> None:
        """Quantize the modules that the plan names, with the numbers of a model of `Comparison.learn` where given."""


@dataclass(frozen=True)
class Divergence:
    """How far a model is from the one that it was made of, a quantized one for instance, summed over judged tokens."""

    tokens: int
    base_loss: float  # nats, of the model that it was made of
    loss: float  # nats, of the model itself
    kl: float  # nats, KL(made of ‖ itself) of the next token's distribution
    changed: int  # tokens for which the likeliest choice is another one


class Reference(Protocol):
    """A model in memory, with an adapter or without, and batches on which others are held against it.

    `which` are indices of batches.
    """

    notes: list[str]  # what the person should know, as sentences

    def stored(self, source: ModelSource, which: Iterable[int]) -> Divergence:
        """Of a checkpoint, which is loaded for it."""

    def peak_bytes(self) -> int:
        """The most memory that arrays took so far; on PyTorch, that the process grew by."""


class Comparison(Reference, Protocol):
    """An unquantized model in memory, and batches on which quantized ones are held against it.

    `dtypes` are safetensors' names of the type that a module has before it is quantized.
    """

    def planned(
        self, schemes: Mapping[str, Scheme | None], dtypes: Mapping[str, str], which: Iterable[int]
    ) -> Divergence:
        """Of the model with these modules quantized, or of their type alone where the scheme is None.

        Nothing else is changed: an adapter stays beside the other modules.
        """

    def sensitivities(self, low: Scheme, high: Scheme, tokens: NDArray[np.int32]) -> dict[str, float]:
        """By module, what it would gain from `high` over `low`, by mlx-lm's dynamic quantization on tokens [N, T]."""

    def learn(self, method: str, plan: QuantizationPlan, dtypes: Mapping[str, str], tokens: NDArray[np.int32]) -> Any:
        """The model quantized as the plan says by mlx-lm's awq, gptq or dwq, which learns from tokens [N, T].

        It is for `learned` and `Conversion.quantize`. Raises InputRefused where mlx-lm's method cannot do that.
        """

    def learned(self, model: Any, which: Iterable[int]) -> Divergence:
        """Of a model that `learn` gave."""

    def weight_error(self, path: str, scheme: Scheme, dtype: str) -> float:
        """‖quantized − plain‖ / ‖plain‖ of a module's weight, by Frobenius' norm."""


def load_comparison(source: ModelSource, batches: Sequence[Batch], adapter: Adapter | None = None) -> Comparison:
    """A verified checkpoint, unquantized, in memory. Raises as `load_backend` and `attach_saved` do."""
    require_mlx()
    from mlxsft.backends.mlx_quality import MlxComparison

    return MlxComparison(source, batches, adapter)


def load_reference(source: ModelSource, batches: Sequence[Batch], adapter: Adapter) -> Reference:
    """A verified checkpoint with its adapter on PyTorch. Raises as `load_backend` and `attach_saved` do."""
    require_torch()
    from mlxsft.backends.torch_quality import TorchReference

    return TorchReference(source, batches, adapter)


def load_conversion(source: ModelSource) -> Conversion:
    """A verified checkpoint, to be written in MLX's layout. Raises as `load_backend` does."""
    require_mlx()
    from mlxsft.backends.mlx_convert import MlxConversion

    return MlxConversion(source)


def load_rewrite(source: ModelSource) -> Rewrite:
    """A verified checkpoint, to be written in transformers' layout. Raises as `load_backend` does."""
    require_torch()
    from mlxsft.backends.torch_fuse import TorchRewrite

    return TorchRewrite(source)


def writing_backend(name: str) -> str:
    """The backend that writes a model; `auto` is MLX wherever it can be imported, however fast, for its layout.

    Raises UsageError where there is no such backend, or it is not installed.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: there is no such backend", f"The backends are: {', '.join(BACKENDS)}.")
    if name == "auto":
        try:
            require_mlx()
        except UsageError:
            if _missing("torch", "peft"):
                raise
            return "torch"
        return "mlx"
    require_mlx() if name == "mlx" else require_torch()
    return name


def load_backend(name: str, source: ModelSource, *, stored: bool = False) -> Backend:
    """A verified checkpoint in memory; `name` is mlx, torch, or auto for what this machine has.

    `stored`: no number is turned into float32, though the CPU computes that faster. Raises UsageError where the array
    library is not installed or cannot do that, InputRefused for a checkpoint that it cannot load.
    """
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r}: there is no such backend", f"The backends are: {', '.join(BACKENDS)}.")
    name, why = fastest() if name == "auto" else (name, None)
    backend: Backend
    if name == "torch":
        require_torch()
        from mlxsft.backends.torch import TorchBackend

        if stored:
            raise UsageError(
                "train.base_dtype: stored, but PyTorch computes here, which has everything as float32",
                "Leave it out, or take --backend mlx.",
            )
        backend = TorchBackend(source)
    else:
        require_mlx()
        from mlxsft.backends.mlx import MlxBackend

        backend = MlxBackend(source, stored=stored)
    backend.notes += [why] if why else []
    return backend


def fastest() -> tuple[str, str | None]:
    """The backend that `auto` stands for here, and a sentence that says why where that could surprise.

    MLX on a GPU, and on a CPU with a fast BLAS: there it loads SmolLM2-135M in 0.55 of PyTorch's time, makes an update
    in 0.97 and a token in 0.89 of it, in 0.74 of the memory (tests/benchmarks/backends.py, two cores). PyTorch where
    MLX multiplies with its own BLAS, 30 to 70 times slower.
    """
    try:
        require_mlx()
    except UsageError as error:
        if _missing("torch", "peft") and _mlx_exists():
            raise
        return "torch", f"PyTorch computes: {error.message}"
    from mlxsft.backends.mlx import BLAS_HINT, device_kind

    if device_kind() == "gpu" or not BLAS_HINT or _missing("torch", "peft"):
        return "mlx", None
    return "torch", f"PyTorch computes, because for MLX {BLAS_HINT}"


def leave_out_torch(name: str) -> None:
    """Let nothing import PyTorch in this process, which has no other backend than this one, where that is MLX.

    Where PyTorch is installed, transformers imports it with a tokenizer: 1.8 s of the start, and 180 MB.
    """
    if name == "mlx" or (name == "auto" and fastest()[0] == "mlx"):
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # with None, importing it raises ImportError


def require_torch() -> None:
    """Returns where PyTorch and PEFT are installed. Raises UsageError with the install command where they are not."""
    if missing := _missing("torch", "peft"):
        index = "pip install torch --index-url https://download.pytorch.org/whl/cpu && " * (sys.platform == "linux")
        raise UsageError(
            f"the torch backend needs {' and '.join(missing)}, not installed here",
            f"Install it: {index}pip install 'mlxsft[torch]'",
        )


def launched_rank() -> int | None:
    """The rank that a launcher gave to this process; None where none did."""
    given = [os.environ[name] for name in RANK_VARIABLES if name in os.environ]
    return int(given[0]) if given else None


def join_ranks() -> Ranks:
    """The ranks that were launched together, this process among them; waits until all are there.

    Raises UsageError where MLX is not installed or the ranks cannot reach each other.
    """
    if launched_rank() is None:
        return Alone()
    require_mlx()
    from mlxsft.backends.mlx_ranks import join

    return join()


def require_mlx() -> None:
    """Returns where MLX can be imported. Raises UsageError with the install command where it cannot."""
    if not _mlx_exists():
        here = f"{platform.system()} on {platform.machine()}"
        raise UsageError(
            f"MLX does not exist for this machine ({here})",
            "It runs on Apple silicon and 64-bit Linux; elsewhere take --backend torch.",
        )
    install = f"pip install {'mlx' if sys.platform == 'darwin' else chr(34) + 'mlx[cpu]' + chr(34)} mlx-lm"
    for package in _missing("mlx", "mlx_lm"):
        raise UsageError(f"{package.replace('_', '-')} is not installed", f"Install it: {install}")
    try:
        importlib.import_module("mlxsft.backends.mlx")  # finds the fast BLAS before it imports MLX
    except ImportError as error:
        raise UsageError(f"MLX cannot be imported: {error}", f"Install it anew: {install}") from error


def _mlx_exists() -> bool:
    """Whether MLX is made for machines like this one."""
    machines = {"darwin": ("arm64",), "linux": ("x86_64", "aarch64")}
    return platform.machine() in machines.get(sys.platform, ())


def _missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]
