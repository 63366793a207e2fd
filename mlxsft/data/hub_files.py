"""Which files of a data set on the Hub hold the rows of a split, told from their names and from the data set's card.

The rules are those of the Hub: https://huggingface.co/docs/hub/datasets-data-files-configuration. Nothing here reads
anything but names and the card, and no code of a data set ever runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from mlxsft.data.rows import ENDINGS, suffix_of
from mlxsft.errors import InputRefused

Splits = dict[str, list[str]]  # the files of each, in order

_KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_BETWEEN = "[-._ 0-9]"  # what may stand between a keyword and the rest of a name
_SHARD = re.compile(r"data/([\w.-]+?)-\d{5}-of-\d{5}[^/]*")
_CONVERTED = re.compile(r"([^/]+)/[^/]+/\d{4}\.parquet")  # what the Hub itself writes to refs/convert/parquet
_NO_ROWS = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_READER_SETTINGS = {"sep", "delimiter", "names", "column_names", "header", "skiprows", "encoding", "quotechar", "field"}


@dataclass(frozen=True)
class _Config:
    """One of the data sets in a repository: its folder, and the patterns of its splits where its card gives them."""

    name: str
    folder: str = ""
    patterns: Mapping[str, list[str]] = field(default_factory=dict)
    default: bool = False
    settings: Sequence[str] = ()  # of the card, for reading the files


def split_files(repo: str, names: Collection[str], card: str, part: str, split: str) -> list[str]:
    """The files with the rows of a split, of all `names` in a repository with this card (README.md).

    `part` is the name of a config, a folder, a file, or a pattern of files (then the split is not asked for), or empty.
    Raises InputRefused, with what there is, where that names no files that can be read, or more than can be meant.
    """
    there = sorted(name for name in names if _is_data(name))
    named = [name for name in there if _matcher(part)(name)] if part else []
    if named:
        return _readable(repo, part, named)
    configs = _configs(repo, card, there)
    config = _chosen(repo, configs, part, there)
    if config.settings:
        raise InputRefused(
            f"{repo}: its card reads {config.name} with the setting {config.settings[0]!r}, which is not done here",
            f"Name a file of it, hf://{repo}/FILE, where that reads well without; else convert it first.",
        )
    found = {name: _matching(patterns, there) for name, patterns in config.patterns.items()}
    if not found:
        if f"{repo.rpartition('/')[2]}.py" in names and not part:
            raise InputRefused(
                f"{repo}: its rows are made by a program, which never runs here",
                f"Try the copy that the Hub may have made of them: hf://{repo}@refs/convert/parquet.",
            )
        found = _by_convention([name for name in there if suffix_of(name) or _is_packed(name)], config.folder)
    what = f"{repo}/{config.name}" if config.name else repo
    chosen = split if split in found else next((name for name in found if _canonical(name) == _canonical(split)), None)
    if chosen is None:
        some = f"it has {', '.join(sorted(found))}" if found else f"none of its files can be read; {ENDINGS} are"
        address = f"hf://{repo}{f'/{config.name}' * bool(config.name)}:{min(found, default='')}"
        raise InputRefused(f"{what}: no split {split}; {some}", f"Name one: {address}." if found else None)
    return _readable(repo, chosen, found[chosen])


def _is_data(name: str) -> bool:
    """Whether a file may hold rows, by its name; nothing hidden and nothing that leads out of the repository."""
    parts = name.split("/")
    hidden = any(not part or part.startswith((".", "__")) for part in parts)
    return not hidden and "\\" not in name and parts[-1] not in _NO_ROWS and not name.endswith((".md", ".py"))


def _readable(repo: str, what: str, found: Sequence[str]) -> list[str]:
    """The files, where all are of one kind that is read."""
    if not found:
        raise InputRefused(f"{repo}: {what} names files that are not there")
    kept = [name for name in found if suffix_of(name)]
    if unread := [name for name in found if not kept or _is_packed(name)]:
        raise InputRefused(f"{repo}: {what} is in {unread[0]}; {ENDINGS} are read")
    kinds = {suffix_of(name): name for name in kept}
    if len(kinds) > 1:
        some = " and ".join(kinds.values())
        raise InputRefused(f"{repo}: {what} is in {some}", f"Name the one that is meant: hf://{repo}/{kept[0]}.")
    return kept


def _is_packed(name: str) -> bool:
    """Whether a file that is not read may well hold rows."""
    return suffix_of(name) is None and name.endswith((".zst", ".xz", ".bz2", ".lz4", ".zip", ".gz", ".tgz", ".tar"))


# --- configs ---------------------------------------------------------------------------------------------------------


def _chosen(repo: str, configs: Mapping[str, _Config], part: str, there: Sequence[str]) -> _Config:
    if part in configs:
        return configs[part]
    if part:
        if any(name.startswith(f"{part}/") for name in there):
            return _Config(part, f"{part}/")
        some = f"; configs: {', '.join(configs)}" if configs else ""
        raise InputRefused(f"{repo}: has no config, folder or file {part!r}{some}")
    marked = [config for config in configs.values() if config.default or config.name == "default"]
    if not configs:
        return _Config("")
    if marked or len(configs) == 1:
        return next(iter(marked or configs.values()))
    raise InputRefused(
        f"{repo}: holds several data sets: {', '.join(configs)}", f"Name one: hf://{repo}/{next(iter(configs))}."
    )


def _configs(repo: str, card: str, there: Iterable[str]) -> dict[str, _Config]:
    """The data sets that the card names, or those whose folders the Hub's own copy has."""
    if given := _card_configs(repo, card):
        return {config.name: config for config in (_config(repo, entry) for entry in given)}
    converted = [_CONVERTED.fullmatch(name) for name in there]
    if converted and all(converted):
        return {found[1]: _Config(found[1], f"{found[1]}/") for found in converted if found}
    return {}


def _card_configs(repo: str, card: str) -> list[Any]:
    """What stands under `configs:` in the YAML at the top of a card; the rest, which may be long, is not read."""
    lines = card.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return []
    end = next((i for i, line in enumerate(lines[1:], 1) if line.rstrip() == "---"), 0)
    start = next((i for i, line in enumerate(lines[:end]) if line.startswith("configs:")), None)
    if start is None:
        return []
    after = (i for i in range(start + 1, end) if lines[i][:1] not in ("", " ", "\t", "-", "#"))
    try:
        # BaseLoader: all text, so that a config called `no` keeps its name.
        read = yaml.load("\n".join(lines[start : next(after, end)]), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputRefused(f"{repo}: README.md: configs cannot be read: {str(error).splitlines()[0]}") from None
    configs = read.get("configs") if isinstance(read, dict) else None
    return configs if isinstance(configs, list) else []


def _config(repo: str, entry: object) -> _Config:
    if not isinstance(entry, dict):
        raise InputRefused(f"{repo}: README.md: a config is no mapping")
    folder = str(entry.get("data_dir", "")).strip("/")
    folder = f"{folder}/" if folder not in ("", ".") else ""
    files = entry.get("data_files")
    given = files if isinstance(files, list) else [] if files is None else [files]
    patterns: dict[str, list[str]] = {}
    for item in given:
        if isinstance(item, dict) and "path" in item:
            patterns.setdefault(str(item.get("split", "train")), []).extend(_texts(item["path"]))
        elif isinstance(item, dict):
            for split, paths in item.items():
                patterns.setdefault(str(split), []).extend(_texts(paths))
        else:
            patterns.setdefault("train", []).extend(_texts(item))
    patterns = {split: [f"{folder}{path}" for path in paths] for split, paths in patterns.items()}
    name, default = str(entry.get("config_name", "default")), entry.get("default") == "true"
    return _Config(name, folder, patterns, default, settings=sorted(_READER_SETTINGS & entry.keys()))


def _texts(value: object) -> list[str]:
    return [str(text) for text in value] if isinstance(value, list) else [str(value)]


# --- names -----------------------------------------------------------------------------------------------------------


def _by_convention(there: Sequence[str], folder: str) -> Splits:
    """The splits that names tell: shards in data/, else folders, else file names; else everything is `train`."""
    inside = [name for name in there if name.startswith(folder)]
    shards: dict[str, list[str]] = {}
    for name in inside:
        if found := _SHARD.fullmatch(name.removeprefix(folder)):
            shards.setdefault(found[1], []).append(name)
    if shards:
        return shards
    for told_by in (_folders_tell, _name_tells):
        splits = {split: [n for n in inside if told_by(n.removeprefix(folder), words)] for split, words in _WORDS}
        if splits := {split: found for split, found in splits.items() if found}:
            return splits
    readable = [name for name in inside if suffix_of(name)] or inside
    return {"train": readable} if readable else {}


_WORDS = [(split, re.compile(rf"(?:.*{_BETWEEN})?(?:{'|'.join(words)})")) for split, words in _KEYWORDS.items()]


def _folders_tell(name: str, words: re.Pattern[str]) -> bool:
    return any(re.fullmatch(rf"{words.pattern}(?:{_BETWEEN}.*)?", folder) for folder in name.split("/")[:-1])


def _name_tells(name: str, words: re.Pattern[str]) -> bool:
    return bool(re.fullmatch(rf"{words.pattern}{_BETWEEN}.*", name.rpartition("/")[2]))


def _canonical(split: str) -> str:
    return next((name for name, words in _KEYWORDS.items() if split in words), split)


def _matching(patterns: Iterable[str], there: Sequence[str]) -> list[str]:
    """The files that match, those of each pattern in order, each once."""
    found = (name for pattern in patterns for name in filter(_matcher(pattern), there))
    return list(dict.fromkeys(found))


def _matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a name matches: `*` and `?` stay inside a folder, `**` does not, `[0-9]` is one of these."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", pattern.removeprefix("./"))
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    written = "".join(
        signs.get(part) or (f"[{part[1:-1].replace('!', '^', 1) if part[1] == '!' else part[1:-1]}]")
        if i % 2
        else re.escape(part)
        for i, part in enumerate(parts)
    )
    try:
        compiled = re.compile(written)
    except re.error:  # such as a range that runs backwards
        return lambda name: name == pattern
    return lambda name: bool(compiled.fullmatch(name))
