"""Where rows come from, and how often an epoch has those of each source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mlxsft.data.conversation import Conversation
from mlxsft.data.phrasings import position_of

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe


@dataclass(frozen=True)
class WeightedPath:
    """A file or folder and its weight: 2 has every row twice an epoch, 0.5 half of the rows once."""

    path: Path
    weight: float = 1.0

    def copies(self, row: Conversation, *, seed: int) -> int:
        """How often an epoch has this row; which rows a fraction takes follows from the seed and what they say."""
        whole = int(self.weight)
        return whole + (position_of(row, seed, "weight") < (self.weight - whole) * 2**64)


def sources_of(data: DataRecipe) -> dict[str, list[WeightedPath]]:
    """What the recipe names, by what it is for: `train`, and `valid` where that is no share of the rows."""
    named = data.train if isinstance(data.train, tuple) else (data.train,)
    sources = {
        "train": [WeightedPath(Path(s)) if isinstance(s, str) else WeightedPath(Path(s.path), s.weight) for s in named]
    }
    if isinstance(data.valid, str):
        sources["valid"] = [WeightedPath(Path(data.valid))]
    return sources
