"""The one thread that computes: several answers in turn, each with its own key-value cache.

MLX's arrays and streams belong to a thread, so the thread that loads the model is the one that generates. Answers wait
in the order in which they came and take turns of SLICE seconds, so that a short one is not kept waiting by a long one.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mlxsft.backends import Constraint, Sampling
from mlxsft.chat.generate import Answer, Memory, continue_prompt
from mlxsft.chat.load import Loaded
from mlxsft.data.render import Renderer
from mlxsft.errors import MlxsftError

ANSWERS_AT_ONCE = 8
CACHED_TOKENS = 16_384  # in all key-value caches together, unless one answer alone needs more
SLICE = 0.05  # seconds; as long as it takes, a token or a part of a prompt is computed whole


@dataclass(frozen=True)
class Chosen:
    """A token and its log-probability in nats, with the likeliest ones that it was chosen from."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, token: int, logprobs: NDArray[np.float32], top: int) -> Chosen:
        """`logprobs` [V] are those of all tokens; `top` of them are kept, the likeliest first."""
        top = min(top, len(logprobs))
        likeliest = np.argpartition(logprobs, -top)[-top:] if top else np.array([], int)
        order = likeliest[np.argsort(-logprobs[likeliest], kind="stable")]
        return cls(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in order))


@dataclass(frozen=True)
class Said:
    """A stretch of an answer: its text, and the tokens that were computed for it, where they were asked for."""

    text: str
    tokens: tuple[Chosen, ...] = ()


@dataclass
class Job:
    """An answer to be computed. `deliver` gets each `Said`, then the `Answer`, or an exception; in the worker's thread.

    `adapter` is the name it has in the backend, None for the base; `top` is how many alternatives are kept for each
    token, None where no token is asked for.
    """

    adapter: str | None
    renderer: Renderer
    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    deliver: Callable[[Said | Answer | BaseException], None]
    opening: str = ""
    stops: Sequence[str] = ()
    special: bool = False
    top: int | None = None
    constraint: Constraint | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def most_tokens(self) -> int:
        """How many its cache can come to hold."""
        return len(self.prompt) + self.max_tokens


@dataclass
class _Running:
    """A job at work."""

    job: Job
    memory: Memory
    answer: Answer
    steps: Generator[str, None, None]
    chosen: list[Chosen]


class Worker:
    """Computes jobs in a thread of its own, which `load` is called in first."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self._loaded: Future[Loaded] = Future()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._running: deque[_Running] = deque()
        self._idle: list[tuple[str | None, Memory]] = []  # caches of answers that were given, the newest last
        self._thread = threading.Thread(target=self._work, name="mlxsft-worker", daemon=True)

    def start(self) -> Loaded:
        """Waits until the model is loaded, and gives it. Raises what loading raises."""
        self._thread.start()
        return self._loaded.result()

    def submit(self, job: Job) -> None:
        """Have a job computed when its turn comes. To end it before, set `cancelled`."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many jobs have begun."""
        return len(self._running)

    @property
    def cached(self) -> int:
        """How many tokens all key-value caches hold, those of jobs that have begun with what they may come to hold."""
        return sum(r.job.most_tokens for r in self._running) + sum(len(memory.tokens) for _, memory in self._idle)

    def stop(self) -> None:
        """End after the step at hand, and give the memory back."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # ---- in the thread

    def _work(self) -> None:
        try:
            loaded = self._load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._backend = loaded.backend
        self._loaded.set_result(loaded)
        while self._wait():
            self._begin_waiting()
            if self._running and self._take_turn(self._running[0]):
                self._running.rotate(-1)
            elif self._running:
                self._end(self._running.popleft())
        for running in self._running:
            running.steps.close()
        self._backend.close()

    def _wait(self) -> bool:
        """Until there is something to compute; False when there will be nothing more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._stopping)
            return not self._stopping

    def _begin_waiting(self) -> None:
        """Begin with the jobs that came first, as long as there is room for them."""
        while True:
            with self._changed:
                if not self._waiting or not (self._waiting[0].cancelled.is_set() or self._has_room(self._waiting[0])):
                    return
                job = self._waiting.popleft()
            if not job.cancelled.is_set():
                with self._telling(job):
                    self._running.append(self._begin(job))

    def _begin(self, job: Job) -> _Running:
        self._backend.use(job.adapter)
        memory, answer, chosen = self._memory_for(job), Answer(), list[Chosen]()

        def watch(token: int, logprobs: NDArray[np.float32]) -> None:
            if token not in job.renderer.end_tokens:
                chosen.append(Chosen.of(token, logprobs, job.top or 0))

        steps = continue_prompt(
            self._backend,
            job.renderer,
            job.prompt,
            job.sampling,
            job.max_tokens,
            memory=memory,
            answer=answer,
            opening=job.opening,
            stops=job.stops,
            special=job.special,
            watch=None if job.top is None else watch,
            constraint=job.constraint,
            stop=job.cancelled.is_set,
        )
        return _Running(job, memory, answer, steps, chosen)

    @contextmanager
    def _telling(self, job: Job) -> Iterator[None]:
        """What fails within it is told to the job, and a bug to the terminal too; the others go on."""
        try:
            yield
        except MlxsftError as error:  # a JSON schema that turns out to be too complex, for one
            job.deliver(error)
        except Exception as error:  # whatever it is, other people's answers must not end with it
            traceback.print_exc()
            job.deliver(error)

    def _has_room(self, job: Job) -> bool:
        taken = sum(running.job.most_tokens for running in self._running)
        few = len(self._running) < ANSWERS_AT_ONCE
        return not self._running or (few and taken + job.most_tokens <= CACHED_TOKENS)

    def _memory_for(self, job: Job) -> Memory:
        """The cache of the conversation that goes on in this prompt, otherwise a new one; others make room for it."""

        def shared(memory: Memory) -> int:
            pairs = zip(memory.tokens, job.prompt, strict=False)
            return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(memory.tokens), len(job.prompt)))

        mine = [memory for adapter, memory in self._idle if adapter == job.adapter]
        best = max(mine, key=shared, default=None)
        if best is not None and 2 * shared(best) > len(best.tokens):  # not one that only begins alike
            self._idle = [kept for kept in self._idle if kept[1] is not best]
        else:
            best = None
        self._forget_oldest(job.most_tokens)
        return best or Memory(self._backend)

    def _forget_oldest(self, needed: int = 0) -> None:
        """Give idle caches up, the oldest first, until all are within bounds."""
        while self._idle and (len(self._idle) > ANSWERS_AT_ONCE or needed + self.cached > CACHED_TOKENS):
            del self._idle[0]

    def _take_turn(self, running: _Running) -> bool:
        """Compute an answer for a while; whether it goes on."""
        job, began = running.job, time.monotonic()
        with self._telling(job):
            self._backend.use(job.adapter)
            for text in running.steps:
                if text or running.chosen:
                    job.deliver(Said(text, tuple(running.chosen)))
                    running.chosen.clear()
                if time.monotonic() - began > SLICE:
                    return True
            job.deliver(running.answer)
        return False

    def _end(self, ended: _Running) -> None:
        """Keep the cache of an answer for the next turn of its conversation."""
        if ended.memory.tokens:
            self._idle.append((ended.job.adapter, ended.memory))
        self._forget_oldest()
