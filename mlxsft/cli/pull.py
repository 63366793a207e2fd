"""`mlxsft pull` and `mlxsft verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlxsft.cli.examples import examples

if TYPE_CHECKING:
    from mlxsft.models.lock import Verdict


@click.command(
    epilog=examples(
        "mlxsft pull Qwen/Qwen2.5-0.5B-Instruct --revision main  # checked, hashed, in the Hub's cache or a folder"
    )
)
@click.argument("repository", metavar="REPO")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--revision", help="Branch, tag or commit.")
@click.option("--force", is_flag=True, help="Replace the model in OUT.")
@click.option("--json", "as_json", is_flag=True, help="Write what was pulled as one JSON object.")
def pull(repository: str, out: Path | None, revision: str | None, force: bool, as_json: bool) -> None:
    """Download the model REPO of the Hub, check it, and keep the SHA-256 of every file.

    Without OUT it stays in the Hub's cache, where every command finds it by its name. With OUT it becomes a folder.
    """
    import json

    from mlxsft.cli.bytes_bar import bytes_bar
    from mlxsft.models.pull import pull as pull_model
    from mlxsft.terminal import told

    with bytes_bar("hashing") as progress:
        done = pull_model(repository, out, revision=revision, force=force, tell=told, progress=progress)
    if as_json:
        click.echo(json.dumps(done.to_dict(), ensure_ascii=False))
    else:
        click.echo(f"{done.repository} at {done.commit[:12]}: {done.files} files in {done.folder}")


@click.command(epilog=examples("mlxsft verify models/qwen  # what changed since lock.json was written; exit 3"))
@click.argument("model", metavar="DIR")
@click.option("--revision", help="Branch, tag or commit of a pulled model that is named by its Hub id.")
@click.option("--json", "as_json", is_flag=True, help="Write what differs as one JSON object.")
def verify(model: str, revision: str | None, as_json: bool) -> None:
    """Hash every file of DIR again, and name what changed, is missing or was added since lock.json was written.

    DIR is a folder that `mlxsft convert` or `mlxsft pull` made, or the Hub id of a pulled model. Exits with 3 where
    anything differs.
    """
    from mlxsft.cli.bytes_bar import bytes_bar
    from mlxsft.errors import InputRefused
    from mlxsft.models.pull import verify_model

    with bytes_bar("hashing") as progress:
        folder, verdict = verify_model(model, revision=revision, progress=progress)
    _show(folder, verdict, as_json)
    if not verdict.same:
        raise InputRefused(f"{folder}: is not what it was", "Pull or convert the model again.")


def _show(folder: Path, verdict: Verdict, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from mlxsft.terminal import printable

    if as_json:
        click.echo(json.dumps({"folder": str(folder), "same": verdict.same, **asdict(verdict)}))
        return
    for name, why in verdict.changed.items():
        click.echo(printable(f"changed  {name}: {why}"))
    for kind, names in (("missing", verdict.missing), ("added", verdict.added)):
        for name in names:
            click.echo(printable(f"{kind:8} {name}".encode("utf-8", "backslashreplace").decode()))
    if verdict.same:
        click.echo(f"{folder}: {verdict.checked} files, all as they were")
