"""How the ranks of a run are started: on this machine, or over ssh on the hosts of mlx.launch's hosts.json.

Every rank gets the variables of MLX's ring, as mlx.launch sets them; mlx.launch itself is not used, because it ends
with exit code 0 when a rank fails. Ranks on other hosts were not tried: the command for ssh is written as mlx.launch
has it, and needs the same Python, package, checkpoint and rows at the same paths there.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.training.supervisor import Launch, worker_command

_FIRST_PORT = 32323  # mlx.launch's
_HERE = ("127.0.0.1", "localhost")
_EXAMPLE = 'Expected [{"ssh": "mac-1", "ips": ["10.0.0.1"]}, …], as mlx.launch reads it.'


@dataclass(frozen=True)
class Host:
    """Where one rank runs, and the addresses at which its neighbours in the ring reach it."""

    ssh: str
    ips: tuple[str, ...]

    @property
    def is_here(self) -> bool:
        return self.ssh in _HERE


def local_hosts(ranks: int) -> list[Host]:
    return [Host(_HERE[0], (_HERE[0],))] * ranks


def read_hosts(path: Path) -> tuple[list[Host], dict[str, str]]:
    """The hosts of a hosts.json, and the variables that it sets for all of them. Raises UsageError for another file."""
    try:
        given: Any = json.loads(path.read_text(encoding="utf-8"))
        given = given if isinstance(given, dict) else {"hosts": given}
        hosts = [Host(str(h["ssh"]), tuple(map(str, h.get("ips", ())))) for h in given["hosts"]]
        variables = dict(str(v).split("=", 1) for v in given.get("envs", ()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: no list of hosts: {error!r}", _EXAMPLE) from error
    if given.get("backend", "ring") not in ("", "ring"):
        hint = f"For others: mlx.launch --backend {given['backend']} --hostfile {path} -- mlxsft train …"
        raise UsageError(f"{path}: backend {given['backend']!r}; mlxsft starts ranks in a ring", hint)
    if not hosts:
        raise UsageError(f"{path}: there is no host", _EXAMPLE)
    if missing := [host.ssh for host in hosts if not host.ips]:
        raise UsageError(f"{path}: no ips for {', '.join(missing)}; the ring needs addresses", _EXAMPLE)
    return hosts, variables


@contextmanager
def launcher(hosts: list[Host], variables: Mapping[str, str]) -> Iterator[Callable[[], list[Launch]]]:
    """What says how the ranks are started, at every start anew; the files that they read last as long as this."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="mlxsft-ranks-")))

        def launches() -> list[Launch]:
            ring = json.dumps(addresses(hosts)) if len(hosts) > 1 else ""  # one rank is no ring, says mlx.launch too
            (folder / "ring.json").write_text(ring, encoding="utf-8")
            return [_launch(rank, host, ring, folder / "ring.json", variables) for rank, host in enumerate(hosts)]

        yield launches


def addresses(hosts: list[Host]) -> list[list[str]]:
    """Where every rank listens, `address:port`: mlx.launch's ports, or free ones where all ranks are here."""
    needed = sum(len(host.ips) for host in hosts)
    here = all(host.is_here for host in hosts)
    ports = iter(_free_ports(needed) if here else range(_FIRST_PORT, _FIRST_PORT + needed))
    return [[f"{ip}:{next(ports)}" for ip in host.ips] for host in hosts]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((_HERE[0], 0))
        return [each.getsockname()[1] for each in sockets]


def _launch(rank: int, host: Host, ring: str, ring_file: Path, variables: Mapping[str, str]) -> Launch:
    if host.is_here:
        given = {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(ring_file)} if ring else {}
        return Launch(worker_command(), {**os.environ, **variables, **given})
    return Launch(ssh_command(rank, host, ring, variables), os.environ)


def ssh_command(rank: int, host: Host, ring: str, variables: Mapping[str, str]) -> list[str]:
    """What starts a rank on another host, in this folder where it exists there; stdin and stdout are the worker's."""
    exports = "".join(f"export {name}={shlex.quote(value)}; " for name, value in variables.items())
    script = (
        f"cd {shlex.quote(os.getcwd())} 2>/dev/null; {exports}"
        f"ring=$(mktemp); echo {shlex.quote(ring)} >$ring; export MLX_HOSTFILE=$ring MLX_RANK={rank}; "
        f"exec {shlex.join([sys.executable, '-P', '-m', 'mlxsft.training.worker'])}"
    )
    return ["ssh", "-T", "-o", "LogLevel=QUIET", host.ssh, f"bash -c {shlex.quote(script)}"]
