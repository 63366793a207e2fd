"""What `mlxsft bench` computes: the same numbers of tokens in the same rows on every machine, with every version.

A change here is another protocol and needs another version: results of two protocols are never laid side by side.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mlxsft.data.places import Origin
from mlxsft.data.render import Example
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe


@dataclass(frozen=True)
class Protocol:
    """Every setting that the figures depend on, beside model, machine and program.

    A repetition of tuning is one update; of generating, one prompt and one answer. What is done once before is not
    timed: it reads files, and compiles.
    """

    version: int = 1
    seed: int = 0  # of token ids, and of the adapter's first values
    rows: int = 8  # in one update
    row_tokens: int = 128
    trained_tokens: int = 64  # of each row, the last ones
    prompt_tokens: int = 512
    answer_tokens: int = 128  # after the first one, which belongs to the prompt
    adapter: dict[str, Any] = field(
        default_factory=lambda: {
            "kind": "lora",
            "rank": 16,
            "alpha": 32.0,
            "rslora": False,
            "init": "default",
            "dropout": 0.0,
            "loraplus_lr_ratio": 1.0,
            "layers": "all",
            "targets": "all-linear",
        }
    )
    train: dict[str, Any] = field(
        default_factory=lambda: {
            "batch_size": 8,
            "micro_batch_tokens": 4096,
            "batching": "buckets",
            "learning_rate": 2e-4,
            "optimizer": "adamw",
            "clip_norm": 1.0,
            "checkpoint_activations": False,
            "cache_limit": None,
        }
    )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def positions(self) -> int:
        """How many tokens a model has to take: prompt, answer, its first token, and those computed ahead."""
        return self.prompt_tokens + self.answer_tokens + 3

    def adapter_recipe(self) -> AdapterRecipe:
        return AdapterRecipe.model_validate(self.adapter)

    def train_recipe(self) -> TrainRecipe:
        return TrainRecipe.model_validate({"steps": 1, "seed": self.seed, **self.train})

    def examples(self, vocabulary: int) -> list[Example]:
        """The rows of an update, of token ids below `vocabulary`, each as likely as any other."""
        trained = np.arange(self.row_tokens) >= self.row_tokens - self.trained_tokens
        return [
            Example(self._tokens(vocabulary, row, self.row_tokens), trained, Origin("protocol", row + 1), number=row)
            for row in range(self.rows)
        ]

    def prompt(self, vocabulary: int) -> list[int]:
        """`prompt_tokens` ids, and one more, with which the answer begins."""
        ids: list[int] = self._tokens(vocabulary, self.rows, self.prompt_tokens + 1).tolist()
        return ids

    def _tokens(self, vocabulary: int, number: int, count: int) -> np.ndarray:
        return np.random.default_rng([self.seed, number]).integers(0, vocabulary, count, dtype=np.int32)


PROTOCOL = Protocol()
