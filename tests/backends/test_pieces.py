"""Cutting computations: into pieces of about one size, and equally many in parts that are computed side by side."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest

from mlxsft.backends import mlx_attention, mlx_exp, pieces
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_cores import Cores
from mlxsft.backends.pieces import InStep
from mlxsft.data.batches import Batch
from mlxsft.recipe_training import AdapterRecipe

Trainer = Callable[..., MlxBackend]


@pytest.mark.parametrize(("size", "most", "lengths"), [(10, 4, [3, 3, 4]), (4, 4, [4]), (5, 4, [2, 3]), (0, 4, [0])])
def test_the_pieces_are_all_of_it_and_of_one_size(size: int, most: int, lengths: list[int]) -> None:
    cut = pieces.pieces(size, most)
    assert [len(range(size)[piece]) for piece in cut] == lengths
    assert [i for piece in cut for i in range(size)[piece]] == list(range(size))


def test_the_parts_after_the_first_are_cut_as_often_unless_that_makes_pieces_too_large() -> None:
    in_step = InStep()
    first, second = in_step.part(), in_step.part()
    with first.making():
        assert [len(pieces.pieces(size, 10)) for size in (25, 10, 10)] == [3, 1, 1]
    with second.making():
        assert [len(pieces.pieces(size, 10)) for size in (12, 15, 16)] == [3, 1, 2]
        assert len(pieces.pieces(31, 10)) == 4  # the first one did not get so far
    with first.making():
        assert len(pieces.pieces(2, 10)) == 2  # no more pieces than there are things
    assert len(pieces.pieces(25, 30)) == 1  # outside of a part


@pytest.mark.parametrize("settings", [{}, {"checkpoint_activations": True}])
def test_unequal_parts_of_a_batch_have_graphs_of_equal_size(
    trainer: Trainer, settings: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows of 14 and 13 tokens beside two of 9 and 8, where 12 tokens are a block, and of the head's too."""
    monkeypatch.setattr(mlx_attention, "BLOCK", 12)
    monkeypatch.setattr(mlx_exp, "_CACHED", 1300)
    backend = trainer(AdapterRecipe(rank=4, alpha=8.0), **settings)
    backend._cores = Cores("cpu", 2)
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(1, 256, (4, 14)).astype(np.int32), np.zeros((4, 14), dtype=bool)
    for row, length in enumerate((14, 9, 13, 8)):
        mask[row, 2:length] = True
    assert (sizes := graph_sizes(backend, Batch(tokens, mask)))[0] == sizes[1]
    monkeypatch.setattr(pieces.Way, "count", lambda self, size, most: pieces._needed(size, most))
    assert (sizes := graph_sizes(backend, Batch(tokens, mask)))[0] != sizes[1]


def graph_sizes(backend: MlxBackend, batch: Batch) -> list[int]:
    """Of each part of a batch, how many arrays have been asked for when its gradient is there."""
    backend._loss._head.chunk_rows = 12
    sizes = [0] * len(parts := backend._cores.parts(batch))
    evaluate = mx.eval

    def counting(*arrays: object) -> None:
        if isinstance(arrays[0], list):  # of all parts: as many of each
            flat, count = arrays[0], len(arrays[0]) // len(parts)
            for number in range(len(parts)):
                sizes[number] += nodes(flat[number * count : (number + 1) * count])
        evaluate(*arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "eval", counting)
        found = backend._gradients(parts, np.zeros((*batch.tokens.shape, 2), dtype=np.uint32))
    return [size + nodes([loss, *gradient.values()]) for size, (loss, gradient) in zip(sizes, found, strict=True)]


def nodes(arrays: list[mx.array]) -> int:
    """The arrays of a graph."""
    mx.export_to_dot(drawing := io.StringIO(), *arrays)
    return drawing.getvalue().count("label")
