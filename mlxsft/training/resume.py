"""Going on with a run: what differs from how it began, and which of that may."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxsft.errors import InputRefused, UsageError
from mlxsft.recipe import Recipe, load_recipe
from mlxsft.recipe_file import shown
from mlxsft.training.checkpoints import RunFolder

# Settings that decide how much is computed at once, what is shown and what is kept, never what is learned: they may
# change without being named. (Other micro-batches add up in another order.)
FREE = {
    "train.micro_batch_tokens",
    "train.checkpoint_activations",
    "train.cache_trunk",
    "train.cache_limit",
    "eval.samples",
    "save.every",
    "save.keep",
    "save.adapter",
    "report",
}

# Settings that cannot change, and why.
FIXED = {
    **dict.fromkeys(("adapter.kind", "adapter.rank"), "the saved adapter has this shape"),
    **dict.fromkeys(("adapter.layers", "adapter.targets"), "the saved adapter is in these places"),
    "adapter.alpha": "the saved adapter was trained at this strength",
    "train.optimizer": "the saved state is that of this optimizer",
}

# What a run stands on, and the settings that choose it.
PARTS = {"base": ("model", "revision"), "template": ("data.template",), "data": ("data.train", "data.valid")}

_LENGTH = {"train.epochs", "train.steps"}  # two ways to say one thing


@dataclass(frozen=True)
class Difference:
    """A setting, or a part that the run stands on, that is not what it was when the run began."""

    name: str
    sentence: str
    names: frozenset[str]  # each of them allows it
    why_not: str | None = None


def check_same(
    folder: RunFolder, recipe: Recipe, lock: Mapping[str, Any], allow_changes: Sequence[str]
) -> list[Difference]:
    """What changed since the run began, all of it allowed by name or by its nature.

    Raises UsageError (a setting) or InputRefused (base, template or rows), with every difference, for what is not.
    """
    before, then = load_recipe(folder.recipe), folder.read_lock()
    allowed = {_named(name, recipe) for name in allow_changes}
    settings = list(_settings_changed(before, recipe, _same_files(then, lock)))
    parts = list(_parts_changed(then, lock))
    wrong = [d for d in (*settings, *parts) if d.why_not or not (d.name in FREE or d.names & allowed)]
    if not wrong:
        return [*settings, *parts]
    lines = [f"  {d.sentence}" + f" (this cannot change: {d.why_not})" * bool(d.why_not) for d in wrong]
    message = "\n".join([f"{folder.path}: this is not the run that began in this folder:", *lines])
    hint = f"Resume with {folder.recipe} and everything as it was, or begin a new run with another --out."
    if not any(d.why_not for d in wrong):
        options = " ".join(dict.fromkeys(f"--allow-change {_setting(d.name)}" for d in wrong))
        hint = f"If that is what you want, add {options}; {folder.recipe} has the settings as they were."
    raise (UsageError if any(d in settings for d in wrong) else InputRefused)(message, hint)


def versions_changed(folder: RunFolder, lock: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each package that is not the one the run began with."""
    before = folder.read_lock().get("versions", {})
    for package, version in lock["versions"].items():
        if package in before and before[package] != version:
            yield f"{package} was {before[package]} when the run began and is {version}; results may differ in rounding"


def _settings_changed(before: Recipe, now: Recipe, same_files: Mapping[str, str]) -> Iterator[Difference]:
    """The settings that differ; a file that only moved is none."""
    old, new = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (before, now))
    for name in dict.fromkeys([*old, *new]):
        then, value = old.get(name), new.get(name)
        if then == value or (isinstance(then, str) and same_files.get(then) == value):
            continue
        setting = _setting(name)
        part = {part for part, choices in PARTS.items() if name.startswith(choices)}
        names = {setting, setting.partition(".")[0], *part} | (_LENGTH if name in _LENGTH else set())
        yield Difference(name, f"{name}: {shown(then)} → {shown(value)}", frozenset(names), FIXED.get(name))


def _parts_changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Difference]:
    """The base, the template and the rows, where their contents differ."""
    for part, choices in PARTS.items():
        old, new = (_contents(part, lock) for lock in (then, now))
        if list(old.values()) != list(new.values()):
            files = [f for f in dict.fromkeys([*old, *new]) if old.get(f) != new.get(f)]
            yield Difference(part, f"{part}: the contents of {', '.join(files)}", frozenset({part, *choices}))


def _contents(part: str, lock: Mapping[str, Any]) -> dict[str, str]:
    """{file: SHA-256} of a part of the lock."""
    entry = lock.get(part, {})
    if part == "data":
        return dict(entry)
    return dict(entry["sha256"]) if part == "base" else {entry["name"]: entry["sha256"]}


def _same_files(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """{path when the run began: path now} of rows and base that moved and kept their contents."""
    moved = dict(zip(then.get("data", {}), now["data"], strict=False)) if _equal("data", then, now) else {}
    if _equal("base", then, now):
        moved |= {then["base"][key]: now["base"][key] for key in ("name", "commit")}
    return moved


def _equal(part: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return list(_contents(part, then).values()) == list(_contents(part, now).values())


def _named(name: str, recipe: Recipe) -> str:
    """The full name of what `--allow-change` names, by all of it or its last part; UsageError for no such name."""
    settings = {_setting(path) for path, _ in _flat(recipe.model_dump(mode="json"))}
    if name in settings or name in PARTS:
        return name
    meant = sorted(path for path in settings if path.rpartition(".")[2] == name)
    if len(meant) == 1:
        return meant[0]
    problem = f"is it {' or '.join(meant)}?" if meant else "there is no such setting"
    raise UsageError(
        f"--allow-change {name}: {problem}", f"Settings go by their names in the recipe; else {', '.join(PARTS)}."
    )


def _setting(name: str) -> str:
    """The setting that a value belongs to: `data.train` for one of its sources."""
    return "data.train" if name.startswith(("data.train[", "data.train.")) else name


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name; lists and placeholders are values, the list of sources is not."""
    if isinstance(values, dict) and values and name not in ("data.fill", "data.columns"):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}".removeprefix("."))
    elif isinstance(values, list) and name == "data.train":
        for i, value in enumerate(values):
            yield from _flat(value, f"{name}[{i}]")
    else:
        yield name, values
