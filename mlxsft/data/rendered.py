"""Rows of files with the examples that they give, kept on disk by content so that a second run is quick."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlxsft import __version__
from mlxsft.cache import cache_folder
from mlxsft.data.formats import Conversation, read_conversations
from mlxsft.data.holdout import normalise
from mlxsft.data.phrasings import load_phrasings
from mlxsft.data.render import Example, Renderer
from mlxsft.data.rows import LeftOut, Origin
from mlxsft.data.sources import WeightedSource, files_of

if TYPE_CHECKING:
    from mlxsft.recipe import DataRecipe

CACHE_FROM_ROWS = 2000  # fewer are rendered faster than people notice
CACHE_BYTES = 2_000_000_000  # of all files together; the oldest go first
_LAYOUT = 3  # of a cache file; raised whenever it, or what a template makes of a row, changes


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """One row: `key` is equal for rows that ask the same (they are held out together).

    `copies` is how often an epoch has it; `phrased` says that its question was put into other words. `versions` has the
    examples of each of its phrasings, at most as many as copies; the copies take them in turn.
    """

    key: str
    versions: list[list[Example]]
    copies: int = 1
    phrased: bool = False

    @property
    def examples(self) -> list[Example]:
        """Those of the row as it is held out, and as it comes first in training."""
        return self.versions[0]

    def repeated(self) -> Iterator[Example]:
        """The examples of all copies."""
        for i in range(self.copies):
            yield from self.versions[i % len(self.versions)]


@dataclass(frozen=True)
class Rendered:
    """All rows of some files: those that give examples, and those that are left out."""

    rows: list[RenderedRow] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def render_files(
    sources: Sequence[WeightedSource],
    data: DataRecipe,
    renderer: Renderer,
    split: str,
    *,
    seed: int,
    hashes: Mapping[str, str],
) -> Rendered:
    """Every row of the sources; `hashes` (SHA-256 by path) find what was rendered before."""
    files = files_of([source.rows for source in sources], split)  # every missing file is named at once
    cache = _cache_file(files, sources, data, renderer, split, seed, hashes)
    if cache is not None and (kept := _load(cache)) is not None:
        return kept
    rendered = _render(sources, data, renderer, split, seed)
    if cache is not None and len(rendered.rows) >= CACHE_FROM_ROWS:
        _save(cache, rendered)
    return rendered


def _render(sources: Sequence[WeightedSource], data: DataRecipe, renderer: Renderer, split: str, seed: int) -> Rendered:
    rendered, taken = Rendered(), False
    read = deque[_Read]()  # rows on their way through the renderer, which keeps their order
    for _, made in renderer.rendered(_phrased(sources, data, split, seed, rendered.left_out, read), data):
        row = read.popleft()
        refused = sorted((m for m in made if isinstance(m, LeftOut)), key=lambda m: not m.broken)
        examples = [m for m in made if isinstance(m, Example)]
        usable = bool(examples) and not any(m.broken for m in refused)
        if row.first:
            taken = usable
        if row.first and usable:
            rendered.rows.append(RenderedRow(row.key, [examples], row.copies, row.phrased))
        elif row.first:
            rendered.left_out.extend(refused[:1])
        elif taken and usable:  # where a phrasing does not fit, the copy takes another one
            rendered.rows[-1].versions.append(examples)
    return rendered


@dataclass(frozen=True, slots=True)
class _Read:
    """What is known of a row beside its text; the key is that of the question as its file has it.

    `first` is False for the further phrasings of the row before.
    """

    key: str
    copies: int
    phrased: bool
    first: bool


def _phrased(
    sources: Sequence[WeightedSource],
    data: DataRecipe,
    split: str,
    seed: int,
    left_out: list[LeftOut],
    read: deque[_Read],
) -> Iterator[Conversation]:
    """The rows that are rendered, as they are asked; the others are added to `left_out`."""
    phrasings = load_phrasings(data.templates) if data.templates is not None else None
    for source in sources:
        for row in read_conversations(
            [source.rows], format=data.format, columns=data.columns, fill=data.fill, split=split
        ):
            if isinstance(row, LeftOut):
                left_out.append(row)
            elif copies := source.copies(row, seed=seed):
                versions = [row] if phrasings is None else phrasings.phrase(row, seed=seed, copies=copies)
                for i, version in enumerate(versions):
                    read.append(_Read(question_key(row), copies, version is not row, first=i == 0))
                    yield version
            else:
                left_out.append(LeftOut(row.origin, "left out by weight", f"the weight is {source.weight:g}"))


def question_key(row: Conversation) -> str:
    """What a row asks: the question decides the side on which it lands, so that none is both trained and tested."""
    asked = next((t.content for t in row.turns if t.role in ("user", "text")), row.turns[0].content)
    return hashlib.blake2b(normalise(asked).encode(), digest_size=16).hexdigest()


# --- the cache -------------------------------------------------------------------------------------------------------


def _cache_file(
    files: Sequence[Path],
    sources: Sequence[WeightedSource],
    data: DataRecipe,
    renderer: Renderer,
    split: str,
    seed: int,
    hashes: Mapping[str, str],
) -> Path | None:
    """The file for exactly these rows, settings, template, tokenizer and versions; None where one is not known."""
    fingerprint = renderer.tokenizer.fingerprint
    if fingerprint is None or any(str(f) not in hashes for f in files):
        return None
    everything = {
        "layout": _LAYOUT,
        "versions": [__version__, version("transformers"), version("tokenizers"), version("jinja2")],
        "files": [[str(f), hashes[str(f)]] for f in files],
        "split": split,
        "sources": [[str(source.rows), source.weight] for source in sources],
        "seed": seed if data.templates is not None or any(s.weight % 1 for s in sources) else None,
        "phrasings": hashes.get(data.templates) if data.templates is not None else None,
        "settings": data.model_dump(mode="json", exclude={"train", "valid"}),
        "renderer": [fingerprint, renderer.template.sha256, renderer.embedding_rows],
    }
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "rows" / f"{digest[:32]}.safetensors"


def _save(path: Path, rendered: Rendered) -> None:
    """Keep the rows; a cache that cannot be written is done without."""
    from safetensors.numpy import save

    versions = [version for row in rendered.rows for version in row.versions]
    examples = [e for version in versions for e in version]
    files = sorted({e.origin.file for e in examples})
    notes = sorted({e.note for e in examples})
    arrays = {
        "tokens": np.concatenate([e.tokens for e in examples]),
        "mask": np.packbits(np.concatenate([e.mask for e in examples])),
        "lengths": np.array([len(e.tokens) for e in examples], np.int64),
        "answers": np.array([a for e in examples for a in e.answers], np.int32),
        "answer_counts": np.array([len(e.answers) for e in examples], np.int64),
        "origins": np.array([(files.index(e.origin.file), e.origin.line) for e in examples], np.int64),
        "notes": np.array([notes.index(e.note) for e in examples], np.int32),
        "copies": np.array([row.copies for row in rendered.rows], np.int32),
        "phrased": np.array([row.phrased for row in rendered.rows], np.bool_),
        "version_counts": np.array([len(row.versions) for row in rendered.rows], np.int64),
        "example_counts": np.array([len(version) for version in versions], np.int64),
        "keys": np.frombuffer(bytes.fromhex("".join(row.key for row in rendered.rows)), np.uint8),
    }
    left_out = [[r.origin.file, r.origin.line, r.reason, r.detail, r.broken, r.column] for r in rendered.left_out]
    words = json.dumps({"files": files, "notes": notes, "left_out": left_out})
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:  # people's rows
            file.write(save(arrays, metadata={"words": words}))
        os.replace(aside, path)
        _forget_oldest(path.parent)
    except OSError:
        return


def _forget_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime, reverse=True)
    kept = 0
    for file in files:
        kept += file.stat().st_size
        if kept > CACHE_BYTES:
            file.unlink(missing_ok=True)


def _load(path: Path) -> Rendered | None:
    """What was kept, or None where there is nothing that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            words = json.loads(file.metadata()["words"])
        examples = iter(_examples(arrays, words["files"], words["notes"]))
        keys = [bytes(k).hex() for k in arrays["keys"].reshape(-1, 16)]
        versions = ([next(examples) for _ in range(n)] for n in arrays["example_counts"].tolist())
        counts = arrays["version_counts"].tolist()
        facts = zip(keys, counts, arrays["copies"].tolist(), arrays["phrased"].tolist(), strict=True)
        rows = [RenderedRow(key, [next(versions) for _ in range(n)], c, p) for key, n, c, p in facts]
        left_out = [LeftOut(Origin(f, line), *rest) for f, line, *rest in words["left_out"]]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, StopIteration, RuntimeError):
        return None
    return Rendered(rows, left_out)


def _examples(arrays: Mapping[str, np.ndarray], files: Sequence[str], notes: Sequence[str]) -> Iterator[Example]:
    ends = np.cumsum(arrays["lengths"])[:-1]
    tokens = np.split(arrays["tokens"], ends)
    mask = np.unpackbits(arrays["mask"], count=len(arrays["tokens"])).astype(np.bool_)
    masks = np.split(mask, ends)
    answers = np.split(arrays["answers"], np.cumsum(arrays["answer_counts"])[:-1])
    places = zip(arrays["origins"].tolist(), arrays["notes"].tolist(), strict=True)
    for t, m, a, ((file, line), note) in zip(tokens, masks, answers, places, strict=True):
        yield Example(t, m, Origin(files[file], line), tuple(a.tolist()), notes[note])
