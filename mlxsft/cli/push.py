"""`mlxsft push`."""

from __future__ import annotations

from pathlib import Path

import click

from mlxsft.cli.examples import examples


@click.command(epilog=examples("mlxsft push runs/mine you/mine  # shows what goes and what stays, and asks"))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made by this.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Say what would go, and end.")
@click.option("--json", "as_json", is_flag=True, help="Write what went where as one JSON object.")
def push(folder: Path, repository: str, public: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Upload the run, adapter, model or GGUF file in DIR to the repository REPO of the Hub, such as you/model.

    Shows first what goes and what stays: rows, logs, checkpoints, code, secrets, paths of this machine.
    Writes a model card where there is none. The Hub's token is that of `hf auth login` or HF_TOKEN.
    """
    import json
    import sys

    from mlxsft.errors import UsageError
    from mlxsft.models.push import plan_push
    from mlxsft.models.push import push as push_folder
    from mlxsft.terminal import printable

    plan = plan_push(folder, repository)
    facts = {"repository": repository, "files": dict(plan.sizes), "left_out": dict(plan.left_out)}
    if dry_run:
        click.echo(json.dumps(facts, ensure_ascii=False) if as_json else printable(plan.listing()))
        return
    click.echo(printable(plan.listing()), err=as_json)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("nobody can be asked whether this may go", "Read the list, then give --yes.")
        click.confirm(f"Upload these to {repository}?", abort=True, err=True)
    done = push_folder(plan, private=not public)
    url = {"url": done.url, "commit": done.commit}
    click.echo(json.dumps({**facts, **url}, ensure_ascii=False) if as_json else f"{done.url} at {done.commit[:12]}")
