"""A folder or a Hub id → ModelSource: verified, pinned to a commit, nothing loaded.

Whatever a checkpoint could do to this machine or to the run is refused here, before a weight is read: code, pickle,
names that leave the folder, shards that do not fit together, token ids without an embedding row. From the Hub the
listing is judged before anything is downloaded, and the small files before the weights.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxsft.cache import cache_folder
from mlxsft.errors import InputRefused, NetworkFailed, UsageError
from mlxsft.hub import Tell, Unreachable, download, hub_errors
from mlxsft.models import checks
from mlxsft.models.headers import TensorInfo, read_headers
from mlxsft.models.sizes import refuse_impossible_sizes
from mlxsft.terminal import one_line

__all__ = ["ModelSource", "TensorInfo", "open_model"]

# mlx-lm lets these attend to everything, where the model was made to see its sliding window alone: 3 to 7 nats a token
# apart beyond it in tiny random models. Texts within the window are the same.
WINDOWS_NOT_APPLIED = {"gemma2", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "starcoder2"}
REMEMBERED_BYTES = 64_000_000  # files from this size on take a while to hash


@dataclass(frozen=True)
class ModelSource:
    """A checkpoint folder that passed every check."""

    folder: Path
    name: str  # what the person wrote: a folder or a Hub id
    commit: str | None  # the Hub's commit, None for a plain folder
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]  # empty where the file is absent
    tensors: Mapping[str, TensorInfo]
    embedding_rows: int | None  # every token id must be below; None where no embedding could be told
    files: tuple[str, ...]  # weight files, in order

    @property
    def weight_bytes(self) -> int:
        """How many bytes the weight files have."""
        return sum((self.folder / file).stat().st_size for file in self.files)

    @property
    def positions(self) -> int | None:
        """How many tokens the model was made for, None where config.json does not say.

        A learned position beyond that would be read from foreign memory; a computed one was never trained.
        """
        text_config = self.config.get("text_config")
        nested = text_config if isinstance(text_config, dict) else {}
        names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
        found = (config[name] for config in (self.config, nested) for name in names if name in config)
        positions = next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)
        window = self.config.get("sliding_window")
        unseen = self.config.get("model_type") in WINDOWS_NOT_APPLIED and self.config.get("use_sliding_window", True)
        if unseen and isinstance(window, int) and not isinstance(window, bool) and window > 0:
            return window if positions is None else min(positions, window)
        return positions

    def end_token_ids(self) -> frozenset[int]:
        """The ids that end an answer, by config.json and generation_config.json together."""
        text_config = self.config.get("text_config")
        nested = text_config if "eos_token_id" not in self.config and isinstance(text_config, dict) else {}
        places = {"config.json": self.config, "generation_config.json": self.generation_config}
        found = checks.eos_ids("config.json", nested)
        return found.union(*(checks.eos_ids(file, config) for file, config in places.items()))

    def hashes(self) -> dict[str, str]:
        """{file: SHA-256} of every file that defines the model."""
        return {name: self.hash_of(name) for name in checks.listing(self.folder) if checks.defines(name)}

    def hash_of(self, file: str) -> str:
        """SHA-256 of one of the files. A large one is read once, and again only when its size or time changes."""
        return _sha256(self.folder / file)


def open_model(model: str, *, revision: str | None = None, progress: Tell | None = None) -> ModelSource:
    """The verified checkpoint of a folder or a Hub id; `progress` is told in one line what is downloaded."""
    try:
        folder = _find_folder(model)
        if folder is None:
            return _from_hub(model, revision, progress or (lambda line: None))
        commit = folder.name if checks.blobs(folder) else None  # a snapshot of the Hub cache is named after it
        if revision not in (None, commit):
            raise UsageError(
                f"{model}: is a folder, but the revision {revision!r} pins a commit of the Hub",
                "Remove the revision, or write the Hub id.",
            )
        return _verify(folder, model, commit)
    except InputRefused as refusal:
        raise InputRefused(one_line(f"{model}: {refusal.message}"), refusal.hint) from refusal


# ---- a folder -------------------------------------------------------------------------------------------------------


def _find_folder(model: str) -> Path | None:
    """The folder that `model` names; None when it can only be a Hub id."""
    candidates = [model, os.path.expanduser(model)]
    for candidate in candidates:
        if model and os.path.isdir(candidate):
            return Path(candidate).resolve()
    if any(os.path.isfile(candidate) for candidate in candidates):
        raise InputRefused("is a file; a checkpoint is the folder with config.json and model*.safetensors")
    if model.startswith((".", "/", "~")):
        raise InputRefused("no such folder")
    return None


def _verify(folder: Path, name: str, commit: str | None) -> ModelSource:
    """The folder as a ModelSource; the first thing wrong with it is raised, code and pickle before all else."""
    names = checks.listing(folder)
    checks.refuse_pickle_only(names)
    configs = checks.read_configs(folder, names)
    weight_map = checks.weight_map(folder, names)
    files = checks.weight_files(names, weight_map)
    tensors = read_headers(folder, files)
    checks.match_index(tensors, weight_map)
    checks.refuse_without_tokenizer(names)
    config = configs["config.json"]
    refuse_impossible_sizes(config, tensors)
    rows = checks.embedding_rows(tensors, config)
    checks.refuse_ids_beyond(rows, checks.token_ids(folder, names, configs.get("tokenizer_config.json", {})))
    generation = configs.get("generation_config.json", {})
    source = ModelSource(folder, name, commit, config, generation, tensors, rows, tuple(files))
    source.end_token_ids()  # malformed ones are refused now, not in the middle of a run
    return source


def _sha256(path: Path) -> str:
    """SHA-256 of a file; in the Hub cache the blob of an LFS file has it as its name."""
    blob = path.resolve()
    if blob.parent == checks.blobs(path.parent) and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    stat = blob.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return _digest(blob)
    place = cache_folder() / "hashes" / hashlib.sha256(str(blob).encode()).hexdigest()[:32]
    seen = f"{stat.st_size} {stat.st_mtime_ns} "
    with suppress(OSError, UnicodeDecodeError):
        kept = place.read_text(encoding="ascii")
        if kept.startswith(seen) and re.fullmatch(r"[0-9a-f]{64}", kept.removeprefix(seen)):
            return kept.removeprefix(seen)
    digest = _digest(blob)
    with suppress(OSError):  # done without where the cache cannot be written
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(seen + digest, encoding="ascii")
    return digest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the Hub --------------------------------------------------------------------------------------------------------


def _from_hub(model: str, revision: str | None, progress: Tell) -> ModelSource:
    """The checkpoint of a Hub id, pinned to the commit that the revision stands for now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in its __all__

    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise InputRefused("neither a folder that exists nor a Hub id such as Qwen/Qwen2.5-0.5B-Instruct") from error
    if revision is not None and (".." in revision or not re.fullmatch(r"[\w./+-]+", revision)):
        raise UsageError(f"revision: {revision!r} is no branch, tag or commit")
    if revision is not None and checks.COMMIT.fullmatch(revision):  # never changes: what is cached needs no network
        with suppress(NetworkFailed):
            return _from_cache(model, revision, Unreachable(model))
    try:
        with hub_errors(model, revision, "model"):
            info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
            commit, sizes = str(info.sha), {file.rfilename: file.size or 0 for file in info.siblings or ()}
            if not checks.COMMIT.fullmatch(commit):
                raise ValueError("its answer names no commit")
    except Unreachable as failure:
        source = _from_cache(model, revision, failure)
        progress(f"{failure.message}; using the cached commit {source.commit}")
        return source
    return _from_listing(model, revision, commit, sizes, progress)


def _from_listing(
    model: str, revision: str | None, commit: str, sizes: Mapping[str, int], progress: Tell
) -> ModelSource:
    """The checkpoint of one commit: judged by its file names, then by its small files, then downloaded."""
    checks.refuse_pickle_only(sizes)
    if "config.json" not in sizes:
        raise InputRefused("config.json is missing")
    small = [name for name in sizes if checks.defines(name) and not fnmatchcase(name, checks.WEIGHTS)]
    folder = download(model, commit, {name: sizes[name] for name in small}, "model", progress)
    checks.read_configs(folder, small)
    weights = ["config.json", *checks.weight_files(sizes, checks.weight_map(folder, small))]
    download(model, commit, {name: sizes[name] for name in weights}, "model", progress)
    source = _verify(folder, model, commit)
    _remember(model, revision, commit)
    return source


def _from_cache(model: str, revision: str | None, failure: Unreachable) -> ModelSource:
    """The checkpoint as the Hub cache has it; `failure`, with what is missing, where that is not all of it."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "tokenizer*", checks.INDEX, checks.WEIGHTS]
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=patterns))
        return _verify(folder, model, commit=folder.name)
    except checks.Incomplete as error:
        raise NetworkFailed(f"{failure.message}; its copy in the cache lacks files: {error}", failure.hint) from error
    except OSError as error:  # huggingface_hub's LocalEntryNotFoundError is one
        raise NetworkFailed(f"{failure.message}; the cache holds no complete copy", failure.hint) from error


def _remember(model: str, revision: str | None, commit: str) -> None:
    """Lets the cache find this commit by its branch or tag; called last, so that they name complete ones only."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(known, str) or Path(known).parent.name != commit:
        with hub_errors(model, revision, "model"):
            hf_hub_download(model, "config.json", revision=revision)
