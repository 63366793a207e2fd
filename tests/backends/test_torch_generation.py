"""Tokens on PyTorch: those of MLX where they are the likeliest, drawn from the same distribution where not."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlxsft.backends import Backend, Sampling
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.backends.torch import TorchBackend
from mlxsft.backends.torch_generation import Sampler
from mlxsft.models.source import open_model
from tests.backends.test_mlx_parity import save

PROMPT = [5, 77, 130, 21, 9, 200]


def answer(backend: Backend, n: int, sampling: Sampling, cache: Any = None, prompt: list[int] = PROMPT) -> list[int]:
    """The first `n` tokens, the stream then closed."""
    stream = backend.stream(prompt, sampling, backend.new_cache() if cache is None else cache)
    tokens = list(islice(stream, n))
    stream.close()
    return tokens


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "gpt2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[MlxBackend, TorchBackend]:
    """A random model, with windows of 16 tokens in the second case, on both backends."""
    folder = save(tmp_path_factory.mktemp(request.param), request.param, {}, tie_word_embeddings=True, hidden_size=64)
    source = open_model(str(folder))
    return MlxBackend(source), TorchBackend(source)


@pytest.mark.parametrize("penalty", [None, 1.5])
def test_greedy_tokens_are_those_of_mlx(both: tuple[MlxBackend, TorchBackend], penalty: float | None) -> None:
    ours, theirs = (answer(backend, 30, Sampling(repetition_penalty=penalty)) for backend in both)
    assert ours == theirs


@pytest.mark.parametrize("n", [1, 7])
def test_the_cache_holds_the_prompt_and_every_token_yielded(both: tuple[MlxBackend, TorchBackend], n: int) -> None:
    backend = both[1]
    cache = backend.new_cache()
    said = answer(backend, n, Sampling(), cache)
    assert cache.get_seq_length() == len(PROMPT) + n
    assert answer(backend, 10, Sampling(), cache, [42]) == answer(backend, 10, Sampling(), None, [*PROMPT, *said, 42])


def test_a_trimmed_cache_is_one_that_never_held_more(both: tuple[MlxBackend, TorchBackend]) -> None:
    backend = both[1]
    cache = backend.new_cache()
    said = answer(backend, 20, Sampling(), cache)
    assert backend.trim(cache, 17)
    assert cache.get_seq_length() == len(PROMPT) + 3
    assert answer(backend, 5, Sampling(), cache, [17]) == answer(backend, 5, Sampling(), None, [*PROMPT, *said[:3], 17])
    assert backend.trim(cache, 0)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.7), Sampling(1.3, top_p=0.6), Sampling(1.0, top_k=4), Sampling(1.0, min_p=0.3),
     Sampling(0.9, top_p=0.8, top_k=5, min_p=0.05)],
)  # fmt: skip
def test_drawn_tokens_have_the_shares_that_mlx_lms_filters_leave(sampling: Sampling) -> None:
    """400 of 12 tokens: every share within 5 standard deviations, and none of a token that is filtered out."""
    logits = 1.5 * np.random.default_rng(0).standard_normal(12).astype(np.float32)
    filters, left = mlx_lm("sample_utils"), mx.array(logits)[None] - mx.logsumexp(mx.array(logits))
    if sampling.top_p < 1:
        left = filters.apply_top_p(left, sampling.top_p)
    if sampling.min_p > 0:
        left = filters.apply_min_p(left, sampling.min_p)
    if sampling.top_k:
        left = filters.apply_top_k(left, sampling.top_k)
    shares = np.array(mx.softmax(left / sampling.temperature, axis=-1))[0]
    draw = Sampler(Sampling(**{**vars(sampling), "seed": 3}), [])
    drawn = np.bincount([draw(torch.from_numpy(logits)) for _ in range(400)], minlength=12) / 400
    assert (drawn[shares == 0] == 0).all()
    assert (np.abs(drawn - shares) <= 5 * np.sqrt(shares * (1 - shares) / 400) + 1e-9).all()


def test_the_same_seed_draws_the_same_tokens(both: tuple[MlxBackend, TorchBackend]) -> None:
    drawn = [answer(both[1], 12, Sampling(temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_greedy_tokens_of_a_real_model_are_those_of_mlx(real: Path) -> None:
    source = open_model(str(real / "models" / "stories260k-llama"))
    ours, theirs = (
        answer(b, 40, Sampling(), prompt=[1, 403, 407, 261]) for b in (MlxBackend(source), TorchBackend(source))
    )
    assert ours == theirs
