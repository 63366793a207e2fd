"""A third model on this machine says which of two answers is better; it is asked twice, in both orders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlxsft.backends import Backend
from mlxsft.chat.generate import Answer
from mlxsft.data.batches import stack
from mlxsft.data.conversation import Turn
from mlxsft.data.places import Origin
from mlxsft.data.render import Example, Renderer
from mlxsft.errors import InputRefused
from mlxsft.evaluation.measure import Watch, unwatched
from mlxsft.evaluation.rows import Asked

_QUESTION = """Which of two answers to a request is better: more correct, more helpful, and no longer than it should be?

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Say A or B, and nothing else."""
_CHARACTERS = 2000  # of each text that the judge reads


def win_shares(
    backend: Backend,
    renderer: Renderer,
    asked: Sequence[Asked],
    base: Sequence[Answer],
    tuned: Sequence[Answer],
    *,
    watch: Watch = unwatched,
) -> list[float]:
    """For each prompt 1 where the tuned answer wins in both orders, 0 where the base's does, else ½; equal texts tie.

    A judge that likes the first place, or the letter A, therefore gives ties and no wins.
    """
    shares = []
    for row, before, after in watch(list(zip(asked, base, tuned, strict=True)), "the judge", len(asked)):
        if before.text.strip() == after.text.strip():
            shares.append(0.5)
            continue
        first = _prefers_first(backend, renderer, row.prompt, after.text, before.text)
        second = not _prefers_first(backend, renderer, row.prompt, before.text, after.text)
        shares.append((first + second) / 2)
    return shares


def _prefers_first(backend: Backend, renderer: Renderer, prompt: str, first: str, second: str) -> bool:
    """Whether the judge finds the letter A likelier than B, as the first token of its answer."""
    texts = {"prompt": prompt, "first": first or "(nothing)", "second": second or "(nothing)"}
    asked = _QUESTION.format(**{name: text[:_CHARACTERS] for name, text in texts.items()})
    before = renderer.prompt([Turn("user", asked)])
    if renderer.positions is not None and len(before) + 2 > renderer.positions:
        raise InputRefused(
            f"--judge: the question has {len(before)} tokens, and this model takes {renderer.positions}",
            "Take another judge, or shorter answers with --max-tokens.",
        )
    losses = []
    for letter in "AB":
        said = renderer.tokenizer.encode(f"{renderer.opening}{letter}")
        tokens = np.array([*before, *said], np.int32)
        mask = np.arange(len(tokens)) >= len(before)
        batch = stack([Example(tokens, mask, Origin("", 0))], limit=renderer.positions)
        losses.append(float(backend.losses(batch).sum()))
    return losses[0] < losses[1]
