"""Rows of a data set on the Hub: what a name such as `hf://org/name:train[:500]` stands for, and its files here."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from mlxsft.cache import cache_folder
from mlxsft.data.hub_files import split_files
from mlxsft.data.rows import read_rows, suffix_of
from mlxsft.errors import NetworkFailed
from mlxsft.hub import Tell, Unreachable, download, hub_errors

PREFIX = "hf://"
LOOKS = "hf://ORG/NAME[@REVISION][/CONFIG or /FILE][:SPLIT][FROM:TO], such as hf://tatsu-lab/alpaca:train[:500]"
CARD = "README.md"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})")
_BOUND = r"-?\d{1,15}%?"
_ADDRESS = re.compile(
    r"hf://(?:datasets/(?=[^/]+/))?"  # the long form, as huggingface_hub's own file system has it
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*|\w[\w.-]*(?=[@:\[]|$))"
    r"(?:@(?P<revision>refs/(?:convert|pr)/[\w.-]+|[\w.%+-]+))?"
    r"(?:/(?P<part>[^:@\s]*[^:@\s/]))?/?"
    rf"(?::(?P<split>\w[\w.-]*))?(?:\[(?P<start>{_BOUND})?:(?P<stop>{_BOUND})?\])?"
)


@dataclass(frozen=True)
class HubRows:
    """Rows of a data set on the Hub; `str` of it is the address that `parse` reads.

    `part` is a config, a folder or a file of the repository, `split` what the use implies where it is empty. `start`
    and `stop` are numbers of rows, from the end where negative, or percentages; empty for all.
    """

    repo: str
    revision: str = ""
    part: str = ""
    split: str = ""
    start: str = ""
    stop: str = ""

    @classmethod
    def parse(cls, address: str) -> HubRows:
        """The rows of an address; ValueError, with what was expected, for one that is none."""
        found = _ADDRESS.fullmatch(address)
        fields = {name: text or "" for name, text in found.groupdict().items()} if found else {}
        fields["revision"] = unquote(fields.get("revision", ""))
        if not found or any(".." in fields[name].split("/") for name in ("repo", "part", "revision")):
            raise ValueError(f"got {json.dumps(address)}, expected {LOOKS}")
        return cls(**fields)

    def __str__(self) -> str:
        revision = self.revision
        if "/" in revision and not revision.startswith(("refs/convert/", "refs/pr/")):
            revision = revision.replace("/", "%2F")
        parts = (("@", revision), ("/", self.part), (":", self.split))
        rows = f"[{self.start}:{self.stop}]" if self.sliced else ""
        return PREFIX + self.repo + "".join(f"{sign}{text}" for sign, text in parts if text) + rows

    @property
    def name(self) -> str:
        return str(self)

    @property
    def sliced(self) -> bool:
        return bool(self.start or self.stop)

    def slice(self, count: Callable[[], int]) -> slice:
        """The rows that are meant; `count` is asked for their number where a bound cannot be told without."""
        start, stop = (_bound(text, count) if text else None for text in (self.start, self.stop))
        return slice(start, stop)


def _bound(text: str, count: Callable[[], int]) -> int:
    number = int(text.removesuffix("%"))
    if text.endswith("%"):
        number = round(abs(number) * count() / 100)
    return max(0, count() - abs(number)) if text.startswith("-") else number


def pinned(rows: HubRows, split: str, tell: Tell) -> HubRows:
    """The same rows by the commit that their revision stands for now, their files downloaded. Errors as for `local`."""
    listing = _listing(rows, tell)
    of_commit = replace(rows, revision=listing.commit)
    _files(of_commit, listing, split, tell)
    _keep(rows, listing)  # last, so that without a network a branch stands for a commit whose files are here
    return of_commit


def local(rows: HubRows, split: str, tell: Tell = lambda line: None) -> list[Path]:
    """The files with the rows, downloaded where they are not here yet; `split` is what is meant where rows have none.

    A pinned one that is here asks no network. Raises NetworkFailed where the Hub does not give them, InputRefused where
    it is unclear which files are meant or where they cannot be read.
    """
    listing = _listing(rows, tell)
    return _files(rows, listing, split, tell)


def address_of(file: Path) -> str:
    """What a file of the Hub is called wherever its cache may be, `hf://ORG/NAME@COMMIT/FILE`; of others the path."""
    found = re.search(r"/datasets--([^/]+)/snapshots/([0-9a-f]{40})/(.+)", file.as_posix())
    return f"{PREFIX}{found[1].replace('--', '/')}@{found[2]}/{found[3]}" if found else str(file)


def _files(rows: HubRows, listing: _Listing, split: str, tell: Tell) -> list[Path]:
    card = ""
    if CARD in listing.sizes:
        folder = download(rows.repo, listing.commit, {CARD: listing.sizes[CARD]}, "dataset", tell)
        card = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    names = split_files(rows.repo, listing.sizes, card, rows.part, rows.split or split)
    if rows.stop.isdecimal() and (not rows.start or rows.start.isdecimal()):  # else all rows are counted
        names = list(_first(rows, listing, names, tell))
    folder = download(rows.repo, listing.commit, {name: listing.sizes[name] for name in names}, "dataset", tell)
    return [folder / name for name in names]


def _first(rows: HubRows, listing: _Listing, names: list[str], tell: Tell) -> Iterator[str]:
    """As many of the files as hold the rows that are meant: the first 500 of a large set need one of its shards."""
    wanted = int(rows.stop)
    for name in names:
        yield name
        if name != names[-1]:
            folder = download(rows.repo, listing.commit, {name: listing.sizes[name]}, "dataset", tell)
            wanted -= _count(folder / name)
        if wanted <= 0:
            return


def _count(file: Path) -> int:
    if suffix_of(file.name) == ".parquet":
        from mlxsft.data.tables import parquet_count

        return parquet_count(file)
    return sum(1 for _ in read_rows([file]))


# --- what a commit holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Listing:
    """The files of a commit, with their bytes."""

    commit: str
    sizes: Mapping[str, int]


def _listing(rows: HubRows, tell: Tell) -> _Listing:
    """What the Hub has of these rows now; what was kept of it where the revision is a commit or the Hub is silent."""
    from huggingface_hub import HfApi

    pinned = _COMMIT.fullmatch(rows.revision)
    if pinned and (kept := _kept(rows)):
        return kept
    try:
        with hub_errors(rows.repo, rows.revision, "dataset"):
            revision = rows.revision or None
            info = HfApi().dataset_info(rows.repo, revision=revision, files_metadata=True, timeout=30)
            listing = _Listing(str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()})
            if not _COMMIT.fullmatch(listing.commit):
                raise ValueError("its answer names no commit")
    except Unreachable as failure:
        listing = _kept(rows) or _cached(rows, failure)
        tell(f"{failure.message}; using the {len(listing.sizes)} files of the commit {listing.commit}")
        return listing
    _keep(replace(rows, revision=listing.commit), listing)
    return listing


def _cached(rows: HubRows, failure: Unreachable) -> _Listing:
    """What the Hub's own cache has, as `hf download` left it there."""
    from huggingface_hub import snapshot_download

    revision = rows.revision or None
    try:
        folder = Path(snapshot_download(rows.repo, repo_type="dataset", revision=revision, local_files_only=True))
    except OSError as error:  # huggingface_hub's LocalEntryNotFoundError is one
        raise NetworkFailed(f"{failure.message}; the cache holds no copy", failure.hint) from error
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    shards = Counter((found[1], int(found[2])) for name in sizes if (found := _SHARD.search(name)))
    if lacking := [(name, here, all_) for (name, all_), here in shards.items() if here < all_]:
        name, here, all_ = lacking[0]
        raise NetworkFailed(f"{failure.message}; the cache holds {here} of the {all_} files {name}-*", failure.hint)
    return _Listing(folder.name, sizes)


def _place(rows: HubRows) -> Path:
    digest = hashlib.sha256(f"{rows.repo}@{rows.revision}".encode()).hexdigest()
    return cache_folder() / "datasets" / f"{digest[:32]}.json"


def _keep(rows: HubRows, listing: _Listing) -> None:
    place = _place(rows)
    with suppress(OSError):  # done without where the cache cannot be written
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps({"commit": listing.commit, "sizes": listing.sizes}), encoding="utf-8")
        os.replace(aside, place)


def _kept(rows: HubRows) -> _Listing | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(_place(rows).read_text(encoding="utf-8"))
        return _Listing(str(kept["commit"]), {str(name): int(size) for name, size in kept["sizes"].items()})
    return None
