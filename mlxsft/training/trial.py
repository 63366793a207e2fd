"""A few micro-batches of a run, computed for real in a process of their own: what the run will take is told from them.

What that process needs is its own, so that another trial after it begins as a run does.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsft.data.batches import batches, epoch_order
from mlxsft.own_process import answer, ask
from mlxsft.recipe import Recipe
from mlxsft.training.loop import Plan
from mlxsft.training.schedule import learning_rate

if TYPE_CHECKING:
    from mlxsft.backends import Backend
    from mlxsft.data.batches import Batch
    from mlxsft.data.dataset import Dataset
    from mlxsft.data.render import Example, Renderer

QUANTILES = (1.0, 0.5, 0.1, 0.9)  # of the micro-batches by their computed tokens: which are tried; the largest first
EPOCHS = 3  # whose micro-batches are counted; the others are taken to be alike
ANSWER_TOKENS = 16  # of the answer that is timed


@dataclass(frozen=True)
class Trial:
    """What was counted and measured. Seconds are of this machine, bytes those of arrays, unless said otherwise."""

    backend: str
    device: str
    rows: int
    valid_rows: int
    tokens: int  # of the training rows, in one epoch
    trained_tokens: int
    computed_tokens: int  # with the padding
    longest: int  # tokens of the longest row
    largest: tuple[int, int]  # rows and columns of the largest micro-batch
    steps: int
    epochs: float
    parameters: int
    trainable_parameters: int
    layers: int  # of the model
    trunk_layers: int  # whose outputs are kept, 0 where they are computed in every epoch
    peak_bytes: int
    weight_bytes: int  # of the files of the base
    process_bytes: int  # what the process takes beside arrays
    memory_bytes: int  # what arrays may take on this device
    load_seconds: float
    trunk_seconds: float  # to fill the trunk cache
    train_seconds: float  # of all updates
    eval_seconds: float  # of all evaluations, answers to prompts included
    save_seconds: float  # of all checkpoints
    matmul_rate: float | None  # floating-point operations a second in float32, of MLX

    @property
    def seconds(self) -> float:
        """From the first update to the end, evaluations and checkpoints included: what a run says of itself."""
        return self.train_seconds + self.eval_seconds + self.save_seconds

    @property
    def padding_share(self) -> float:
        """From 0 to 1, of the computed tokens of an epoch."""
        return 1 - self.tokens / self.computed_tokens

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
        return self.peak_bytes + self.process_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory_bytes


def run_trial(recipe: Recipe, backend_name: str) -> Trial:
    """A trial in a new process. Raises what loading and training raise, OutOfResources where the process is killed."""
    (told,) = ask(
        "mlxsft.training.trial",
        {"recipe": recipe.model_dump(mode="json"), "backend": backend_name},
        what="the trial of the largest micro-batch",
        hint="Lower train.micro_batch_tokens or data.max_tokens, or set train.checkpoint_activations.",
    )
    return Trial(**{**told, "largest": tuple(told["largest"])})


def measure(recipe: Recipe, backend_name: str) -> Trial:
    """The trial itself, in this process."""
    import psutil

    from mlxsft.backends import load_backend
    from mlxsft.data.dataset import load_dataset
    from mlxsft.data.render import load_renderer
    from mlxsft.models.sizes import layer_count, refuse_beyond_memory
    from mlxsft.models.source import open_model
    from mlxsft.training.packing import packs

    source = open_model(recipe.model, revision=recipe.revision)
    refuse_beyond_memory(source.name, source.weight_bytes)
    renderer = load_renderer(source, recipe.data.template)
    dataset = load_dataset(recipe.data, renderer, seed=recipe.train.seed)
    began = time.perf_counter()
    backend = load_backend(backend_name, source)
    backend.attach(recipe.adapter, recipe.train.seed)
    backend.optimize(recipe.train)
    load_seconds = time.perf_counter() - began
    outside = psutil.Process().memory_info().rss - backend.peak_bytes()
    packed, _ = packs(backend, recipe.train, dataset.train, renderer.positions)
    return _Stopwatch(recipe, backend, dataset, renderer, packed, layer_count(source.config)).trial(
        load_seconds=load_seconds, weight_bytes=source.weight_bytes, process_bytes=max(0, outside)
    )


@dataclass(frozen=True)
class _Stopwatch:
    """A loaded run, and what it does with the clock beside it."""

    recipe: Recipe
    backend: Backend
    dataset: Dataset
    renderer: Renderer
    packed: bool
    layers: int

    def trial(self, *, load_seconds: float, weight_bytes: int, process_bytes: int) -> Trial:
        rows, valid, plan = self.dataset.train, self.dataset.valid, self._plan
        shapes = [self._shapes(epoch) for epoch in range(self._epochs)]
        whole = plan.total_steps / plan.steps_per_epoch / len(shapes)  # how often the counted epochs fit in the run
        tried, cached, trunk_seconds = self._tried(shapes[0])
        times = [(batch.tokens.size, self._seconds(batch)) for batch in tried]
        apply = self._apply_seconds()
        a_batch = _line(times)
        train = whole * sum(a_batch(size) for epoch in shapes for size, _ in epoch) + plan.total_steps * apply
        evaluations = 1 + sum(plan.evaluates(step) for step in range(1, plan.total_steps + 1))
        saves = 1 + sum(plan.saves(step) for step in range(1, plan.total_steps + 1))
        total, trainable = self.backend.parameters()
        return Trial(
            backend=self.backend.name,
            device=self.backend.device,
            rows=len(rows),
            valid_rows=len(valid),
            tokens=sum(len(row.tokens) for row in rows),
            trained_tokens=sum(int(row.mask.sum()) for row in rows),
            computed_tokens=sum(size for size, _ in shapes[0]),
            longest=max(len(row.tokens) for row in rows),
            largest=(int(tried[0].tokens.shape[0]), int(tried[0].tokens.shape[1])),
            steps=plan.total_steps,
            epochs=plan.total_steps / plan.steps_per_epoch,
            parameters=total,
            trainable_parameters=trainable,
            layers=self.layers,
            trunk_layers=cached,
            eval_seconds=evaluations * (self._valid_seconds() + self._answer_seconds()),
            save_seconds=saves * self._save_seconds(),
            peak_bytes=self.backend.peak_bytes(),
            weight_bytes=weight_bytes,
            process_bytes=process_bytes,
            memory_bytes=self.backend.memory_bytes(),
            load_seconds=load_seconds,
            trunk_seconds=trunk_seconds,
            train_seconds=train,
            matmul_rate=self.backend.matmul_rate(),
        )

    @property
    def _plan(self) -> Plan:
        return Plan.of(self.recipe, len(self.dataset.train))

    @property
    def _epochs(self) -> int:
        plan = self._plan
        return min(EPOCHS, -(-plan.total_steps // plan.steps_per_epoch))

    def _updates(self, epoch: int) -> Iterator[list[Example]]:
        train, rows = self.recipe.train, self.dataset.train
        lengths = np.array([len(row.tokens) for row in rows])
        for update in epoch_order(lengths, train.batch_size, seed=train.seed, epoch=epoch):
            yield [rows[i] for i in update]

    def _batches(self, rows: Sequence[Example]) -> Iterator[Batch]:
        budget, positions = self.recipe.train.micro_batch_tokens, self.renderer.positions
        return batches(rows, budget, packed=self.packed, positions=positions)

    def _shapes(self, epoch: int) -> list[tuple[int, int]]:
        """(computed tokens, number of the update) of every micro-batch of an epoch."""
        return [(b.tokens.size, n) for n, rows in enumerate(self._updates(epoch)) for b in self._batches(rows)]

    def _tried(self, shapes: list[tuple[int, int]]) -> tuple[list[Batch], int, float]:
        """Micro-batches of different sizes, the largest first; the layers whose outputs they carry; seconds for all."""
        from mlxsft.training.trunk import TrunkCache

        ordered = sorted(shapes)
        chosen = [ordered[round(q * (len(ordered) - 1))] for q in QUANTILES]
        updates = list(self._updates(0))
        rows = [row for _, number in dict.fromkeys(chosen) for row in updates[number]]
        train = self.recipe.train
        repeated = self._plan.total_steps > self._plan.steps_per_epoch
        with tempfile.TemporaryDirectory() as folder:
            cache = TrunkCache(
                self.backend, train.cache_trunk, Path(folder), train.micro_batch_tokens, self.renderer.positions
            )
            began = time.perf_counter()
            list(cache.fill([rows], repeated=repeated, stop=lambda: False))
            spent = time.perf_counter() - began
            everything = sum(len(row.tokens) for row in [*self.dataset.train, *self.dataset.valid])
            share = everything / sum(len(row.tokens) for row in rows)
            kept = iter(cache.rows[0])
            found = []
            for size, number in dict.fromkeys(chosen):
                update = [next(kept) for _ in updates[number]]
                found += [b for b in self._batches(update) if b.tokens.size == size][:1]
        return found, self.backend.trunk_layers() if cache.used else 0, spent * share if cache.used else 0.0

    def _seconds(self, batch: Batch) -> float:
        """Of a micro-batch; the first one of a shape may be compiled, so the second counts."""
        return min(_timed(lambda: self.backend.accumulate(batch)) for _ in range(2))

    def _apply_seconds(self) -> float:
        train = self.recipe.train
        rate = learning_rate(1, self._plan.total_steps, train)
        first = _timed(lambda: self.backend.apply(rate, train.clip_norm))
        smallest = min(self._batches(next(self._updates(0))), key=lambda batch: batch.tokens.size)
        self.backend.accumulate(smallest)
        return min(first, _timed(lambda: self.backend.apply(rate, train.clip_norm)))

    def _valid_seconds(self) -> float:
        """Of one evaluation of all held-out rows, told from some of them."""
        held_out = list(self._batches(self.dataset.valid)) if self.dataset.valid else []
        if not held_out:
            return 0.0
        some = held_out[:: max(1, len(held_out) // 3)]
        self.backend.losses(some[0])
        seconds = sum(_timed(partial(self.backend.losses, batch)) for batch in some)
        return seconds * sum(b.tokens.size for b in held_out) / sum(b.tokens.size for b in some)

    def _answer_seconds(self) -> float:
        """Of the answers to all prompts of `eval.samples` at one evaluation, if they are as long as they may be."""
        from mlxsft.chat.generate import Sampling, answer_text
        from mlxsft.data.formats import Turn
        from mlxsft.training.run import SAMPLE_TOKENS

        prompts = self.recipe.eval.samples
        if not prompts:
            return 0.0
        turns = [Turn("user", prompts[0])]
        few = _timed(lambda: answer_text(self.backend, self.renderer, turns, Sampling(), 1))
        many = _timed(lambda: answer_text(self.backend, self.renderer, turns, Sampling(), ANSWER_TOKENS))
        a_token = max(0.0, many - few) / (ANSWER_TOKENS - 1)
        return len(prompts) * (few + a_token * (SAMPLE_TOKENS - 1))

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


def _answers(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield asdict(measure(Recipe.model_validate_json(json.dumps(question["recipe"])), question["backend"]))


if __name__ == "__main__":
    sys.exit(answer(_answers))
