"""What an adapter is, told in figures: which modules, how strong, how far from another one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused
from mlxsft.models import peft
from mlxsft.models.adapter import CONFIG, WEIGHTS, Adapter, load_adapter
from mlxsft.models.checks import read_json
from mlxsft.models.names import layer_of
from mlxsft.models.passport import KEY, check_base, passport_part
from mlxsft.models.source import ModelSource

Json = dict[str, Any]


def find_adapters(folder: Path) -> list[Path]:
    """The adapter folders at and below `folder`, in order; not those of a run's checkpoints, nor hidden ones."""
    if not folder.is_dir():
        raise InputRefused(f"{folder}: no such folder", "Give a folder with adapters in it.")
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "checkpoints" and not name.startswith("."))
        if {WEIGHTS, peft.WEIGHTS, peft.PICKLE} & set(files):
            found.append(Path(root))
    return found


def listing(folder: Path) -> Json:
    """What a list has to say of an adapter; `problem` where it cannot be used as it is."""
    if not os.path.lexists(folder / WEIGHTS):
        return {"folder": str(folder), "layout": "peft", **_of_peft(folder)}
    try:
        return {"folder": str(folder), "layout": "mlx-lm", **facts(load_adapter(folder))}
    except InputRefused as refusal:
        return {"folder": str(folder), "layout": "mlx-lm", "problem": refusal.message}


def _of_peft(folder: Path) -> Json:
    try:
        config = read_json(folder / CONFIG)
    except InputRefused as refusal:
        return {"problem": refusal.message}
    kind = "dora" if config.get("use_dora") is True else str(config.get("peft_type", "?")).lower()
    base = config.get("base_model_name_or_path")
    pickled = not (folder / peft.WEIGHTS).is_file()
    return {
        **{"kind": kind, "rank": config.get("r"), "base": base if isinstance(base, str) else None},
        **({"problem": f"stored as pickle only ({peft.PICKLE})"} if pickled else {}),
    }


def facts(adapter: Adapter) -> Json:
    """Kind, size and origin of an adapter, as JSON."""
    config = adapter.config
    parameters = config.get("lora_parameters", {})
    modules = {name.rpartition(".")[0] for name in adapter.tensors}
    layers = sorted({place[0] for module in modules if (place := layer_of(module)) is not None})
    base = passport_part(config, "base")
    return {
        "kind": config.get("fine_tune_type", "lora"),
        "rank": parameters.get("rank"),
        "scale": parameters.get("scale"),
        "modules": len(modules),
        "layers": layers,
        "targets": sorted({place[1] if (place := layer_of(m)) else m for m in modules}),
        "parameters": sum(tensor.size for tensor in adapter.tensors.values()),
        "base": base.get("name"),
        "commit": base.get("commit"),
    }


def shown(folder: Path, source: ModelSource | None = None) -> Json:
    """`facts`, the passport, the strength of each module, and what is to be known; checked against a base if given.

    Raises InputRefused as `load_adapter_for` does.
    """
    adapter = load_adapter(folder)
    notes = check_base(adapter.config, source, folder) if source is not None else []
    parameters = adapter.config.get("lora_parameters", {})
    if "alpha" in parameters:
        notes.append(
            f"its config has alpha ({parameters['alpha']}) beside scale ({parameters['scale']}): mlx-lm applies scale "
            "alone, as mlxsft does; its first versions applied scale · alpha ÷ rank"
        )
    passport = adapter.config.get(KEY)
    if not isinstance(passport, dict):
        notes.append("it has no passport of mlxsft's: what it was trained on and with is not known")
    strengths = {path: float(np.sqrt(_product(u, u))) for path, u in _changes(adapter).items()}
    return {
        "folder": str(folder),
        **facts(adapter),
        "strengths": dict(sorted(strengths.items(), key=lambda item: -item[1])),
        "passport": passport if isinstance(passport, dict) else None,
        "notes": notes,
    }


def difference(one: Path, other: Path) -> Json:
    """How two adapters differ: settings {name: [one, other]}, modules, and how far what they add lies apart.

    `distance` is ‖Δ − Δ′‖ ÷ ‖Δ‖ of scale · A · B over all modules that both have (0: the same; √2: as unlike as random
    ones of the same strength), `similarity` the cosine between them. Raises InputRefused as `load_adapter` does.
    """
    adapters = load_adapter(one), load_adapter(other)
    settings = [dict(_flat("", {**facts(adapter), **_passport_facts(adapter)})) for adapter in adapters]
    names = sorted({name for said in settings for name in said})
    changed = {n: [said.get(n) for said in settings] for n in names if settings[0].get(n) != settings[1].get(n)}
    first, second = map(_changes, adapters)
    both = [path for path in first if path in second and _same_sizes(first[path], second[path])]
    own, theirs = (sum(_product(c[path], c[path]) for path in both) for c in (first, second))
    crossed = sum(_product(first[path], second[path]) for path in both)
    same = adapters[0].tensors.keys() == adapters[1].tensors.keys() and all(
        np.array_equal(tensor, adapters[1].tensors[name]) for name, tensor in adapters[0].tensors.items()
    )
    apart = 0.0 if same else max(0.0, own + theirs - 2 * crossed) ** 0.5
    return {
        "same_tensors": same,
        "settings": changed,
        "only_in_first": sorted(first.keys() - second.keys()),
        "only_in_second": sorted(second.keys() - first.keys()),
        "modules_of_both": len(both),
        "distance": apart / own**0.5 if own else None,
        "similarity": crossed / (own * theirs) ** 0.5 if own and theirs else None,
    }


def _passport_facts(adapter: Adapter) -> Json:
    passport = adapter.config.get(KEY)
    kept = ("base", "tokenizer", "template", "data", "recipe", "versions", "merged")
    said = {part: passport_part(adapter.config, part) for part in kept} if isinstance(passport, dict) else {}
    if "template" in said:
        said["template"] = {name: value for name, value in said["template"].items() if name != "text"}
    return {part: value for part, value in said.items() if value}


def _flat(prefix: str, value: object) -> Iterator[tuple[str, object]]:
    """(dotted name, value) of everything in a JSON object."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, value


Change = tuple[NDArray[np.float64], NDArray[np.float64]]


def _changes(adapter: Adapter) -> dict[str, Change]:
    """{module: (scale · A [inputs, rank], B [rank, outputs])}; for experts, all of them one under the other."""
    scale = adapter.config.get("lora_parameters", {}).get("scale", 1.0)
    found: dict[str, Change] = {}
    for name, tensor in adapter.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "lora_a" or tensor.ndim != 2:
            continue
        found[module] = (scale * tensor.astype(np.float64), adapter.tensors[f"{module}.lora_b"].astype(np.float64))
    return found


def _product(one: Change, other: Change) -> float:
    """Σ of the products of all numbers of A·B and A′·B′, without making either."""
    return float(((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum())


def _same_sizes(one: Change, other: Change) -> bool:
    return (one[0].shape[0], one[1].shape[1]) == (other[0].shape[0], other[1].shape[1])
