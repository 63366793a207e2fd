"""An adapter of PEFT's → mlx-lm's layout and back, to the last bit.

PEFT keeps A as [rank, inputs] and B as [outputs, rank], mlx-lm the transposes. PEFT's modules may differ in rank and
scale, mlx-lm has one of each. So on the way in
- the rank is the highest of all, and the other matrices get columns and rows of zeros;
- the scale is the smallest of all, and B takes what is more: exactly where that is a power of two. Any other multiple
  of a float32 is none, and there B becomes two numbers, what float32 holds of c·B and what is left over, with A under
  both: the rank doubles, c·B·A is closer than it was, and B comes back to the last bit as (both together) ÷ c.
The config is kept in the passport, so that the way back gives the very file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import InputRefused
from mlxsft.models.adapter import (
    Adapter,
    StoredTensor,
    float32_of,
    is_number,
    listed,
    load_adapter,
    read_safetensors,
    safetensors_bytes,
    save_adapter,
    stored,
)
from mlxsft.models.base_modules import Matrix, base_matrices, is_embedding, is_tied, is_token_embedding
from mlxsft.models.checks import read_json, refuse_links
from mlxsft.models.dequantize import as_float32
from mlxsft.models.names import RENAMED, layer_of, mlx_name, transformers_name
from mlxsft.models.passport import passport_part
from mlxsft.models.peft_config import CONFIG, PeftConfig
from mlxsft.models.source import ModelSource, open_model
from mlxsft.models.tensors import StoredTensors
from mlxsft.models.whole_folder import whole_folder
from mlxsft.models.written import Tell, Written

Floats = NDArray[np.float32]

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OURS = "mlxsft.json"  # beside a PEFT adapter that we wrote: what our own config said
PREFIX = "base_model.model."
# The ends of PEFT's names → (mlx-lm's, whether mlx-lm has it transposed).
LEAVES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "m",
    "lora_magnitude_vector.weight": "m",
}


@dataclass(frozen=True)
class LowRank:
    """The tensors of one module, in mlx-lm's shapes: A [inputs, rank], B [rank, outputs], lengths [outputs]."""

    a: Floats
    b: Floats
    m: Floats | None = None


# ---- in -------------------------------------------------------------------------------------------------------------


def import_peft(
    folder: Path, out: Path, *, model: str | None = None, force: bool = False, tell: Tell = lambda line: None
) -> Written:
    """PEFT's adapter in `folder` as one in mlx-lm's layout in `out`; with its `model`, checked against that.

    Raises InputRefused, with every reason, for what cannot be carried over.
    """
    content, given = _read(folder)
    source = open_model(model, progress=tell) if model else None
    kind = _model_type(content, given, source)
    adapter, notes = _imported(content, given, kind, source)
    config = _own_config(folder, adapter) or {**adapter.config, "mlxsft": _passport(content, given, kind)}
    with whole_folder(out, force=force, source=folder) as aside:
        save_adapter(aside, adapter.tensors, config)
    parameters = config["lora_parameters"]
    facts = {
        "out": str(out),
        "kind": config["fine_tune_type"],
        "modules": len({name.rpartition(".")[0] for name in adapter.tensors}),
        "rank": parameters["rank"],
        "scale": parameters["scale"],
    }
    summary = f"{out}: {facts['modules']} modules of rank {facts['rank']}, scale {facts['scale']:g}, in mlx-lm's layout"
    return Written(out, summary, facts, tuple(notes))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Config and tensors of a PEFT folder. Raises InputRefused for what is none, and for pickle."""
    if not folder.is_dir():
        raise InputRefused(f"{folder}: no such folder", f"Give the one that holds {WEIGHTS}.")
    if not (folder / WEIGHTS).exists():
        if (folder / PICKLE).exists():
            raise InputRefused(
                f"{folder}: the adapter is stored as pickle only ({PICKLE}), which can run code when it is loaded",
                "Save it anew with a PEFT from 0.7 on, which writes safetensors.",
            )
        what = ": this is an adapter in mlx-lm's layout already" if (folder / "adapters.safetensors").exists() else ""
        raise InputRefused(f"{folder}: {WEIGHTS} is missing{what}", "Give the folder of a PEFT adapter.")
    try:
        refuse_links(folder.resolve(), [CONFIG, WEIGHTS])
        return read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
    except InputRefused as refusal:
        raise InputRefused(f"{folder}: {refusal.message}", refusal.hint) from refusal


def _own_config(folder: Path, adapter: Adapter) -> dict[str, Any] | None:
    """The adapter_config.json of an adapter that `export_peft` wrote and nobody changed since; None for any other."""
    if not os.path.lexists(folder / OURS):
        return None
    refuse_links(folder.resolve(), [OURS])
    said = read_json(folder / OURS)
    config = said.get("config")
    if said.get("sha256") != hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() or not isinstance(
        config, dict
    ):
        return None
    made, parameters = adapter.config["lora_parameters"], config.get("lora_parameters")
    same = isinstance(parameters, dict) and parameters.get("rank") == made["rank"]
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return config if same and is_number(scale) and math.isclose(float(scale or 0.0), made["scale"]) else None


def _imported(
    content: Mapping[str, Any], given: Mapping[str, StoredTensor], kind: str, source: ModelSource | None
) -> tuple[Adapter, list[str]]:
    """The adapter in mlx-lm's layout, and what the person should know. Raises InputRefused with every problem."""
    modules, others, problems = _modules(given)
    if source is not None and is_tied(source) and content.get("ensure_weight_tying"):
        modules = _without_tied_head(modules)
    base = base_matrices(source) if source is not None else None
    known = {transformers_name(kind, path) for path in base or ()}
    config = PeftConfig(content, {*modules, *known})
    problems += _misfits(config, modules, kind, base)
    problems += _embedding_problems(config, modules, source)
    notes, more = _copies_of_base(others, source)
    problems += more
    if not modules and not problems:
        problems.append("there is no tensor of a low-rank adapter in it")
    if problems:
        raise InputRefused(listed(f"{WEIGHTS}: this adapter cannot be carried over:", problems))
    if source is None:
        notes.append("without --model, shapes and whether a module is missing could not be checked against the base")
    parts = {path: module for path, module in modules.items()}
    return _in_one_scale(config, parts, kind, _layer_count(source)), notes


def _modules(
    given: Mapping[str, StoredTensor],
) -> tuple[dict[str, LowRank], dict[str, StoredTensor], list[str]]:
    """{transformers' path: its tensors}, the tensors that are no part of one, and what is wrong with the first."""
    found: dict[str, dict[str, Floats]] = {}
    others: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in given.items():
        leaf = next((leaf for leaf in LEAVES if name.endswith(f".{leaf}")), None)
        if leaf is None or not name.startswith(PREFIX):
            others[name] = tensor
            continue
        array = float32_of(tensor)
        if isinstance(array, str):
            problems.append(f"{name}: is stored as {array}, expected F32, F16 or BF16")
        elif tensor.dtype == "F64" and stored(array, "F64").data != tensor.data:
            problems.append(f"{name}: is stored as F64, and float32 cannot hold its values")
        elif not np.isfinite(array).all():
            problems.append(f"{name}: {np.count_nonzero(~np.isfinite(array))} of {array.size} values are not finite")
        else:
            path = name.removeprefix(PREFIX).removesuffix(f".{leaf}")
            found.setdefault(path, {})[LEAVES[leaf]] = array
    modules = {}
    for path, parts in found.items():
        if missing := {"lora_a", "lora_b"} - parts.keys():
            problems.append(f"{path}: {' and '.join(sorted(missing))} is missing")
        elif parts["lora_a"].ndim != 2 or parts["lora_b"].ndim != 2:
            problems.append(
                f"{path}: its tensors have the shapes {[p.shape for p in parts.values()]}, expected matrices"
            )
        else:
            modules[path] = LowRank(parts["lora_a"].T, parts["lora_b"].T, parts.get("m"))
    return modules, others, problems


def _without_tied_head(modules: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The modules without an output head that has the embedding's matrices, as PEFT saves them together."""
    embedding = next((module for path, module in modules.items() if is_token_embedding(path)), None)
    return {
        path: module
        for path, module in modules.items()
        if embedding is None
        or path != "lm_head"
        or not (np.array_equal(module.a.T, embedding.b) and np.array_equal(module.b.T, embedding.a))
    }


def _misfits(
    config: PeftConfig, modules: Mapping[str, LowRank], kind: str, base: Mapping[str, Matrix] | None
) -> Iterator[str]:
    """Where tensors, config and base say different things, a line each."""
    for path, module in modules.items():
        rank, inputs, outputs = config.rank_of(path), module.a.shape[0], module.b.shape[1]
        if not config.names(path):
            yield f"{path}: {CONFIG} does not name this module"
        if module.a.shape[1] != rank or module.b.shape[0] != rank:
            got = f"{module.a.shape[1]} and {module.b.shape[0]}"
            yield f"{path}: {CONFIG} says rank {rank}, lora_A and lora_B have {got}"
        if config.dora != (module.m is not None):
            yield f"{path}: lora_magnitude_vector is {'missing' if config.dora else 'there, but use_dora is false'}"
        elif module.m is not None and module.m.reshape(-1).shape != (outputs,):
            yield f"{path}: lora_magnitude_vector has the shape {module.m.shape}, expected ({outputs},)"
        if base is None:
            continue
        matrix = base.get(mlx_name(kind, path))
        if matrix is None:
            yield f"{path}: the model has no such module"
            continue
        expected = (matrix.rows, matrix.columns) if is_embedding(path) else (matrix.columns, matrix.rows)
        if (inputs, outputs) != expected:
            yield f"{path}: is for {inputs} inputs and {outputs} outputs, the model has {expected[0]} and {expected[1]}"
    if base is None or config.targets is None:
        return
    for path in sorted(transformers_name(kind, path) for path in base):
        by_group = config.targets == "all-linear" and is_embedding(path)
        if config.names(path) and path not in modules and not by_group:
            yield f"{path}: {CONFIG} names this module, and its tensors are missing"


def _embedding_problems(
    config: PeftConfig, modules: Mapping[str, LowRank], source: ModelSource | None
) -> Iterator[str]:
    """Adapters of embeddings and heads that mean something else in mlx-lm, a line each."""
    embeddings = [path for path in modules if is_embedding(path)]
    if config.dora and embeddings:
        yield f"{embeddings[0]}: PEFT's DoRA has a length for each column of an embedding, mlx-lm's one for each row"
    tokens = [path for path in embeddings if is_token_embedding(path)]
    together = bool(config.content.get("ensure_weight_tying"))
    if tokens and source is None:
        yield f"{tokens[0]}: whether it is the output head too decides what its adapter does; give --model"
    elif tokens and source is not None and is_tied(source) and not together:
        yield (
            f"{tokens[0]}: PEFT adapts this embedding alone (ensure_weight_tying is false), but it is the output head "
            "too, which mlx-lm adapts with it"
        )


def _copies_of_base(others: Mapping[str, StoredTensor], source: ModelSource | None) -> tuple[list[str], list[str]]:
    """(notes, problems) of tensors that are no part of a low-rank adapter: whole weights, of which copies may go."""
    notes, problems = [], []
    base = StoredTensors(source) if source is not None else {}
    for name, tensor in others.items():
        path = name.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if path == "lm_head.weight" and path not in base:  # tied
            path = next((n for n in base if is_token_embedding(n.removesuffix(".weight"))), path)
        if path in base and np.array_equal(as_float32(base[path]), float32_of(tensor)):
            notes.append(f"{name}: is the base's own, and is left out")
        elif name.endswith(".bias"):
            problems.append(f"{name}: a trained bias has no place in mlx-lm's layout")
        elif name.endswith(".weight") and ".lora_" not in name:
            what = (
                "and these differ from the base's"
                if path in base
                else "and only with --model can they be told from a plain copy"
            )
            problems.append(f"{name}: whole weights (modules_to_save) have no place beside a LoRA, {what}")
        else:
            problems.append(f"{name}: is no tensor of a LoRA in PEFT's layout")
    return notes, problems


def _in_one_scale(config: PeftConfig, modules: Mapping[str, LowRank], kind: str, layers: int | None) -> Adapter:
    """The adapter with one rank and one scale."""
    scales = {path: config.scale_of(path) for path in modules}
    scale = min(scales.values(), key=abs)
    if scale == 0 and any(scales.values()):
        silent = next(path for path in modules if scales[path] == 0)
        raise InputRefused(f"{CONFIG}: the alpha of {silent} is 0, so that it does nothing, while others do something")
    wide = {p: _scaled(module, scales[p] / scale if scale else 1.0) for p, module in modules.items()}
    rank = max(module.a.shape[1] for module in wide.values())
    tensors: dict[str, Floats] = {}
    for path, module in wide.items():
        ours, more = mlx_name(kind, path), rank - module.a.shape[1]
        tensors[f"{ours}.lora_a"] = np.pad(module.a, ((0, 0), (0, more)))
        tensors[f"{ours}.lora_b"] = np.pad(module.b, ((0, more), (0, 0)))
        if module.m is not None:
            tensors[f"{ours}.m"] = module.m.reshape(-1)
    if large := sorted(name for name, tensor in tensors.items() if not np.isfinite(tensor).all()):
        raise InputRefused(f"{large[0]}: its values, times their scale, are beyond float32")
    count, keys = _layers_and_keys({name.rpartition(".")[0] for name in tensors}, layers)
    parameters = {"rank": rank, "scale": scale, "dropout": config.dropout, "keys": keys}
    made = {"fine_tune_type": "dora" if config.dora else "lora", "num_layers": count, "lora_parameters": parameters}
    return Adapter(made, tensors)


def _scaled(module: LowRank, factor: float) -> LowRank:
    """The module with B times a factor of at least 1, exactly; where float32 has no such B, in twice the rank."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = module.b.astype(np.float64) * factor
        whole = product.astype(np.float32)
        if _is_power_of_two(factor):
            return LowRank(module.a, whole, module.m)
        rest = (product - whole).astype(np.float32)
    rest = np.where(rest == 0, np.copysign(np.float32(0), whole), rest)  # so that −0 comes back as −0
    return LowRank(np.concatenate([module.a, module.a], axis=1), np.concatenate([whole, rest]), module.m)


def _unscaled(module: LowRank, factor: float, rank: int) -> LowRank:
    """What `_scaled` was given, and padding left out."""
    first = module.b[:rank].astype(np.float64)
    whole = first if _is_power_of_two(factor) else first + module.b[rank : 2 * rank]
    return LowRank(module.a[:, :rank], (whole / factor).astype(np.float32), module.m)


def _is_power_of_two(factor: float) -> bool:
    return abs(math.frexp(factor)[0]) == 0.5


def _layers_and_keys(modules: set[str], layers: int | None) -> tuple[int, list[str]]:
    """mlx-lm's num_layers and keys: the same modules in each of the last layers, or the whole path of each."""
    inside: dict[int, set[str]] = {}
    for place in filter(None, map(layer_of, modules)):
        inside.setdefault(place[0], set()).add(place[1])
    alike = len({frozenset(names) for names in inside.values()}) == 1
    if layers is None or not alike or sorted(inside) != list(range(layers - len(inside), layers)):
        return -1, sorted(modules)
    return len(inside), sorted({*next(iter(inside.values())), *(m for m in modules if layer_of(m) is None)})


def _layer_count(source: ModelSource | None) -> int | None:
    if source is None:
        return None
    numbers = [place[0] for name in source.tensors if (place := layer_of(name)) is not None]
    return max(numbers, default=-1) + 1 or None


def _model_type(content: Mapping[str, Any], given: Mapping[str, Any], source: ModelSource | None) -> str:
    """The base's model_type; without the base what the names of the modules tell of it."""
    if source is not None:
        return str(source.config.get("model_type"))
    mapping = content.get("auto_mapping")
    known = str(mapping.get("parent_library", "")) if isinstance(mapping, dict) else ""
    for kind in RENAMED:
        if f".models.{kind}." in known:
            return kind
    paths = [name.removeprefix(PREFIX) for name in given]
    if any(path.startswith(("transformer.", "model.language_model.")) for path in paths):
        raise InputRefused(
            f"{CONFIG}: which architecture this adapter is for cannot be told", "Give its base with --model."
        )
    return "gpt_neox" if any(path.startswith("gpt_neox.") for path in paths) else ""


def _passport(content: Mapping[str, Any], given: Mapping[str, StoredTensor], kind: str) -> dict[str, Any]:
    """What `export` needs to give back the very file."""
    dtypes = {name: tensor.dtype for name, tensor in given.items()}
    return {"peft": {"config": dict(content), "model_type": kind, "dtypes": dtypes}}


# ---- out ------------------------------------------------------------------------------------------------------------


def export_peft(
    folder: Path, out: Path, *, model: str | None = None, force: bool = False, tell: Tell = lambda line: None
) -> Written:
    """The adapter in `folder` as PEFT has it, in `out`.

    One that was imported gives its tensors and its config back as they were. Raises InputRefused for what PEFT has not:
    full tuning, experts, DoRA of embeddings; and for names that only the base, `model`, can settle.
    """
    adapter = load_adapter(folder)
    source = open_model(model, progress=tell) if model else None
    content, tensors = _given_back(adapter) or _made(folder, adapter, source)
    with whole_folder(out, force=force, source=folder) as aside:
        data = safetensors_bytes(tensors, "pt")
        (aside / WEIGHTS).write_bytes(data)
        (aside / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")
        if _record(adapter) is None:
            ours = {"config": adapter.config, "sha256": hashlib.sha256(data).hexdigest()}
            (aside / OURS).write_text(json.dumps(ours, indent=2, sort_keys=True, ensure_ascii=False), encoding="utf-8")
    facts = {"out": str(out), "kind": "peft", "modules": len(_low_rank(adapter.tensors)), "tensors": len(tensors)}
    return Written(out, f"{out}: {facts['modules']} modules in PEFT's layout", facts)


def _record(adapter: Adapter) -> dict[str, Any] | None:
    """What `import_peft` has kept of the PEFT adapter that this was; None where it was none."""
    passport = adapter.config.get("mlxsft")
    record = passport.get("peft") if isinstance(passport, dict) else None
    complete = isinstance(record, dict) and all(isinstance(record.get(n), dict) for n in ("config", "dtypes"))
    return record if complete else None


def _given_back(adapter: Adapter) -> tuple[dict[str, Any], dict[str, StoredTensor]] | None:
    """Config and tensors that were imported; None where there are none, or the adapter is another one by now."""
    record = _record(adapter)
    if record is None:
        return None
    kind = str(record.get("model_type"))
    modules = {transformers_name(kind, path): module for path, module in _low_rank(adapter.tensors).items()}
    config = PeftConfig(record["config"], modules)
    scale = adapter.config["lora_parameters"]["scale"]
    parts = {}
    for path, module in modules.items():
        factor, rank = (config.scale_of(path) / scale if scale else 1.0), config.rank_of(path)
        if module.a.shape[1] < rank * (1 if _is_power_of_two(factor) else 2):
            return None
        parts[path] = _unscaled(module, factor, rank)
    again = _in_one_scale(config, parts, kind, None)
    same = again.tensors.keys() == adapter.tensors.keys() and again.config["lora_parameters"]["scale"] == scale
    if not same or not all(np.array_equal(again.tensors[name], t) for name, t in adapter.tensors.items()):
        return None
    plain = _peft_tensors(parts)
    if any(name.startswith(f"{PREFIX}lm_head.lora_") and name not in plain for name in record["dtypes"]):  # tied
        embedding = next(module for path, module in parts.items() if is_token_embedding(path))
        plain |= _peft_tensors({"lm_head": LowRank(embedding.b.T, embedding.a.T)})
    return dict(config.content), {n: stored(t, str(record["dtypes"].get(n, "F32"))) for n, t in plain.items()}


def _made(folder: Path, adapter: Adapter, source: ModelSource | None) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Config and tensors for PEFT of an adapter that was made here, or by mlx-lm."""
    modules, base = _low_rank(adapter.tensors), passport_part(adapter.config, "base")
    kind = str(source.config.get("model_type") if source is not None else base.get("model_type", ""))
    tied = is_tied(source) if source is not None else base.get("tied")
    if problems := list(_not_in_peft(adapter, modules, kind, tied)):
        raise InputRefused(listed(f"{folder}: PEFT has no such adapter:", problems))
    parameters = adapter.config["lora_parameters"]
    rank, scale = parameters["rank"], parameters["scale"]
    recipe = passport_part(adapter.config, "recipe").get("adapter")
    rslora = isinstance(recipe, dict) and recipe.get("rslora") is True and recipe.get("rank") == rank
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    named = {transformers_name(kind, path): module for path, module in modules.items()}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("name") or (source.name if source is not None else None),
        "revision": base.get("commit"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": parameters.get("dropout", 0.0),
        "use_rslora": rslora,
        "use_dora": adapter.config.get("fine_tune_type") == "dora",
        "bias": "none",
        "fan_in_fan_out": kind == "gpt2",
        "init_lora_weights": True,
        **_targets(named),
    }
    if tied and any(is_token_embedding(path) for path in named):
        content["ensure_weight_tying"] = True
    return content, {name: stored(tensor, "F32") for name, tensor in _peft_tensors(named).items()}


def _not_in_peft(adapter: Adapter, modules: Mapping[str, LowRank], kind: str, tied: object) -> Iterator[str]:
    """What PEFT cannot hold, a line each."""
    if adapter.config.get("fine_tune_type", "lora") == "full":
        yield "fine_tune_type is full: these are the model's own weights; `mlxsft fuse` makes a model of them"
        return
    for path, module in modules.items():
        if module.a.ndim != 2:
            yield f"{path}: experts, which PEFT keeps in other matrices"
        elif is_embedding(path) and module.m is not None:
            yield f"{path}: PEFT's DoRA has a length for each column of an embedding, mlx-lm's one for each row"
        elif is_token_embedding(path) and tied is None:
            yield f"{path}: whether it is the output head too decides what PEFT is told; give --model"
    if not kind and any(not path.startswith(("model.layers.", "model.embed_tokens", "lm_head")) for path in modules):
        other = next(p for p in modules if not p.startswith(("model.layers.", "model.embed_tokens", "lm_head")))
        yield f"{other}: what transformers calls it depends on the architecture; give --model"


def _targets(modules: Mapping[str, LowRank]) -> dict[str, Any]:
    """target_modules and layers_to_transform that name these modules and no other."""
    inside: dict[int, set[str]] = {}
    for place in filter(None, map(layer_of, modules)):
        inside.setdefault(place[0], set()).add(place[1])
    outside = sorted(path for path in modules if layer_of(path) is None)
    if len({frozenset(names) for names in inside.values()}) > 1:
        return {"target_modules": sorted(modules)}
    names = sorted(next(iter(inside.values()), set()))
    return {"target_modules": names + outside, "layers_to_transform": sorted(inside) or None}


def _low_rank(tensors: Mapping[str, Floats]) -> dict[str, LowRank]:
    """{mlx-lm's path: its tensors}."""
    paths = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".lora_a")})
    return {p: LowRank(tensors[f"{p}.lora_a"], tensors[f"{p}.lora_b"], tensors.get(f"{p}.m")) for p in paths}


def _peft_tensors(modules: Mapping[str, LowRank]) -> dict[str, Floats]:
    """{PEFT's name: tensor in PEFT's shape}."""
    found: dict[str, Floats] = {}
    for path, module in modules.items():
        names = ("lora_embedding_A", "lora_embedding_B") if is_embedding(path) else ("lora_A.weight", "lora_B.weight")
        found |= {f"{PREFIX}{path}.{name}": part.T for name, part in zip(names, (module.a, module.b), strict=True)}
        if module.m is not None:
            found[f"{PREFIX}{path}.lora_magnitude_vector"] = module.m
    return found
