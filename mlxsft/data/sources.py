"""Where rows come from, a path or the Hub, and how often an epoch has those of each source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from mlxsft.data import hub
from mlxsft.data.conversation import Conversation
from mlxsft.data.hub import HubRows
from mlxsft.data.json_rows import Rows
from mlxsft.data.phrasings import position_of
from mlxsft.data.rows import ENDINGS, read_rows, suffix_of
from mlxsft.errors import InputRefused
from mlxsft.hub import Tell

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe, Source

RowSource: TypeAlias = Path | HubRows  # a file or a folder, or rows of a data set on the Hub


def source_of(name: str) -> RowSource:
    """What a name stands for; ValueError, with what was expected, for a misspelled address of the Hub."""
    return HubRows.parse(name) if name.startswith(hub.PREFIX) else Path(name)


# --- files and their rows --------------------------------------------------------------------------------------------


def rows_of(sources: Iterable[RowSource], split: str = "train") -> Rows:
    """Every row of the sources as `read_rows` gives them, of one on the Hub those that its address means.

    What `files_of` refuses is refused before the first row is read.
    """
    found = list(sources)
    files_of(found, split)
    return chain.from_iterable(_rows(source, files_of([source], split)) for source in found)


def whole_files(sources: Sequence[RowSource], split: str = "train") -> list[Path]:
    """The files of the sources where all their rows are meant; none where only some of a file are."""
    sliced = any(isinstance(source, HubRows) and source.sliced for source in sources)
    return [] if sliced else files_of(sources, split)


def _rows(source: RowSource, files: list[Path]) -> Rows:
    if isinstance(source, Path) or not source.sliced:
        yield from read_rows(files)
        return
    meant = source.slice(lambda: sum(1 for _ in read_rows(files)))
    rows = islice(read_rows(files), meant.start, meant.stop)
    first = next(rows, None)
    if first is None:
        raise InputRefused(f"{source}: there are no such rows")
    yield first
    yield from rows


def files_of(sources: Iterable[RowSource], split: str = "train") -> list[Path]:
    """The files to read, each there and of a known kind; a folder stands for its file of the split.

    That file is `train.jsonl`, `train.csv.gz` and so on, or the shards `train-00000-of-00002.parquet` that the Hub
    makes; `validation` is taken for `valid`. Those of the Hub are downloaded where they are not here yet.
    """
    files, problems = [], []
    for path in sources:
        if isinstance(path, HubRows):
            files += hub.local(path, split)
            continue
        found = _in_folder(path, split) if path.is_dir() else [path]
        if not found:
            problems.append(f"{path}: holds no {split}.jsonl or other {split} file")
        elif not path.is_dir() and not path.exists():
            problems.append(f"{path}: no such file")
        elif len(found) > 1 and not all(_is_shard(file) for file in found):
            names = " and ".join(file.name for file in found)
            problems.append(f"{path}: holds {names}; name the one that is meant")
        elif suffix_of(found[0].name) is None:
            problems.append(f"{path}: got {path.suffix or 'no ending'}; {ENDINGS} are read")
        files += found
    if problems:
        raise InputRefused("\n".join(problems), f"Give files of rows, or a folder with a {split}.jsonl.")
    return files


def _in_folder(folder: Path, split: str) -> list[Path]:
    names = {split, "validation"} if split == "valid" else {split}
    found = []
    for file in sorted(folder.iterdir()):
        suffix = suffix_of(file.name)
        if suffix and _SHARD.sub("", file.name[: -len(suffix)]) in names:
            found.append(file)
    if not found and (folder / "data").is_dir():  # where a data set of the Hub keeps its files
        return _in_folder(folder / "data", split)
    return found


def _is_shard(file: Path) -> bool:
    return bool(_SHARD.search(file.name[: -len(suffix_of(file.name) or "")]))


_SHARD = re.compile(r"-\d+-of-\d+$")


# --- what a recipe names ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedSource:
    """Rows and their weight: 2 has every row twice an epoch, 0.5 half of the rows once."""

    rows: RowSource
    weight: float = 1.0

    def copies(self, row: Conversation, *, seed: int) -> int:
        """How often an epoch has this row; which rows a fraction takes follows from the seed and what they say."""
        whole = int(self.weight)
        return whole + (position_of(row, seed, "weight") < (self.weight - whole) * 2**64)


def sources_of(data: DataRecipe) -> dict[str, list[WeightedSource]]:
    """What the recipe names, by what it is for: `train`, and `valid` where that is no share of the rows."""
    named = data.train if isinstance(data.train, tuple) else (data.train,)
    sources = {
        "train": [
            WeightedSource(source_of(s)) if isinstance(s, str) else WeightedSource(source_of(s.path), s.weight)
            for s in named
        ]
    }
    if isinstance(data.valid, str):
        sources["valid"] = [WeightedSource(source_of(data.valid))]
    return sources


def pin_sources(sources: Sequence[RowSource], split: str, tell: Tell) -> list[RowSource]:
    """The sources, those of the Hub downloaded and named by their commit, so that no later step asks the network."""
    return [hub.pinned(source, split, tell) if isinstance(source, HubRows) else source for source in sources]


def pin_recipe(data: DataRecipe, known: Mapping[str, str], tell: Tell) -> tuple[DataRecipe, dict[str, str]]:
    """The same data with every source on the Hub pinned, and the commit of each by its address in the repository.

    `known` has commits of an earlier run, which are taken again whatever its branches point to now.
    """
    commits: dict[str, str] = {}

    def pin(name: str, split: str) -> str:
        source = source_of(name)
        if isinstance(source, Path):
            return name
        address = str(HubRows(source.repo, source.revision))
        made = hub.pinned(replace(source, revision=known.get(address, source.revision)), split, tell)
        commits[address] = made.revision
        return str(made)

    def pin_source(given: str | Source) -> str | Source:
        if isinstance(given, str):
            return pin(given, "train")
        return given.model_copy(update={"path": pin(given.path, "train")})

    train = tuple(map(pin_source, data.train)) if isinstance(data.train, tuple) else pin_source(data.train)
    valid = pin(data.valid, "valid") if isinstance(data.valid, str) else data.valid
    return data.model_copy(update={"train": train, "valid": valid}), commits
