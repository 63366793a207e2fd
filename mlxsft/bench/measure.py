"""The protocol, measured: tuning and generating, each in a process of its own, so that each has a peak of its own."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, Any

from mlxsft.bench.protocol import PROTOCOL
from mlxsft.errors import Diverged, InputRefused
from mlxsft.own_process import Told, answer, ask

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.batches import Batch
    from mlxsft.models.source import ModelSource

LEARNED_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "position_embedding")  # modules that hold them


def measured(task: str, source: ModelSource, backend_name: str, repetitions: int) -> Iterator[Told]:
    """What a new process tells of `tuning` or `generating`: a step each time, of `step_count`, and the figures last.

    Raises what loading and training raise, and OutOfResources where the process dies.
    """
    question = {"task": task, "model": str(source.folder), "backend": backend_name, "repetitions": repetitions}
    hint = "Take a smaller or a quantized model, or close other programs."
    return ask("mlxsft.bench.measure", question, what=f"the process that measured {task}", hint=hint)


def step_count(repetitions: int) -> int:
    """How often `measured` tells something: loaded, once for nothing, the repetitions, the figures."""
    return repetitions + 3


def refuse_few_positions(source: ModelSource) -> None:
    """Raise InputRefused where the protocol has more tokens than the model has learned positions.

    Computed ones go on without end; a learned one beyond the last would be read from foreign memory.
    """
    for name, info in source.tensors.items():
        learned = name.removesuffix(".weight").rpartition(".")[2] in LEARNED_POSITIONS
        if learned and info.shape[0] < PROTOCOL.positions:
            raise InputRefused(
                f"{source.name}: has learned {info.shape[0]} positions, and the protocol needs {PROTOCOL.positions}",
                "Take a model for longer texts.",
            )


# ---- in that process ------------------------------------------------------------------------------------------------


def _answers(question: dict[str, Any], tell: Callable[[Told], None]) -> None:
    from mlxsft.backends import leave_out_torch, load_backend
    from mlxsft.models.source import open_model
    from mlxsft.training.worker import calm_the_gpu

    leave_out_torch(question["backend"])
    task = {"tuning": _tuning, "generating": _generating}[question["task"]]
    if task is _tuning:
        calm_the_gpu(sys.platform, os.environ)  # as every training process does
    source = open_model(question["model"])
    backend = load_backend(question["backend"], source)
    for step in task(source, backend, question["repetitions"]):
        tell(step)


def _tuning(source: ModelSource, backend: Backend, repetitions: int) -> Iterator[Told]:
    from mlxsft.data.batches import batches
    from mlxsft.models.operations import lora_operations

    rows, train = PROTOCOL.examples(_vocabulary(source)), PROTOCOL.train_recipe()
    work = list(batches(rows, train.micro_batch_tokens, positions=source.positions))
    backend.attach(PROTOCOL.adapter_recipe(), PROTOCOL.seed)
    backend.optimize(train)
    shapes = {name: array.shape for name, array in backend.adapter_state().items()}
    lengths = [(len(row.tokens), int(row.mask.sum())) for row in rows]
    rates = [backend.matmul_rate()]
    yield {"step": "loaded"}
    seconds, losses = [], []
    for _ in range(1 + repetitions):
        began = time.perf_counter()
        losses.append(_updated(backend, work))
        seconds.append(time.perf_counter() - began)
        yield {"step": "updated"}
    facts = _facts(backend)
    rates.append(backend.matmul_rate())
    yield facts | {
        "seconds": seconds[1:],
        "losses": losses,
        "trainable_parameters": backend.parameters()[1],
        "needed_operations": lora_operations(source, shapes, lengths),
        "float32_matmul_flops": median(rates),
    }


def _updated(backend: Backend, work: list[Batch]) -> float:
    """The loss in nats a token before one update. Raises Diverged where there was none."""
    sums = [backend.accumulate(batch) for batch in work]
    norm = backend.apply(PROTOCOL.train["learning_rate"], PROTOCOL.train["clip_norm"])
    loss = sum(nats for nats, _ in sums) / sum(trained for _, trained in sums)
    if not math.isfinite(loss + norm):
        raise Diverged(
            "loss or gradient of the protocol's rows is not finite, so that nothing was updated",
            "The checkpoint itself is damaged, or its number format is too small for it.",
        )
    return loss


def _generating(source: ModelSource, backend: Backend, repetitions: int) -> Iterator[Told]:
    from mlxsft.backends import Sampling

    *prompt, last = PROTOCOL.prompt(_vocabulary(source))
    yield {"step": "loaded"}
    prompt_seconds, answer_seconds = [], []
    for _ in range(1 + repetitions):
        cache = backend.new_cache()
        began = time.perf_counter()
        backend.read(prompt, cache)
        prompt_seconds.append(time.perf_counter() - began)
        with closing(backend.stream([last], Sampling(), cache)) as stream:
            next(stream)  # from here on each token takes exactly one computation more
            began = time.perf_counter()
            for _ in range(PROTOCOL.answer_tokens):
                next(stream)
            answer_seconds.append(time.perf_counter() - began)
        yield {"step": "answered"}
    yield _facts(backend) | {
        "prompt_seconds": prompt_seconds[1:],
        "seconds": answer_seconds[1:],
        "parameters": backend.parameters()[0],
    }


def _facts(backend: Backend) -> dict[str, Any]:
    from mlxsft.machine import peak_resident_bytes

    return {
        "backend": backend.name,
        "device": backend.device,
        "multiplies_with": backend.multiplies_with(),
        "notes": backend.notes,
        "peak_bytes": backend.peak_bytes(),
        "resident_peak_bytes": peak_resident_bytes(),
    }


def _vocabulary(source: ModelSource) -> int:
    if source.embedding_rows is None:
        raise InputRefused(f"{source.name}: config.json does not say how many tokens the model knows")
    return source.embedding_rows


if __name__ == "__main__":
    sys.exit(answer(_answers))
