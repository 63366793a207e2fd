"""A few micro-batches of a run, computed for real in a process of their own: what the run will take is told from them.

What that process needs is its own, so that another trial after it begins as a run does, and one that finds no memory
leaves its counts behind.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsft.data.batches import batches, epoch_order
from mlxsft.errors import OutOfResources
from mlxsft.own_process import Told, answer, ask
from mlxsft.recipe import Recipe
from mlxsft.training.loop import Plan
from mlxsft.training.schedule import learning_rate

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.batches import Batch
    from mlxsft.data.dataset import Dataset
    from mlxsft.data.render import Example, Renderer
    from mlxsft.models.source import ModelSource

QUANTILES = (1.0, 0.5, 0.1, 0.9)  # of the micro-batches by their computed tokens: which are tried; the largest first
EPOCHS = 3  # whose micro-batches are counted; the others are taken to be alike
ANSWER_TOKENS = 16  # of the answer that is timed


@dataclass(frozen=True)
class Counts:
    """What is known of a run before its model is in memory."""

    backend: str
    device: str
    ledger: dict[str, int]  # rows by what became of them; `read` is their sum
    rows: int  # of an epoch, as often as their weights have them
    valid_rows: int
    tokens: int  # of the training rows, in one epoch
    trained_tokens: int
    computed_tokens: int  # with the padding
    longest: int  # tokens of the longest row
    largest: tuple[int, int]  # rows and columns of the largest micro-batch
    steps: int
    epochs: float
    layers: int  # of the model
    quantized: bool
    float32: bool  # all numbers in the files
    weight_bytes: int  # of the files of the base

    @property
    def padding_share(self) -> float:
        """From 0 to 1, of the computed tokens of an epoch."""
        return 1 - self.tokens / self.computed_tokens


@dataclass(frozen=True)
class Trial(Counts):
    """What was counted and measured. Seconds are of this machine, bytes those of arrays, unless said otherwise."""

    parameters: int
    trainable_parameters: int
    trunk_layers: int  # whose outputs are kept, 0 where they are computed in every epoch
    trunk_bytes: int  # of these outputs, where they are kept in memory
    peak_bytes: int  # without them
    process_bytes: int  # what the process takes beside arrays
    memory_bytes: int  # what arrays may take on this device
    load_seconds: float
    trunk_seconds: float  # to fill the trunk cache
    train_seconds: float  # of all updates
    eval_seconds: float  # of all evaluations, without answers
    answer_seconds: float  # to the prompts of eval.samples, if they become as long as those of the rows
    most_answer_seconds: float  # if none ends before it must
    save_seconds: float  # of all checkpoints
    matmul_rate: float | None  # floating-point operations a second in float32, of MLX

    @property
    def seconds(self) -> float:
        """From the first update to the end, evaluations and checkpoints included: what a run says of itself."""
        return self.train_seconds + self.eval_seconds + self.answer_seconds + self.save_seconds

    @property
    def most_seconds(self) -> float:
        """The same, if no answer to a prompt of eval.samples ends before it must."""
        return self.seconds - self.answer_seconds + self.most_answer_seconds

    @property
    def trainable_share(self) -> float:
        """From 0 to 1, of all numbers."""
        return self.trainable_parameters / self.parameters

    @property
    def seconds_before(self) -> float:
        """Until the first update."""
        return self.load_seconds + self.trunk_seconds

    @property
    def needed_bytes(self) -> int:
        return self.peak_bytes + self.trunk_bytes + self.process_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes


class NoMemory(OutOfResources):
    """A trial found no memory; `counts` is what it knew."""

    def __init__(self, message: str, hint: str | None, counts: Counts) -> None:
        super().__init__(message, hint)
        self.counts = counts


def run_trial(recipe: Recipe, backend_name: str) -> Trial:
    """A trial in a new process. Raises what loading and training raise, NoMemory where memory does not suffice."""
    from mlxsft.terminal import told

    heard: dict[str, Any] = {}
    try:
        for message in ask(
            "mlxsft.training.trial",
            {"recipe": recipe.model_dump(mode="json"), "backend": backend_name},
            what="the trial of the largest micro-batch",
            hint="Lower train.micro_batch_tokens or data.max_tokens, or set train.checkpoint_activations.",
        ):
            heard |= message
            if "tell" in message:
                told(message["tell"])
    except OutOfResources as error:
        if "counts" in heard:
            raise NoMemory(error.message, error.hint, Counts(**_typed(heard["counts"]))) from error
        raise
    return Trial(**_typed(heard["trial"]))


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"largest": tuple(values["largest"])}


def measure(recipe: Recipe, backend_name: str, count: Callable[[Counts], None], tell: Callable[[str], None]) -> Trial:
    """The trial itself, in this process; `count` gets the counts before the model is read, `tell` what goes on."""
    import psutil

    from mlxsft.backends import fastest, load_backend
    from mlxsft.data.dataset import load_dataset
    from mlxsft.data.render import load_renderer
    from mlxsft.data.sources import pin_recipe
    from mlxsft.models.sizes import refuse_beyond_memory
    from mlxsft.models.source import open_model
    from mlxsft.training.packing import packs

    source = open_model(recipe.model, revision=recipe.revision, progress=tell)
    recipe = recipe.model_copy(update={"data": pin_recipe(recipe.data, {}, tell)[0]})
    renderer = load_renderer(source, recipe.data.template)
    dataset = load_dataset(recipe.data, renderer, seed=recipe.train.seed)
    work = Work(recipe, dataset, renderer, recipe.train.batching == "packed")
    count(work.counts(fastest()[0] if backend_name == "auto" else backend_name, source))
    refuse_beyond_memory(source.name, source.weight_bytes)
    began = time.perf_counter()
    backend = load_backend(backend_name, source, stored=recipe.train.base_dtype == "stored")
    backend.attach(recipe.adapter, recipe.train.seed)
    backend.optimize(recipe.train)
    load_seconds = time.perf_counter() - began
    outside = psutil.Process().memory_info().rss - backend.peak_bytes()
    packed, _ = packs(backend, recipe.train, dataset.train, renderer.positions)
    work = replace(work, packed=packed)
    return _Stopwatch(work, backend).trial(work.counts(backend.name, source), load_seconds, max(0, outside))


@dataclass(frozen=True)
class Work:
    """What a run has to compute."""

    recipe: Recipe
    dataset: Dataset
    renderer: Renderer
    packed: bool

    @property
    def plan(self) -> Plan:
        return Plan.of(self.recipe, len(self.dataset.train))

    def counts(self, backend: str, source: ModelSource) -> Counts:
        """What can be told without the model."""
        from mlxsft.models.sizes import layer_count

        rows, shapes = self.dataset.train, self.shapes[0]
        size, number = max(shapes)
        largest = next(b for b in self.batches(list(self.updates(0))[number]) if b.tokens.size == size)
        return Counts(
            backend=backend,
            device=_device(backend),
            ledger=self.dataset.ledger,
            rows=len(rows),
            valid_rows=len(self.dataset.valid),
            tokens=sum(len(row.tokens) for row in rows),
            trained_tokens=sum(int(row.mask.sum()) for row in rows),
            computed_tokens=sum(size for size, _ in shapes),
            longest=max(len(row.tokens) for row in rows),
            largest=(int(largest.tokens.shape[0]), int(largest.tokens.shape[1])),
            steps=self.plan.total_steps,
            epochs=self.plan.total_steps / self.plan.steps_per_epoch,
            layers=layer_count(source.config),
            quantized=bool(source.config.get("quantization") or source.config.get("quantization_config")),
            float32=all(info.dtype == "F32" for info in source.tensors.values()),
            weight_bytes=source.weight_bytes,
        )

    @cached_property
    def shapes(self) -> list[list[tuple[int, int]]]:
        """(computed tokens, number of the update) of every micro-batch, of each of the first epochs."""
        epochs = min(EPOCHS, -(-self.plan.total_steps // self.plan.steps_per_epoch))
        return [
            [(b.tokens.size, n) for n, rows in enumerate(self.updates(epoch)) for b in self.batches(rows)]
            for epoch in range(epochs)
        ]

    def updates(self, epoch: int) -> Iterator[list[Example]]:
        """The rows of every update."""
        train, rows = self.recipe.train, self.dataset.train
        lengths = np.array([len(row.tokens) for row in rows])
        for update in epoch_order(lengths, train.batch_size, seed=train.seed, epoch=epoch):
            yield [rows[i] for i in update]

    def batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        """The micro-batches of an update."""
        budget, positions = self.recipe.train.micro_batch_tokens, self.renderer.positions
        return batches(rows, budget, packed=self.packed, positions=positions)

    @property
    def answer_tokens(self) -> float:
        """How long the answers of the rows are, in the median; 1 to SAMPLE_TOKENS, which ends an answer."""
        from mlxsft.training.run import SAMPLE_TOKENS

        lengths = [len(row.tokens) - row.answers[-1] for row in self.dataset.train if row.answers]
        return float(np.clip(np.median(lengths), 1, SAMPLE_TOKENS)) if lengths else SAMPLE_TOKENS


def _device(backend: str) -> str:
    if backend == "torch":
        return "cpu"
    from mlxsft.backends import require_mlx

    require_mlx()
    from mlxsft.backends.mlx import device_kind

    return device_kind()


@dataclass(frozen=True)
class _Trunk:
    """The trunk cache that the whole run will have; none by default."""

    layers: int = 0
    memory_bytes: int = 0
    seconds: float = 0.0  # to fill it


@dataclass(frozen=True)
class _Stopwatch:
    """A loaded run, and what it does with the clock beside it."""

    work: Work
    backend: Backend

    def trial(self, counts: Counts, load_seconds: float, process_bytes: int) -> Trial:
        work, plan = self.work, self.work.plan
        whole = plan.total_steps / plan.steps_per_epoch / len(work.shapes)  # how often the counted epochs fit
        tried, trunk = self._tried(work.shapes[0])
        times = [(batch.tokens.size, self._seconds(batch)) for batch in tried]
        apply = self._apply_seconds()
        a_batch = _line(times)
        train = whole * sum(a_batch(size) for epoch in work.shapes for size, _ in epoch) + plan.total_steps * apply
        evaluations = 1 + sum(plan.evaluates(step) for step in range(1, plan.total_steps + 1))
        saves = 1 + sum(plan.saves(step) for step in range(1, plan.total_steps + 1))
        answers, most_answers = self._answer_seconds(evaluations)
        total, trainable = self.backend.parameters()
        return Trial(
            **vars(counts),
            parameters=total,
            trainable_parameters=trainable,
            trunk_layers=trunk.layers,
            trunk_bytes=trunk.memory_bytes,
            trunk_seconds=trunk.seconds,
            eval_seconds=evaluations * self._valid_seconds(),
            answer_seconds=answers,
            most_answer_seconds=most_answers,
            save_seconds=saves * self._save_seconds(),
            peak_bytes=self.backend.peak_bytes(),
            process_bytes=process_bytes,
            memory_bytes=self.backend.memory_bytes(),
            load_seconds=load_seconds,
            train_seconds=train,
            matmul_rate=self.backend.matmul_rate(),
        )

    def _tried(self, shapes: list[tuple[int, int]]) -> tuple[list[Batch], _Trunk]:
        """Micro-batches of different sizes, the largest first, and the trunk cache whose outputs they carry."""
        from mlxsft.training.trunk import TrunkCache

        work, train, plan = self.work, self.work.recipe.train, self.work.plan
        ordered = sorted(shapes)
        chosen = [ordered[round(q * (len(ordered) - 1))] for q in QUANTILES]
        updates = list(work.updates(0))
        rows = [row for _, number in dict.fromkeys(chosen) for row in updates[number]]
        with tempfile.TemporaryDirectory() as folder:
            cache = TrunkCache(
                self.backend, train.cache_trunk, Path(folder), train.micro_batch_tokens, work.renderer.positions
            )
            began = time.perf_counter()
            list(cache.fill([rows], repeated=plan.total_steps > plan.steps_per_epoch, stop=lambda: False))
            spent = time.perf_counter() - began
            kept = iter(cache.rows[0])
            found = []
            for size, number in dict.fromkeys(chosen):
                update = [next(kept) for _ in updates[number]]
                found += [b for b in work.batches(update) if b.tokens.size == size][:1]
            if not cache.used:
                return found, _Trunk()
            everything = sum(len(row.tokens) for row in [*work.dataset.train, *work.dataset.valid])
            share = everything / sum(len(row.tokens) for row in rows)
            needed = round(share * sum(row.trunk.nbytes for row in cache.rows[0] if row.trunk is not None))
            in_memory = needed if cache.place(needed) == "memory" else 0
            return found, _Trunk(self.backend.trunk_layers(), in_memory, spent * share)

    def _seconds(self, batch: Batch) -> float:
        """Of a micro-batch; the first one of a shape may be compiled, so the second counts."""
        return min(_timed(lambda: self.backend.accumulate(batch)) for _ in range(2))

    def _apply_seconds(self) -> float:
        train = self.work.recipe.train
        rate = learning_rate(1, self.work.plan.total_steps, train)
        first = _timed(lambda: self.backend.apply(rate, train.clip_norm))
        smallest = min(self.work.batches(next(self.work.updates(0))), key=lambda batch: batch.tokens.size)
        self.backend.accumulate(smallest)
        return min(first, _timed(lambda: self.backend.apply(rate, train.clip_norm)))

    def _valid_seconds(self) -> float:
        """Of one evaluation of all held-out rows, told from some of them."""
        held_out = list(self.work.batches(self.work.dataset.valid)) if self.work.dataset.valid else []
        if not held_out:
            return 0.0
        some = held_out[:: max(1, len(held_out) // 3)]
        self.backend.losses(some[0])
        seconds = sum(_timed(partial(self.backend.losses, batch)) for batch in some)
        return seconds * sum(b.tokens.size for b in held_out) / sum(b.tokens.size for b in some)

    def _answer_seconds(self, evaluations: int) -> tuple[float, float]:
        """Of the answers to all prompts of `eval.samples` at every evaluation: as long as those of the rows but at the
        first, before anything is trained, when they may be as long as they can; and all so long.
        """
        from mlxsft.training.run import SAMPLE_TOKENS

        prompts = self.work.recipe.eval.samples
        if not prompts:
            return 0.0, 0.0
        self._answered(prompts[0], 1)  # what is done once
        few = [self._answered(prompt, 1) for prompt in prompts]
        many = self._answered(prompts[0], ANSWER_TOKENS)
        a_token = max(0.0, many[0] - few[0][0]) / max(1, many[1] - 1)
        begun, longest = sum(seconds for seconds, _ in few), len(prompts) * a_token * (SAMPLE_TOKENS - 1)
        usual = len(prompts) * a_token * (self.work.answer_tokens - 1)
        return evaluations * begun + longest + (evaluations - 1) * usual, evaluations * (begun + longest)

    def _answered(self, prompt: str, most: int) -> tuple[float, int]:
        """Seconds that an answer of at most so many tokens takes, and how many it has."""
        from mlxsft.chat.generate import Answer, Sampling, stream_answer
        from mlxsft.data.formats import Turn

        answer, turns = Answer(), [Turn("user", prompt)]
        steps = partial(stream_answer, self.backend, self.work.renderer, turns, Sampling(), most, answer=answer)
        return _timed(lambda: deque(steps(), maxlen=0)), answer.tokens

    def _save_seconds(self) -> float:
        from mlxsft.training.checkpoints import Progress, RunFolder

        with tempfile.TemporaryDirectory() as place:
            folder = RunFolder(Path(place))
            state, optimizer = self.backend.adapter_state(), self.backend.optimizer_state()
            config = self.backend.adapter_config()
            return _timed(lambda: folder.save(state, config, optimizer, Progress(step=1), keep=1, which="last"))


def _timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _line(times: Sequence[tuple[int, float]]) -> Callable[[float], float]:
    """Seconds for so many tokens, from (tokens, seconds): between the measured ones along straight lines."""
    sizes, seconds = zip(*sorted(times), strict=True)

    def at(size: float) -> float:
        if size <= sizes[0]:
            return float(seconds[0] * size / sizes[0])
        return float(np.interp(size, sizes, seconds))

    return at


def _answers(question: dict[str, Any], tell: Callable[[Told], None]) -> None:
    from mlxsft.backends import leave_out_torch

    leave_out_torch(question["backend"])
    recipe = Recipe.model_validate_json(json.dumps(question["recipe"]))
    trial = measure(
        recipe,
        question["backend"],
        lambda counts: tell({"counts": asdict(counts)}),
        lambda line: tell({"tell": line}),
    )
    tell({"trial": asdict(trial)})


if __name__ == "__main__":
    sys.exit(answer(_answers))
