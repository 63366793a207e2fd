"""README.md of a model that we made: from what, under which licence, and how; for people and for the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlxsft.errors import InputRefused
from mlxsft.hub import optional_file
from mlxsft.models import checks
from mlxsft.models.lock import Lock, read_lock
from mlxsft.models.source import ModelSource

CARD = "README.md"
CARD_BYTES = 1 << 20
KEPT = ("license", "license_name", "license_link", "language")  # what a conversion does not change
ADAPTER = "adapter_sha256"  # in `Lock.made`: of the tensors of an adapter that is fused in
UNVERSIONED = ("command", ADAPTER)  # of `Lock.made`
_FRONT = re.compile(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


def origin(source: ModelSource) -> tuple[str | None, str | None]:
    """(repository on the Hub, commit) that a source is of, or was made from; None where nobody knows."""
    if source.commit is not None:
        cached = re.fullmatch(r"models--(.+)", source.folder.parent.parent.name)
        return (cached[1].replace("--", "/") if cached else source.name), source.commit
    lock = own_lock(source)
    return (lock.repository, lock.commit) if lock else (None, None)


def own_lock(source: ModelSource) -> Lock | None:
    """The lock of a source; None where it has none, or one that tells nothing, of another program for instance."""
    try:
        return read_lock(source.folder)
    except InputRefused:
        return None


def source_metadata(source: ModelSource) -> dict[str, Any]:
    """What the source's card says that holds for a conversion too; empty where there is none, or none that is sound."""
    path: Path | None = source.folder / CARD
    repository, commit = origin(source)
    if source.commit is not None and repository and commit:
        path = optional_file(repository, commit, CARD)  # no conversion fails for want of a card
    return _metadata(source.folder, path) if path else {}


def card_text(
    source: ModelSource,
    lock: Lock,
    *,
    quantization: Mapping[str, Any] | None,
    bits_per_weight: float,
    measured: Sequence[str] = (),
    adapter: str | None = None,
    library: str = "mlx",
) -> str:
    """The card of a model that was made from `source` as `lock` says.

    `measured` is a sentence on its quality, and the lines of a table. `adapter` is the name of one that is fused in,
    `library` the one whose layout the model has: mlx or transformers.
    """
    facts: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    facts |= {"tags": ["mlx"]} if library == "mlx" else {}
    facts |= source_metadata(source)
    if lock.repository:
        facts |= {"base_model": lock.repository}
        relation = "finetune" if adapter else "quantized" if quantization else None
        facts |= {"base_model_relation": relation} if relation else {}
    name = lock.repository or source.folder.name
    numbers = f"{bits_per_weight:.3f} bits a weight"
    if quantization:
        numbers += (
            f", {quantization['mode']} with {quantization['bits']} bits in groups of {quantization['group_size']}"
        )
        others = sum(isinstance(value, dict) for value in quantization.values())
        numbers += f" ({others} modules otherwise, see config.json)" if others else ""
    made = ", ".join(f"{package} {version}" for package, version in lock.made.items() if package not in UNVERSIONED)
    commit = f" at commit {lock.commit}" if lock.commit else ""
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}{f' with {adapter}' if adapter else ''}{' for MLX' if library == 'mlx' else ''}",
        "",
        f"Made from {name}{commit}{_tuned(adapter, lock)}: {numbers}.",
        "",
        "```sh",
        lock.made["command"],
        "```",
        "",
        *_quality(measured, "base and adapter" if adapter else "the unquantized model"),
        f"With {made}. The SHA-256 of every file is in lock.json; `mlxsft verify` compares.",
    ]
    return "\n".join(lines) + "\n"


def _tuned(adapter: str | None, lock: Lock) -> str:
    return f" and the adapter {adapter} (SHA-256 {lock.made[ADAPTER]})" if adapter else ""


def _quality(measured: Sequence[str], reference: str) -> list[str]:
    if not measured:
        return []
    sentence, *table = measured
    lines = [f"Against {reference}, {sentence}.", ""]
    return [*lines, "```text", *table, "```", ""] if table else lines


def _metadata(folder: Path, path: Path) -> dict[str, Any]:
    """As `metadata_of`; a card that is a link elsewhere is not read."""
    if checks.outside(folder, str(path)) or not path.is_file():
        return {}
    return metadata_of(path)


def metadata_of(card: Path) -> dict[str, Any]:
    """The fields of KEPT that a card has, if they are words."""
    with card.open("rb") as file:
        found = _FRONT.match(file.read(CARD_BYTES).decode("utf-8", errors="replace"))
    try:
        facts = yaml.safe_load(found[1]) if found else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return {key: facts[key] for key in KEPT if _words(facts.get(key))} if isinstance(facts, dict) else {}


def _words(value: object) -> bool:
    """Whether it is a word, or a list of words."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and 0 < len(item) < 200 for item in items)
