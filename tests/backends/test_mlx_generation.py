"""Tokens on MLX: mlx-lm's own, with a cache that holds what was said."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsft.backends import Sampling
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.models.source import ModelSource, open_model

PROMPT = [5, 77, 130, 21, 9, 200]


@pytest.fixture(scope="module")
def backend(llama: ModelSource) -> MlxBackend:
    return MlxBackend(llama)


def answer(backend: MlxBackend, n: int, sampling: Sampling, cache: Any = None, prompt: list[int] = PROMPT) -> list[int]:
    """The first `n` tokens, the stream then closed."""
    stream = backend.stream(prompt, sampling, backend.new_cache() if cache is None else cache)
    tokens = list(islice(stream, n))
    stream.close()
    return tokens


def length(cache: Any) -> int:
    return int(cache[0].offset)


def test_greedy_tokens_are_those_of_mlx_lm(backend: MlxBackend) -> None:
    steps = mlx_lm("generate").generate_step(mx.array(PROMPT), backend.model, max_tokens=30)
    assert answer(backend, 30, Sampling()) == [token for token, _ in steps]


def test_greedy_tokens_of_a_real_model_are_the_likeliest(real: Path) -> None:
    backend = MlxBackend(open_model(str(real / "models" / "stories260k-llama")))
    tokens = [1, 403, 407, 261]
    for token in answer(backend, 40, Sampling(), prompt=tokens[:]):
        assert token == int(mx.argmax(backend.model(mx.array([tokens]))[0, -1]).item())
        tokens.append(token)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_cache_holds_the_prompt_and_every_token_yielded(backend: MlxBackend, n: int) -> None:
    whole = answer(backend, 20, Sampling())
    cache = backend.new_cache()
    said = answer(backend, n, Sampling(), cache)
    assert length(cache) == len(PROMPT) + n
    # A next prompt goes on behind it, as if all had been one prompt.
    assert answer(backend, 10, Sampling(), cache, [42]) == answer(backend, 10, Sampling(), None, [*PROMPT, *said, 42])
    assert said == whole[:n]


def test_a_trimmed_cache_is_one_that_never_held_more(backend: MlxBackend) -> None:
    cache = backend.new_cache()
    said = answer(backend, 8, Sampling(), cache)
    assert backend.trim(cache, 5)
    assert length(cache) == len(PROMPT) + 3
    assert answer(backend, 5, Sampling(), cache, [17]) == answer(backend, 5, Sampling(), None, [*PROMPT, *said[:3], 17])
    assert backend.trim(cache, 0)


def test_a_cache_that_cannot_be_trimmed_says_so(backend: MlxBackend) -> None:
    caches = mlx_lm("models.cache")
    rotating = caches.RotatingKVCache(max_size=4)
    keys = mx.zeros((1, 1, 6, 8))
    rotating.update_and_fetch(keys, keys)
    assert not backend.trim([rotating], 2)
    short = caches.KVCache()
    short.update_and_fetch(keys, keys)
    assert not backend.trim([short], 9)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=3),
        Sampling(temperature=0.7, top_p=0.9, top_k=40, min_p=0.01, seed=3),
        Sampling(temperature=1.0, top_k=10_000, repetition_penalty=1.3, seed=3),
    ],
)
def test_a_seed_decides_the_tokens(backend: MlxBackend, sampling: Sampling) -> None:
    first = answer(backend, 12, sampling)
    mx.random.seed(99)  # the global state has no say
    assert answer(backend, 12, sampling) == first
    assert answer(backend, 12, Sampling(temperature=sampling.temperature, seed=4)) != first


def test_without_a_seed_every_answer_is_another_one(backend: MlxBackend) -> None:
    hot = Sampling(temperature=2.0)
    assert answer(backend, 12, hot) != answer(backend, 12, hot)


def test_sampled_tokens_have_the_probabilities_of_the_model(backend: MlxBackend) -> None:
    probabilities = np.array(mx.softmax(backend.model(mx.array([PROMPT]))[0, -1] / 0.5))
    drawn = [answer(backend, 1, Sampling(temperature=0.5, seed=seed))[0] for seed in range(400)]
    likeliest = int(probabilities.argmax())
    expected = float(probabilities[likeliest])
    error = np.sqrt(expected * (1 - expected) / len(drawn))
    assert abs(drawn.count(likeliest) / len(drawn) - expected) < 4 * error


def test_one_likeliest_token_is_greedy(backend: MlxBackend) -> None:
    assert answer(backend, 12, Sampling(temperature=5.0, top_k=1, seed=0)) == answer(backend, 12, Sampling())


def test_a_repetition_penalty_repeats_less(backend: MlxBackend) -> None:
    plain = answer(backend, 40, Sampling())
    penalized = answer(backend, 40, Sampling(repetition_penalty=2.0))
    assert len(set(penalized)) > len(set(plain))
