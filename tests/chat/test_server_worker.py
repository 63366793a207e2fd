"""The thread that computes: turns are shared, caches stay within bounds, and failures stay with their job."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest

from mlxsft.chat import server_worker
from mlxsft.chat.generate import READ, Answer, Memory, Sampling, continue_prompt
from mlxsft.chat.load import Loaded, load_for_chat
from mlxsft.chat.server_worker import Chosen, Job, Said, Worker
from tests.tiny import write_llama

Worked = tuple[Worker, Loaded]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "tiny", chat_template=None, eos="<|endoftext|>")


@pytest.fixture
def worked(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worked]:
    """A worker that changes to the next answer after every token."""
    monkeypatch.setattr(server_worker, "SLICE", 0.0)
    load = partial(load_for_chat, str(model), {}, revision=None, template=None, backend_name="mlx")
    worker = Worker(load)
    yield worker, worker.start()
    worker.stop()


class Asked:
    """A job, and what was delivered for it; all jobs write the order of their stretches into `order`."""

    def __init__(self, worked: Worked, prompt: list[int], tokens: int, order: list[Any] | None = None) -> None:
        self.ended: Queue[Answer | BaseException] = Queue()
        self.order = order if order is not None else []
        renderer = worked[1].renderers[None]
        self.job = Job(None, renderer, prompt, Sampling(), tokens, self._deliver, top=0)

    def _deliver(self, item: Said | Answer | BaseException) -> None:
        self.order.append(self)
        if not isinstance(item, Said):
            self.ended.put(item)

    def answer(self) -> Answer:
        ended = self.ended.get(timeout=60)
        assert isinstance(ended, Answer), ended
        return ended


def test_answers_take_turns_token_by_token(worked: Worked) -> None:
    order: list[Any] = []
    held, free = threading.Event(), threading.Event()
    first = Asked(worked, [5, 6, 7], 40, order)
    deliver = first.job.deliver

    def wait_once(item: Any) -> None:
        deliver(item)
        held.set()
        free.wait(60)

    first.job.deliver = wait_once
    worked[0].submit(first.job)
    assert held.wait(60)  # the first answer has begun before the others come
    short = [Asked(worked, [8 + i, 9], 3, order) for i in range(3)]
    for asked in short:
        worked[0].submit(asked.job)
    free.set()
    assert [asked.answer().tokens for asked in [*short, first]] == [3, 3, 3, 40]
    done = max(order.index(asked, len(order) - 1 - order[::-1].index(asked)) for asked in short)
    assert order[:done].count(first) <= 7  # about as many turns as each of the others had
    assert order[-1] is first


def test_an_answer_is_the_same_alone_and_among_others(worked: Worked) -> None:
    def texts(prompts: list[list[int]], together: bool) -> list[str]:
        asked = [Asked(worked, prompt, 12) for prompt in prompts]
        found = []
        for one in asked:
            worked[0].submit(one.job)
            if not together:
                found.append(one.answer().text)
        return found or [one.answer().text for one in asked]

    prompts = [[5 + i, 6, 7 + i] for i in range(6)]
    assert texts(prompts, together=True) == texts(prompts, together=False)


def test_caches_stay_within_their_bound(worked: Worked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_worker, "CACHED_TOKENS", 100)
    most = []
    asked = [Asked(worked, list(range(5 + i, 35 + i)), 10) for i in range(10)]  # 40 tokens each: two at a time
    for one in asked:
        one.job.deliver = lambda item, deliver=one.job.deliver: (most.append(worked[0].cached), deliver(item))
        worked[0].submit(one.job)
    assert [one.answer().tokens for one in asked] == [10] * 10
    assert 40 < max(most) <= 100
    large = Asked(worked, list(range(5, 205)), 10)  # more than all caches may hold: it is computed alone
    worked[0].submit(large.job)
    assert large.answer().tokens == 10


def test_a_conversation_goes_on_in_its_cache(worked: Worked) -> None:
    talks = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
    for talk in talks:
        first = Asked(worked, talk, 4)
        worked[0].submit(first.job)
        assert first.answer().reused_tokens == 0
    for talk in talks:
        second = Asked(worked, [*talk, 30, 31, 32], 4)
        worked[0].submit(second.job)
        assert second.answer().reused_tokens == 6


def test_a_long_prompt_is_read_in_parts_and_can_be_given_up(worked: Worked, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, parts = worked[1].backend, []
    asked = Asked(worked, [5] * (10 * READ), 4)
    reading = backend.read

    def read(tokens: list[int], cache: Any) -> None:
        reading(tokens, cache)
        parts.append(len(tokens))
        if len(parts) == 2:
            asked.job.cancelled.set()

    monkeypatch.setattr(backend, "read", read)
    worked[0].submit(asked.job)
    answer = asked.answer()
    assert (parts, answer.finish, answer.tokens) == ([READ] * 2, "stopped", 0)


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_prompt_read_in_parts_gives_the_same_answer(
    model: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("mlxsft.chat.generate.READ", 8)
    loaded = load_for_chat(str(model), {}, revision=None, template=None, backend_name=backend)
    prompt, found = [5 + i % 90 for i in range(50)], []
    whole = loaded.backend.stream(prompt, Sampling(), loaded.backend.new_cache(), lambda *token: found.append(token))
    tokens = [next(whole) for _ in range(12)]
    whole.close()
    watched: list[Any] = []
    memory, answer = Memory(loaded.backend), Answer()
    steps = continue_prompt(
        loaded.backend, loaded.renderers[None], prompt, Sampling(), 12,
        memory=memory, answer=answer, watch=lambda *token: watched.append(token),
    )  # fmt: skip
    assert "".join(steps) == answer.text
    assert (memory.tokens, answer.tokens) == ([*prompt, *tokens], 12)
    for (one, expected), (other, logprobs) in zip(found, watched, strict=False):
        assert one == other == expected.argmax()
        assert np.exp(expected).sum() == pytest.approx(1, abs=1e-5)
        assert logprobs == pytest.approx(expected, abs=1e-4)


def test_a_failure_is_told_to_its_own_job_alone(
    worked: Worked, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend, answering = worked[1].backend, worked[1].backend.stream

    def failing(tokens: list[int], *more: Any) -> Iterator[int]:
        for token in answering(tokens, *more):
            if tokens[0] == 66:
                raise RuntimeError("as if memory had run out")
            yield token

    monkeypatch.setattr(backend, "stream", failing)
    asked = [Asked(worked, [number, 5, 6], 6) for number in (65, 66, 67)]
    for one in asked:
        worked[0].submit(one.job)
    assert [asked[i].answer().tokens for i in (0, 2)] == [6, 6]
    assert isinstance(asked[1].ended.get(timeout=60), RuntimeError)
    assert "as if memory had run out" in capsys.readouterr().err


def test_what_cannot_be_loaded_is_told_to_who_starts() -> None:
    def load() -> Loaded:
        raise FileNotFoundError("model")

    with pytest.raises(FileNotFoundError):
        Worker(load).start()


def test_the_likeliest_tokens_come_in_order() -> None:
    logprobs = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    chosen = Chosen.of(2, logprobs, 3)
    assert [token for token, _ in chosen.top] == [1, 3, 2]
    assert chosen.logprob == pytest.approx(np.log(0.2))
    assert len(Chosen.of(0, logprobs, 9).top) == 4
    assert Chosen.of(0, logprobs, 0).top == ()
