"""The base before and after tuning: its answers to requests about held-out products, and how many are right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxsft.chat.generate import Answer, Sampling, stream_answer
from mlxsft.chat.load import load_for_chat
from mlxsft.data.formats import Turn
from mlxsft.quickstart.pairs import FOLDER, TASKS, Pair, Verdict, judge

BASE = FOLDER / "base"
RECIPE = FOLDER / "recipe.yaml"
TUNED = "tuned"  # what the adapter is called
MAX_TOKENS = 80  # of an answer; the longest right one has 50


@dataclass(frozen=True)
class Judged:
    """An answer of a model to a request, and what is right in it."""

    pair: Pair
    answer: str
    verdict: Verdict


@dataclass(frozen=True)
class Score:
    """How many answers there are, and of them those with right facts, with right form, that end, and with all three."""

    judged: int
    facts: int
    form: int
    ends: int
    good: int

    @classmethod
    def of(cls, judged: Iterable[Judged]) -> Score:
        verdicts = [one.verdict for one in judged]
        return cls(
            len(verdicts),
            sum(v.facts for v in verdicts),
            sum(v.form for v in verdicts),
            sum(v.ends for v in verdicts),
            sum(v.good for v in verdicts),
        )


def answered(pairs: Sequence[Pair], adapter: Path | None, backend_name: str) -> Iterator[Judged]:
    """The greedy answers of the base, with the adapter of a run where one is given, one by one."""
    adapters = {TUNED: adapter} if adapter is not None else {}
    loaded = load_for_chat(str(BASE), adapters, revision=None, template=None, backend_name=backend_name)
    backend, used = loaded.backend, TUNED if adapter is not None else None
    backend.use(used)
    try:
        for pair in pairs:
            answer = Answer()
            turns = [Turn("user", pair.prompt)]
            for _ in stream_answer(backend, loaded.renderers[used], turns, Sampling(), MAX_TOKENS, answer=answer):
                pass
            yield Judged(pair, answer.text, judge(pair, answer.text, ended=answer.finish == "stop"))
    finally:
        backend.close()


def by_task(judged: Sequence[Judged]) -> dict[str, Score]:
    """Scores by task, and of all answers under `all`."""
    scores = {task: Score.of(one for one in judged if one.pair.task == task) for task in TASKS}
    return {task: score for task, score in scores.items() if score.judged} | {"all": Score.of(judged)}
