"""Chat beside mlx-lm: how fast tokens come, and how soon the fifth turn of a long conversation is answered.

    python -m tests.benchmarks.chat MODEL [--tokens 64] [--turns 5] [--repeats 3] [--only rate,resent,programs,swap]

Prints one JSON line a figure, the two in turns with the same model and questions. `rate` and `resent` are taken in one
process; `resent` compares the last turn with mlx-lm computing the same prompt, all turns of it, as `mlx_lm.generate`
does with a conversation. `programs` starts `mlxsft chat` and `mlx_lm.chat` as they are and sends both the same lines
through pipes. mlx_lm.chat keeps a cache itself, so that it computes no more for a turn than we do; but it renders each
turn as if it was the first one (with the template's default system prompt, and without the end of the answer before).

Measured on two cores, MLX's CPU backend with OpenBLAS in both, the shapes of SmolLM2-135M in float32, medians: tokens a
second 1.03 times mlx-lm's (0.79 to 1.22 in nine turns of 32 tokens); 2.5 s to the first token of turn 5, of 1,096
tokens, 0.224 times mlx-lm's with all turns sent again (0.220 and 0.229); 9 ms to swap adapters, at most 13.
From the programs, with answers of 16 tokens, the first byte of turn 5 took 1.02 times mlx_lm.chat's (0.99 and 1.20 in
three turns), which keeps its cache as well. It was 1.28 to 1.51 times while an answer's text was encoded again: what
random weights say becomes more tokens then. A trained model was not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from mlxsft.backends import Sampling, load_backend
from mlxsft.backends.blas import load_blas
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


@dataclass(frozen=True)
class Program:
    """A chat program on pipes: what it writes when it waits for a line, and how a line is sent so that it does."""

    command: Sequence[str]
    waits: bytes  # a pattern
    asks: str = "{}\n"
    echo: int = 0  # bytes that it writes before it begins to compute

    def last_of(self, questions: Sequence[str]) -> float:
        """Seconds from sending the last question to the first byte of its answer."""
        blas, _ = load_blas()  # mlx-lm's program would take MLX's own, which is slow on Linux
        environment = os.environ | ({"LD_PRELOAD": blas.path} if blas is not None else {})
        with subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        ) as ran:
            assert ran.stdin is not None
            assert ran.stdout is not None
            took = 0.0
            for sent in ["", *(self.asks.format(question) for question in questions)]:
                began, came, first = time.perf_counter(), b"", 0.0
                ran.stdin.write(sent.encode() if sent else self.asks.format("").lstrip().encode())
                ran.stdin.flush()
                while not re.search(self.waits, came):
                    more = os.read(ran.stdout.fileno(), 1 << 16)
                    assert more, f"it ended: {came.decode(errors='replace')}"
                    came += more
                    first = first or (time.perf_counter() - began if len(came) > self.echo else 0.0)
                took = first
            ran.kill()
        return took


def programs(model: str, tokens: int) -> tuple[Program, Program]:
    """`mlxsft chat` and `mlx_lm.chat`; ours is asked how long the conversation is when it has answered."""
    most = ["--max-tokens", str(tokens)]
    ours = [sys.executable, "-m", "mlxsft", "chat", model, *most]
    theirs = [sys.executable, "-m", "mlx_lm", "chat", "--model", model, *most]
    return Program(ours, rb"\d tokens of the ", "{}\n/tokens\n"), Program(theirs, "›".encode(), echo=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=16, help="of each answer of the programs")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="rate,resent,programs,swap")
    asked = parser.parse_args()
    only = asked.only.split(",")
    if "programs" in only:
        questions = [f"{number}. {QUESTION}" for number in range(asked.turns)]
        both = programs(asked.model, asked.answer_tokens)
        pairs = [(both[0].last_of(questions), both[1].last_of(questions)) for _ in range(asked.repeats)]
        report(f"seconds to the first byte of turn {asked.turns}, both programs", pairs)
    if "swap" in only:
        report_swaps(asked.model)
    if not {"rate", "resent"} & set(only):
        return
    bench = Bench(asked.model, asked.tokens)
    question = [Turn("user", QUESTION)]
    bench.ours(question), bench.mlx_lms(question)  # what is slow only the first time
    if "rate" in only:
        rates = [(bench.ours(question).tokens_per_second, bench.mlx_lms(question)[0]) for _ in range(asked.repeats)]
        report("tokens a second", rates)
    firsts, length = [], 0
    for _ in range(asked.repeats if "resent" in only else 0):
        turns: list[Turn] = []
        memory = Memory(bench.backend)
        for number in range(asked.turns):
            turns.append(Turn("user", f"{number}. {QUESTION}"))
            answer = bench.ours(turns, memory)
            turns.append(Turn("assistant", answer.text))
        length = answer.prompt_tokens
        firsts.append((answer.prompt_seconds, bench.mlx_lms(turns[:-1])[1]))
    if firsts:
        report(f"seconds to the first token of turn {asked.turns}, of {length} tokens, all re-sent by mlx-lm", firsts)


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
