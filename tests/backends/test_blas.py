"""The fast BLAS: found, loaded before MLX, and used by it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from mlxsft.backends import blas

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")

RATE = "from mlxsft.backends import mlx; print(mlx.matmul_rate(0.2)); print(mlx.BLAS, mlx.BLAS_HINT)"


def python(code: str, choice: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, blas.VARIABLE: choice}, capture_output=True, text=True
    )


@pytest.fixture
def openblas() -> str:
    """The name of OpenBLAS; the test is skipped where it is not installed."""
    for name in blas.OPENBLAS:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    pytest.skip("OpenBLAS is not installed")


@linux
def test_it_makes_mlx_at_least_five_times_faster(openblas: str) -> None:
    """No clock test: it is 30 to 70 times, on two cores that do nothing else."""
    fast, slow = python(RATE, openblas), python(RATE, "off")
    assert "OpenBLAS" in fast.stdout
    assert float(fast.stdout.split()[0]) > 5 * float(slow.stdout.split()[0])
    assert "MLXSFT_BLAS is off" in slow.stdout


@linux
def test_it_is_found_without_being_named(openblas: str) -> None:
    found = python("from mlxsft.backends.blas import load_blas; print(load_blas())")
    assert "path='/" in found.stdout
    assert found.stdout.rstrip().endswith(", None)")


@linux
def test_after_mlx_it_is_too_late() -> None:
    late = python("import mlx.core; from mlxsft.backends.blas import load_blas; print(load_blas())")
    assert late.stdout.startswith("(None, 'MLX was imported before mlxsft")


@linux
@pytest.mark.parametrize(
    ("choice", "message"), [("/nowhere/libblas.so", "cannot be loaded"), ("libm.so.6", "has no cblas_sgemm")]
)
def test_a_choice_that_is_none(choice: str, message: str) -> None:
    refused = python("from mlxsft.backends import mlx", choice)
    assert refused.returncode == 1
    assert f"UsageError: MLXSFT_BLAS: {choice}" in refused.stderr
    assert message in refused.stderr


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "ubuntu", "ID_LIKE": "debian"}, "apt-get install -y libopenblas0-pthread"),
        ({"ID": "debian"}, "apt-get install -y libopenblas0-pthread"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "dnf install -y openblas-threads"),
        ({"ID": "opensuse-leap", "ID_LIKE": "suse opensuse"}, "zypper install -y libopenblas_pthreads0"),
        ({"ID": "arch"}, "pacman -S --noconfirm openblas"),
    ],
)
def test_the_install_command_is_the_distributions(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str
) -> None:
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: release)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert blas.install_command().removeprefix("sudo ") == command
    monkeypatch.setenv("CONDA_PREFIX", "/opt/conda")
    assert blas.install_command().startswith("conda install")
