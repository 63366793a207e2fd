"""Several adapters of one base → one adapter: PEFT's arithmetic, in NumPy.

`cat` puts the matrices side by side: what the result adds to the model is exactly the weighted sum of what each adds.
The others give the rank of one adapter. They work on A and B apart, each times √|weight · scale|, the sign with A, so
that the product holds what two adapters have in common, and something of every pair besides:
    linear                the sum
    ties, dare-ties       of each number the ones whose sign has the majority, averaged   https://arxiv.org/abs/2306.01708
    dare, dare-ties       first, of each matrix a random share is kept and divided by that share
                                                                                          https://arxiv.org/abs/2311.03099
    ties                  first, of each matrix the share of the largest numbers is kept
https://github.com/huggingface/peft/blob/main/src/peft/utils/merge_utils.py
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft import __version__
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.adapter import WEIGHTS, Adapter, listed, load_adapter, save_adapter
from mlxsft.models.passport import KEY, passport_part
from mlxsft.models.whole_folder import whole_folder
from mlxsft.models.written import Written

Floats = NDArray[np.float32]

KEPT = ("base", "tokenizer", "template", "end_tokens")  # of a passport, where all adapters have the same


def merge(
    folders: Sequence[Path],
    out: Path,
    *,
    method: str = "cat",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    force: bool = False,
) -> Written:
    """The adapters in `folders`, each times its weight (1 by default), as one in `out`.

    `density` is the share of numbers that ties and dare keep; `seed` decides which those of dare are. Raises UsageError
    for settings that do not go together, InputRefused for adapters that cannot be added up, with every reason.
    """
    factors = [1.0] * len(folders) if weights is None else list(weights)
    if len(factors) != len(folders):
        raise UsageError(f"--weights: {len(factors)} weights for {len(folders)} adapters", "Give one for each.")
    adapters = [load_adapter(folder) for folder in folders]
    named = list(zip(map(str, folders), adapters, strict=True))
    if problems := [*_of_other_kinds(named), *_of_other_bases(named), *_of_other_shapes(named, method)]:
        raise InputRefused(listed("these adapters cannot be merged:", problems))
    _refuse_strangers(named)
    tensors = _merged(adapters, factors, method, density, seed)
    rank = max(tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".lora_a"))
    facts: dict[str, Any] = {"method": method, "weights": factors}
    facts |= {"density": density} if method in ("ties", "dare", "dare-ties") else {}
    facts |= {"seed": seed} if method.startswith("dare") else {}
    config = {**_config(adapters, rank, tensors), KEY: _passport(folders, adapters, facts)}
    with whole_folder(out, force=force) as aside:
        save_adapter(aside, tensors, config)
    modules = len(tensors) // 2
    notes = [
        f"{name}: its passport names no base, so that it could not be compared" for name, a in named if not _base(a)
    ]
    summary = f"{out}: {len(folders)} adapters merged by {method}, {modules} modules of rank {rank}"
    return Written(out, summary, {"out": str(out), **facts, "modules": modules, "rank": rank}, tuple(notes))


# ---- what does not go together --------------------------------------------------------------------------------------


def _refuse_strangers(named: Sequence[tuple[str, Adapter]]) -> None:
    """Raises InputRefused for adapters that tune no module in common, and do not say that their base is one."""
    for number, (folder, adapter) in enumerate(named):
        for other, before in named[:number]:
            known = passport_part(adapter.config, "base") and passport_part(before.config, "base")
            if not known and not adapter.tensors.keys() & before.tensors.keys():
                raise InputRefused(
                    f"{folder} and {other} tune no module in common, and do not both say what their base is",
                    "Merge adapters of the same model.",
                )


def _of_other_kinds(named: Sequence[tuple[str, Adapter]]) -> Iterator[str]:
    for name, adapter in named:
        kind = adapter.config.get("fine_tune_type", "lora")
        if kind == "dora":
            yield f"{name}: is a DoRA, whose lengths of rows do not add up"
        elif kind == "full":
            yield f"{name}: holds whole weights, and is no low-rank adapter"
        elif found := [n for n, t in adapter.tensors.items() if t.ndim != 2]:
            yield f"{name}: {found[0]} has a matrix for each expert"


def _of_other_bases(named: Sequence[tuple[str, Adapter]]) -> Iterator[str]:
    known = [(name, adapter) for name, adapter in named if _base(adapter)]
    for name, adapter in known[1:]:
        if _base(adapter) != _base(known[0][1]):
            bases = [passport_part(a.config, "base").get("name") for a in (adapter, known[0][1])]
            yield f"{name}: was trained on other weights ({bases[0]}) than {known[0][0]} ({bases[1]})"


def _base(adapter: Adapter) -> set[str]:
    """SHA-256 of the weights that an adapter was trained on; empty where its passport does not say."""
    known = passport_part(adapter.config, "base").get("sha256")
    return (
        {str(h) for file, h in known.items() if str(file).endswith(".safetensors")}
        if isinstance(known, dict)
        else set()
    )


def _of_other_shapes(named: Sequence[tuple[str, Adapter]], method: str) -> Iterator[str]:
    first: dict[str, tuple[str, int]] = {}
    for name, adapter in named:
        for tensor_name, tensor in adapter.tensors.items():
            size = tensor.shape[0 if tensor_name.endswith(".lora_a") else -1]
            of, expected = first.setdefault(tensor_name, (name, size))
            if size != expected:
                yield f"{name}: {tensor_name} is for {size} numbers, that of {of} for {expected}"
    ranks = {
        name: adapter.config["lora_parameters"]["rank"]
        for name, adapter in named
        if "lora_parameters" in adapter.config
    }
    if method != "cat" and len(set(ranks.values())) > 1:
        told = ", ".join(f"{name} has {rank}" for name, rank in ranks.items())
        yield f"{method} needs adapters of the same rank ({told}); cat takes any"


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _merged(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, density: float, seed: int
) -> dict[str, Floats]:
    """The tensors of the result, of scale 1; a module that only some adapters have is merged of those."""
    tensors: dict[str, Floats] = {}
    for module in sorted({name.rpartition(".")[0] for adapter in adapters for name in adapter.tensors}):
        those = [(i, a) for i, a in enumerate(adapters) if f"{module}.lora_a" in a.tensors]
        factors = [weights[i] * a.config["lora_parameters"]["scale"] for i, a in those]
        for leaf, side in (("lora_a", 0), ("lora_b", 1)):
            name = f"{module}.{leaf}"
            parts = [adapter.tensors[name] for _, adapter in those]
            if method == "cat":
                scaled = [p * np.float32(f) for p, f in zip(parts, factors, strict=True)] if side == 0 else parts
                tensors[name] = np.concatenate(scaled, axis=1 - side)
                continue
            roots = [math.sqrt(abs(f)) * (math.copysign(1, f) if side == 0 else 1) for f in factors]
            kept = [
                _kept(part, method, density, _random(seed, name, number))
                for (number, _), part in zip(those, parts, strict=True)
            ]
            tensors[name] = _together(np.stack(kept), np.array(roots, np.float32), method)
    return _padded(tensors)


def _kept(part: Floats, method: str, density: float, random: np.random.Generator) -> Floats:
    """A matrix with the numbers that the method does not keep set to zero."""
    if method == "ties":
        kept = np.zeros(part.size, np.float32)
        largest = np.argsort(-np.abs(part), axis=None, kind="stable")[: int(density * part.size)]
        kept[largest] = 1
        return part * kept.reshape(part.shape)
    if method.startswith("dare"):
        return part * random_mask(part.shape, density, random) / np.float32(density)
    return part


def random_mask(shape: tuple[int, ...], density: float, random: np.random.Generator) -> Floats:
    """Ones with the probability `density`, and zeros."""
    return (random.random(shape) < density).astype(np.float32)


def _random(seed: int, name: str, number: int) -> np.random.Generator:
    """The numbers of one tensor of one adapter: those of no other, whatever is merged beside it."""
    digest = hashlib.sha256(f"{seed} {name} {number}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _together(parts: Floats, roots: Floats, method: str) -> Floats:
    """[adapters, ...] → one: the weighted sum, or for ties the weighted mean of those with the majority's sign."""
    weighted = parts * roots[:, None, None]
    if method not in ("ties", "dare-ties"):
        return np.asarray(weighted.sum(axis=0), np.float32)
    majority = np.where(parts.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(parts) == majority
    return np.asarray((weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1), np.float32)


def _padded(tensors: Mapping[str, Floats]) -> dict[str, Floats]:
    """The same, every module with the highest rank of all, by zeros."""
    rank = max(t.shape[1] for name, t in tensors.items() if name.endswith(".lora_a"))
    made = {}
    for name, tensor in tensors.items():
        axis = 1 if name.endswith(".lora_a") else 0
        more = [(0, rank - tensor.shape[axis] if i == axis else 0) for i in (0, 1)]
        made[name] = np.pad(tensor, more)
    return made


# ---- what the result says of itself ---------------------------------------------------------------------------------


def _config(adapters: Sequence[Adapter], rank: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json: the layers and keys of all where they are the same, else the whole path of each module."""
    places = [(a.config["num_layers"], sorted(a.config["lora_parameters"]["keys"])) for a in adapters]
    layers, keys = places[0]
    if any(place != places[0] for place in places):
        layers, keys = -1, sorted({name.rpartition(".")[0] for name in tensors})
    return {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }


def _passport(folders: Sequence[Path], adapters: Sequence[Adapter], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What all adapters say alike, of those that say something, and what was merged."""
    passports = [p for a in adapters if isinstance(p := a.config.get(KEY), dict)]
    said = {part: [p[part] for p in passports if part in p] for part in KEPT}
    same = {part: values[0] for part, values in said.items() if values and all(v == values[0] for v in values)}
    parts = [
        {"name": folder.resolve().name, "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()}
        for folder in folders
    ]
    return {"version": __version__, **same, "merged": {**facts, "adapters": parts}}
