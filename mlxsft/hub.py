"""Files from the Hub, pinned to a commit, and one sentence for whatever goes wrong on the way."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Literal

from mlxsft.errors import MlxsftError, NetworkFailed, OutOfResources

Kind = Literal["model", "dataset"]
Tell = Callable[[str], None]  # hears in one line what is downloaded

_ABSENT: Mapping[Kind, str] = {
    "model": "neither a folder here nor a repository on the Hub that this login may see",
    "dataset": "the Hub has no such data set that this login may see",
}
_NOT_ASKED: Mapping[Kind, tuple[str, str]] = {
    "model": (
        "no such folder here, and the Hub cannot be asked for it",
        "Check the spelling of the folder, or the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
    ),
    "dataset": ("the Hub cannot be asked for it", "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."),
}


class Unreachable(NetworkFailed):
    """The Hub did not answer; what the cache holds may still do."""


def download(repo: str, commit: str, sizes: Mapping[str, int], kind: Kind, tell: Tell) -> Path:
    """The snapshot folder of a commit, with the files of these names and bytes (one at least) in it."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    cached = {name: try_to_load_from_cache(repo, name, revision=commit, repo_type=kind) for name in sizes}
    absent = [name for name, path in cached.items() if not isinstance(path, str)]
    if not absent:
        name, path = next(iter(cached.items()))
        return Path(str(path)).parents[name.count("/")]
    megabytes = sum(sizes[name] for name in absent) / 1e6
    files = "file" if len(absent) == 1 else "files"
    tell(f"{repo} at {commit[:12]}: downloading {len(absent)} {files}, {megabytes:,.1f} MB")
    with hub_errors(repo, commit, kind):
        patterns = [escape(name) for name in absent]
        folder = Path(snapshot_download(repo, revision=commit, repo_type=kind, allow_patterns=patterns))
    if missing := [name for name in sizes if not (folder / name).is_file()]:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        raise NetworkFailed(f"{repo}: the Hub did not send {some}", "Try again: the rest is kept.")
    return folder


def optional_file(repo: str, commit: str, name: str, kind: Kind = "model") -> Path | None:
    """A file of a commit, from the cache where it is there; None where it cannot be had, for whatever reason."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, name, revision=commit, repo_type=kind)
    if isinstance(cached, str):
        return Path(cached)
    with suppress(NetworkFailed), hub_errors(repo, commit, kind):
        return Path(hf_hub_download(repo, name, revision=commit, repo_type=kind))
    return None


@contextmanager
def hub_errors(repo: str, revision: str | None, kind: Kind) -> Iterator[None]:
    """What huggingface_hub raises → NetworkFailed; for one call of it at a time."""
    # httpx's or httpx2's, whichever this version of huggingface_hub is built on
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    # OSError: connection, disk, cache; RuntimeError: hf_xet's transfers; the others: an answer that is not a Hub's
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise _failure(repo, revision, kind, error) from error


def _failure(repo: str, revision: str | None, kind: Kind, error: Exception) -> MlxsftError:
    """One sentence for what went wrong between here and the Hub."""
    from huggingface_hub import errors as hub

    cause = error.__cause__ if isinstance(error, hub.LocalEntryNotFoundError) and error.__cause__ else error
    status = cause.response.status_code if isinstance(cause, hub.HfHubHTTPError) else None
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return OutOfResources(f"{repo}: the disk is full", "Free some space, or set HF_HOME to another disk.")
    if isinstance(cause, hub.GatedRepoError) or status == 403:
        page = {"model": "the model's page", "dataset": "the data set's page"}[kind]
        return NetworkFailed(f"{repo}: the Hub refuses access", f"Ask for it on {page}, then {login}.")
    if isinstance(cause, hub.RevisionNotFoundError):
        return NetworkFailed(f"{repo}: the Hub has no revision {revision!r} of it", "Check the branch, tag or commit.")
    if isinstance(cause, hub.RepositoryNotFoundError) or status in (401, 404):
        return NetworkFailed(f"{repo}: {_ABSENT[kind]}", f"Check the name; for a private one, {login}.")
    why = "HF_HUB_OFFLINE is set" if isinstance(cause, hub.OfflineModeIsEnabled) else f"{type(cause).__name__}: {cause}"
    first_line = why.partition("\n")[0]
    what, hint = _NOT_ASKED[kind]
    return Unreachable(f"{repo}: {what} ({first_line})", hint)
