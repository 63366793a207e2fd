"""A model, an adapter or a GGUF file → a repository of the Hub, with a card, without what is nobody else's business.

What goes is decided first, by name and by content, and shown. Rows, logs, optimizer state, code and pickle stay here;
a file that would tell a secret or a path of this machine stays here too, or stops the push where the model needs it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from mlxsft.data.patterns import secrets
from mlxsft.errors import InputRefused, NetworkFailed, UsageError
from mlxsft.hub import hub_errors, optional_file
from mlxsft.models import checks
from mlxsft.models.adapter import CONFIG, WEIGHTS, listed, load_adapter
from mlxsft.models.card import CARD, metadata_of
from mlxsft.models.lock import LOCK, read_lock
from mlxsft.models.passport import passport_part

# Names that never go, and why; `*` matches slashes too.
LEFT_OUT = {
    "logs": ("events.jsonl", "*.log", "*.out", "*tfevents*", "wandb/*", "mlruns/*", "trackio/*", "logs/*"),
    "rows": ("*.jsonl", "*.csv", "*.tsv", "*.parquet", "*.arrow", "*.gz", "*.zip", "data/*", "rows.json"),
    "checkpoints and optimizer state": ("checkpoints/*", "checkpoint-*", "optimizer*", "*state.safetensors", "rng_*"),
    "code and pickle": ("*.py", "*.sh", "*.ipynb", *(f"*{suffix}" for suffix in checks.PICKLES)),
    "quotes rows": ("card.json", "card.html"),  # the answers of an evaluation; its figures are in the model card
}
EVALUATION = "card.json"
TEXTS = (".json", ".yaml", ".yml", ".md", ".txt", ".jinja", ".html", ".toml", ".cfg", "Modelfile")
NO_PROSE = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", checks.INDEX)  # of words, not of sentences
TEXT_BYTES = 10 << 20
_PATH = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|Users|root|mnt|media|private|Volumes|workspace|data|tmp|var|opt|srv|scratch)/[^\s\"'`,)>]+"
    r"|[A-Za-z]:\\{1,2}Users\\{1,2}[^\s\"'`,)>]+)"
)


@dataclass(frozen=True)
class Pushing:
    """What would go to the Hub, and what would not."""

    folder: Path
    repository: str
    sizes: Mapping[str, int]  # bytes by file
    left_out: Mapping[str, str]  # why, by file
    card: str | None  # to be written as README.md; None where the folder has one

    def listing(self) -> str:
        """For the person who decides."""
        from rich.filesize import decimal

        width = max(len(name) for name in self.sizes)
        rows = [f"  {name:{width}}  {decimal(size):>10}" for name, size in self.sizes.items()]
        total = f"{self.repository}: {len(self.sizes)} files, {decimal(sum(self.sizes.values()))}"
        stays = [f"  {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join([total, *rows, *([f"stays here: {len(stays)} files", *stays] if stays else [])])


@dataclass(frozen=True)
class Pushed:
    """Where it is now."""

    url: str
    commit: str


def plan_push(folder: Path, repository: str) -> Pushing:
    """Decide what of a folder goes. Raises UsageError for what is no Hub id, InputRefused for what must not go."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"{repository!r}: no name of a repository, expected one such as you/model") from error
    if not folder.is_dir():
        raise InputRefused(f"{folder}: no such folder")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes, left_out, problems = {}, {}, []
    for name in names:
        why = _left_out(folder, name)
        found = None if why else _private(folder / name)
        if why:
            left_out[name] = why
        elif found and (found.startswith("a secret") or checks.defines(name) or name == CONFIG):
            problems.append(f"{name}: {found}")
        elif found:
            left_out[name] = found
        else:
            sizes[name] = (folder / name).stat().st_size
    if problems:
        raise InputRefused(listed(f"{folder}: not pushed, for the world would read", problems), "Take it out first.")
    if not any(name.endswith((".safetensors", ".gguf")) for name in sizes):
        raise InputRefused(f"{folder}: holds no weights", "Give a run, a model folder, or one with a GGUF file.")
    if WEIGHTS in sizes:
        load_adapter(folder)  # nobody is to download what is half there or not finite
    card = None if CARD in sizes else card_of(folder)
    sizes |= {CARD: len(card.encode())} if card else {}
    return Pushing(folder, repository, dict(sorted(sizes.items())), left_out, card)


def push(plan: Pushing, *, private: bool) -> Pushed:
    """One commit with everything; the repository is made where it is not there. Raises NetworkFailed."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    contents = {name: str(plan.folder / name) for name in plan.sizes if name != CARD or plan.card is None}
    operations = [CommitOperationAdd(name, path) for name, path in contents.items()]
    operations += [CommitOperationAdd(CARD, plan.card.encode())] if plan.card is not None else []
    try:
        with hub_errors(plan.repository, None, "model"):
            api.create_repo(plan.repository, private=private, exist_ok=True)
        with hub_errors(plan.repository, None, "model"):
            done = api.create_commit(plan.repository, operations, commit_message="Pushed by mlxsft")
    except NetworkFailed as failure:
        raise _not_pushed(plan.repository, failure) from failure
    return Pushed(f"{api.endpoint}/{plan.repository}", str(done.oid))


def _not_pushed(repository: str, failure: NetworkFailed) -> NetworkFailed:
    """What went wrong, said of a push."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause = failure.__cause__
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if status in (401, 403, 404):
        hint = "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."
        return NetworkFailed(f"{repository}: not pushed, the Hub does not let this login write there", hint)
    offline = isinstance(cause, OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE is set" if offline else str(cause).partition("\n")[0] or type(cause).__name__
    return NetworkFailed(f"{repository}: not pushed ({why})", "Check the network and HF_ENDPOINT, and try again.")


# ---- what goes ------------------------------------------------------------------------------------------------------


def _left_out(folder: Path, name: str) -> str | None:
    """Why a file of this name stays here; None where it may go."""
    path = folder / name
    if any(part.startswith((".", "__")) for part in name.split("/")):
        return "hidden"
    for why, patterns in LEFT_OUT.items():
        if any(fnmatchcase(name.lower(), pattern) for pattern in patterns):
            return why
    inside = (folder.resolve(), checks.blobs(folder) or folder.resolve())
    if path.is_symlink() and not path.name.endswith(".gguf"):
        target = Path(os.path.realpath(path))
        return None if any(target.is_relative_to(root) for root in inside) else "a link that leaves the folder"
    if name == LOCK and not (folder / "config.json").exists():
        return "of a run: its paths are those of this machine"
    return None


def _private(path: Path) -> str | None:
    """What of a text file is for nobody else; None where nothing was found, and for files that are no text."""
    if not path.name.endswith(TEXTS) or path.name in NO_PROSE or path.stat().st_size > TEXT_BYTES:
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if secret := next(secrets(text), None):
        return f"a secret ({secret})"
    if found := _PATH.search(text):
        return f"a path of this machine ({found[0][:60]})"
    home = str(Path.home())
    return f"a path of this machine ({home})" if len(home) > 5 and home in text else None


# ---- the card -------------------------------------------------------------------------------------------------------


def card_of(folder: Path) -> str:
    """README.md of a folder that has none: what it is of, from which rows by which recipe, and how it was judged."""
    adapter = _json(folder / CONFIG)
    base, commit = _base(folder, adapter)
    relation = _relation(folder)
    facts: dict[str, Any] = {"library_name": "mlx", "pipeline_tag": "text-generation"}
    facts |= {"library_name": "peft"} if (folder / "adapter_model.safetensors").exists() else {}
    facts |= {"library_name": "gguf"} if relation == "quantized" and any(folder.glob("*.gguf")) else {}
    if base:
        facts |= {"base_model": base, "base_model_relation": relation, **_base_metadata(base, commit)}
    recipe, data = passport_part(adapter, "recipe"), passport_part(adapter, "data")
    sets = list(_hub_rows(recipe))
    facts |= {"datasets": sets} if sets else {}
    facts["tags"] = [word for word in ("mlxsft", adapter.get("fine_tune_type")) if word]
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {folder.name}",
        "",
    ]
    what = {"adapter": "An adapter for", "finetune": "Tuned from", "quantized": "A smaller form of"}[relation]
    at = f" at commit {commit}" if commit else ""
    lines += [f"{what} {base or 'a model that its files do not name'}{at}.", ""]
    lines += ["## Data", "", *(f"- {name}, SHA-256 {sha256}" for name, sha256 in data.items()), ""] if data else []
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
        lines += ["## Recipe", "", "```yaml", text, "```", ""]
    lines += _evaluation(folder)
    versions = passport_part(adapter, "versions")
    return "\n".join([*lines, _with(versions)]) + "\n" if versions else "\n".join(lines)


def _with(versions: Mapping[str, Any]) -> str:
    return "Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + "."


def _base(folder: Path, adapter: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(Hub id of the base, its commit) as the files say; None for what is no Hub id."""
    said = passport_part(adapter, "base")
    lock = read_lock(folder) if (folder / LOCK).exists() and (folder / "config.json").exists() else None
    name = said.get("name") or adapter.get("base_model_name_or_path") or (lock.repository if lock else None)
    commit = said.get("commit") or adapter.get("revision") or (lock.commit if lock else None)
    is_id = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return (str(name), commit if isinstance(commit, str) else None) if is_id else (None, None)


def _relation(folder: Path) -> str:
    """What the Hub calls it: adapter, finetune or quantized."""
    if (folder / WEIGHTS).exists() or (folder / "adapter_model.safetensors").exists():
        return "adapter"
    packed = {"quantization", "quantization_config"} & _json(folder / "config.json").keys()
    return "quantized" if packed or any(folder.glob("*.gguf")) else "finetune"


def _base_metadata(base: str, commit: str | None) -> dict[str, Any]:
    """Licence and languages, as the base's own card has them, if it can be had."""
    path = optional_file(base, commit, CARD) if commit else None
    return metadata_of(path) if path else {}


def _hub_rows(recipe: Mapping[str, Any]) -> Iterator[str]:
    """The data sets of the Hub that a recipe names."""
    data = recipe.get("data")
    train = data.get("train") if isinstance(data, dict) else None
    for entry in train if isinstance(train, list) else [train]:
        path = entry.get("path") if isinstance(entry, dict) else entry
        if isinstance(path, str) and (found := re.match(r"hf://([\w.-]+/[\w.-]+)", path)):
            yield found[1]


def _evaluation(folder: Path) -> list[str]:
    """The figures of card.json, a line each; the answers, which quote rows, stay out."""
    metrics = _json(folder / EVALUATION).get("metrics")
    if not isinstance(metrics, dict):
        return []
    lines = []
    for name, metric in metrics.items():
        values = metric if isinstance(metric, dict) else {"": metric}
        said = [f"{key} {value:.4g}".strip() for key, value in values.items() if isinstance(value, int | float)]
        lines += [f"- {name}: {', '.join(said)}"] if said else []
    return ["## Evaluation", "", *lines, ""] if lines else []


def _json(path: Path) -> dict[str, Any]:
    return checks.read_json(path) if path.is_file() else {}
