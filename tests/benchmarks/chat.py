"""Chat beside mlx-lm: how fast tokens come, and how soon the fifth turn of a long conversation is answered.

    python -m tests.benchmarks.chat MODEL [--tokens 64] [--turns 5] [--repeats 3]

Prints one JSON line a figure. Both use the same model in one process, in turns. mlx_lm.chat keeps a cache, but sends
every turn with a template of its own, so that the model sees no earlier turn as it was trained to; its way to the same
prompt is to send all turns again (`mlx_lm.generate`, `mlx_lm.server` without its prompt cache). That is what the fifth
turn is compared with.

Measured on two cores, MLX's CPU backend, the shapes of SmolLM2-135M in float32: 21.7 tokens a second, 1.02 times
mlx-lm's (0.97 to 1.03 in three turns); 2.8 s to the first token of turn 5, of 1,672 tokens, 0.245 times mlx-lm's (0.244
to 0.252); 2.2 ms to swap adapters, at most 2.8.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

from mlxsft.backends import Sampling, load_backend
from mlxsft.backends.mlx import MlxBackend
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.chat.generate import Answer, Memory, stream_answer
from mlxsft.data.formats import Turn
from mlxsft.data.render import load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe_training import AdapterRecipe

QUESTION = "Tell me about the history of the bicycle, its parts, and how each of them is cared for. " * 8


class Bench:
    """One model, asked by us and by mlx-lm."""

    def __init__(self, model: str, tokens: int) -> None:
        source = open_model(model)
        backend = load_backend("mlx", source)
        assert isinstance(backend, MlxBackend)
        self.backend, self.renderer, self.tokens = backend, load_renderer(source), tokens
        self.renderer.end_tokens = frozenset()  # random weights may end at once
        self.theirs = mlx_lm("tokenizer_utils").TokenizerWrapper(self.renderer.tokenizer.hf)
        self.theirs._eos_token_ids = set()

    def ours(self, turns: list[Turn], memory: Memory | None = None) -> Answer:
        answer = Answer()
        sampling = Sampling()
        for _ in stream_answer(self.backend, self.renderer, turns, sampling, self.tokens, memory=memory, answer=answer):
            pass
        return answer

    def mlx_lms(self, turns: list[Turn]) -> tuple[float, float]:
        """Tokens a second, and seconds to the first token, with everything computed anew."""
        began = time.perf_counter()
        prompt = self.renderer.prompt(turns)
        first, tokens = 0.0, 0
        for _ in mlx_lm("generate").stream_generate(self.backend.model, self.theirs, prompt, max_tokens=self.tokens):
            first = first or time.perf_counter() - began
            tokens += 1
        return tokens / (time.perf_counter() - began - first), first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    bench = Bench(asked.model, asked.tokens)
    question = [Turn("user", QUESTION)]
    bench.ours(question), bench.mlx_lms(question)  # what is slow only the first time
    rates = [(bench.ours(question).tokens_per_second, bench.mlx_lms(question)[0]) for _ in range(asked.repeats)]
    report("tokens a second", rates)
    firsts, length = [], 0
    for _ in range(asked.repeats):
        turns: list[Turn] = []
        memory = Memory(bench.backend)
        for number in range(asked.turns):
            turns.append(Turn("user", f"{number}. {QUESTION}"))
            answer = bench.ours(turns, memory)
            turns.append(Turn("assistant", answer.text))
        length = answer.prompt_tokens
        firsts.append((answer.prompt_seconds, bench.mlx_lms(turns[:-1])[1]))
    report(f"seconds to the first token of turn {asked.turns}, of {length} tokens", firsts)
    report_swaps(asked.model)


def report_swaps(model: str) -> None:
    """How long it takes until another adapter answers, in milliseconds: two of rank 16 on every linear module."""
    source = open_model(model)
    first = MlxBackend(source)
    first.attach(AdapterRecipe(rank=16), 0)
    config, tensors = first.adapter_config(), first.adapter_state()
    first.close()
    backend = MlxBackend(source)
    for name in ("a", "b"):
        backend.add_adapter(name, config, tensors)
    took = []
    for name in ("a", "b", None) * 10:
        began = time.perf_counter()
        backend.use(name)
        took.append(1000 * (time.perf_counter() - began))
    print(json.dumps({"what": "ms to swap", "median": round(median(took), 2), "most": round(max(took), 2)}))


def report(what: str, pairs: list[tuple[float, float]]) -> None:
    """Ours and mlx-lm's, and the ratio of each pair."""
    ratios = [ours / theirs for ours, theirs in pairs]
    ours, theirs = (median(values) for values in zip(*pairs, strict=True))
    figures = {"mlxsft": round(ours, 3), "mlx-lm": round(theirs, 3), "ratio": round(median(ratios), 3)}
    print(json.dumps({"what": what, **figures, "each": [round(ratio, 3) for ratio in ratios]}), flush=True)


if __name__ == "__main__":
    main()
