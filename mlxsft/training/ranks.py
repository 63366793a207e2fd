"""What the ranks of a run have to agree on before they train: the same run, from the same state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxsft.errors import InputRefused
from mlxsft.training.checkpoints import Checkpoint, Progress

if TYPE_CHECKING:
    from mlxsft.backends import Backend, Ranks, Tensors
    from mlxsft.recipe import Recipe

_BYTES_COMPARED = 6  # of a hash: whole numbers up to 2**48 are exact in float64, and so are sums of some of them


def refuse_another_run(ranks: Ranks, recipe: Recipe, lock: Mapping[str, Any]) -> None:
    """Returns where all ranks have the same settings, base, template, rows and versions; paths may differ.

    Raises InputRefused, on every rank, where one differs from rank 0.
    """
    same = {
        "settings": [getattr(recipe, part).model_dump(mode="json") for part in ("adapter", "train", "eval", "save")]
        + [recipe.data.model_dump(mode="json", exclude={"train", "valid", "template", "templates"})],
        "base": lock["base"]["sha256"],
        "template": lock["template"],
        "data": sorted(lock["data"].values()),
        "MLX": lock["versions"].get("mlx"),
        "mlxsft": lock["versions"]["mlxsft"],
    }
    hashes = [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).digest() for part in same.values()]
    mine = np.array([int.from_bytes(h[:_BYTES_COMPARED], "big") for h in hashes], dtype=np.float64)
    first = ranks.sum(mine if ranks.rank == 0 else np.zeros_like(mine))
    differ = ranks.sum((mine != first).astype(np.float64)) > 0  # on any rank, so that all of them end
    if names := [name for name, other in zip(same, differ, strict=True) if other]:
        raise InputRefused(
            f"the ranks have not the same {', '.join(names)}", "Copy the files and the versions of rank 0 to all hosts."
        )


def any_of(ranks: Ranks, said: bool) -> bool:
    """Whether any rank says so."""
    return bool(ranks.sum(np.array([said], dtype=np.float64))[0])


def said_by_first(ranks: Ranks, values: dict[str, Any]) -> dict[str, Any]:
    """What rank 0 has here, on every rank; it must be made for JSON."""
    text = json.dumps(values).encode() if ranks.rank == 0 else b""
    letters = np.zeros(int(ranks.sum(np.array([len(text)], dtype=np.float64))[0]))
    letters[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    said: dict[str, Any] = json.loads(ranks.sum(letters).astype(np.uint8).tobytes())
    return said


def put_back(backend: Backend, checkpoint: Checkpoint | None) -> Progress | None:
    """How far the run is: rank 0's checkpoint is put into the backends of all ranks, which need no file of it.

    None where rank 0 has no checkpoint.
    """
    ranks = backend.ranks
    progress = said_by_first(ranks, {} if checkpoint is None else asdict(checkpoint.progress))
    if not progress:
        return None
    adapter, optimizer = (None, None) if checkpoint is None else (checkpoint.adapter, checkpoint.optimizer)
    backend.load_adapter_state(_of_first(ranks, adapter, backend.adapter_state()))
    backend.load_optimizer_state(_of_first(ranks, optimizer, backend.optimizer_state()))
    return Progress(**progress)


def _of_first(ranks: Ranks, tensors: Tensors | None, shapes: Tensors) -> Tensors:
    """Rank 0's tensors on every rank; the others, which have None, add zeros of these shapes."""
    if ranks.count == 1 and tensors is not None:
        return tensors
    given = tensors or {name: np.zeros_like(tensor) for name, tensor in shapes.items()}
    return {name: ranks.sum(given[name]) for name in shapes}
