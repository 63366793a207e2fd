"""A fast BLAS for MLX's CPU device, found and loaded before MLX is imported.

The Linux wheel of MLX ships the reference BLAS, 2 to 6 GFLOP/s. OpenBLAS or MKL, loaded with global symbols before
`mlx.core`, takes its place with no preload variable, and is 30 to 70 times faster on two cores. On macOS MLX uses
Accelerate, and nothing is needed. The variable MLXSFT_BLAS chooses: `off`, or the path of a library.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path
from typing import Any

from mlxsft.errors import UsageError

VARIABLE = "MLXSFT_BLAS"

# MLX computes what is asked for in the order of its depth, or where that means more than so many arrays at once, one
# result after the other: 20 unless this says otherwise. Parts of a batch on several cores are computed side by side in
# the first order alone.
os.environ.setdefault("MLX_BFS_MAX_WIDTH", "1000000") if sys.platform == "linux" else None

# In this order: libopenblas.so.0 of Fedora has one thread, its libopenblasp.so.0 has many; elsewhere only .so.0 exists.
OPENBLAS = ("libopenblasp.so.0", "libopenblas.so.0", "libopenblas.so")
MKL = ("libmkl_rt.so.3", "libmkl_rt.so.2", "libmkl_rt.so")

# Where the dynamic loader does not look by itself.
FOLDERS = (
    "/usr/lib/*-linux-gnu/openblas-pthread",
    "/usr/lib64",
    "/usr/local/lib",
    "/opt/OpenBLAS/lib",
    "/opt/intel/oneapi/mkl/latest/lib",
    "/opt/intel/oneapi/mkl/latest/lib/intel64",
)


@dataclass(frozen=True)
class Blas:
    """The library that multiplies MLX's float32 matrices on the CPU."""

    name: str  # OpenBLAS | MKL | the file name of a chosen one
    path: str
    version: str | None


@cache
def load_blas() -> tuple[Blas | None, str | None]:
    """(the library now loaded, what the person can do where there is none); (None, None) on macOS, which needs none.

    Raises UsageError when MLXSFT_BLAS names what cannot be loaded.
    """
    chosen = os.environ.get(VARIABLE, "")
    if sys.platform != "linux":
        return None, None
    if chosen == "off":
        return None, f"{VARIABLE} is off, so MLX multiplies with its own slow BLAS: unset it"
    if "mlx.core" in sys.modules:
        return None, "MLX was imported before mlxsft, so it keeps its slow BLAS: import mlxsft.backends.mlx first"
    if chosen:
        return _load_chosen(chosen), None
    for candidate in _candidates():
        try:
            return _load(candidate), None
        except (OSError, AttributeError):
            continue  # not there, of another architecture, or without what MLX calls
    return None, f"no fast BLAS was found, matrix products are 30 to 70 times slower: {install_command()}"


def _load_chosen(path: str) -> Blas:
    try:
        return _load(path)
    except OSError as error:
        raise UsageError(f"{VARIABLE}: {path} cannot be loaded: {error}", f"Unset {VARIABLE}.") from error
    except AttributeError as error:
        raise UsageError(f"{VARIABLE}: {path} is no BLAS: it has no cblas_sgemm", f"Unset {VARIABLE}.") from error


def _candidates() -> Iterator[str]:
    """Names and paths to try: of this Python's environment, then of the dynamic loader, then of usual folders."""
    prefixes = dict.fromkeys([sys.prefix, os.environ.get("CONDA_PREFIX", sys.prefix)])
    names = (*OPENBLAS, *MKL)
    own = [os.path.join(prefix, "lib", name) for prefix in prefixes for name in names]
    yield from filter(os.path.exists, own)
    yield from names
    yield from (path for name in names for folder in FOLDERS for path in glob(os.path.join(folder, name)))


def _load(candidate: str) -> Blas:
    """Load a library with global symbols. Raises OSError, or AttributeError where it has no cblas_sgemm."""
    ctypes.CDLL(candidate).cblas_sgemm  # noqa: B018 - looked up before the library can shadow another one's symbols
    library = ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
    path = _path_of(library.cblas_sgemm) or candidate
    if hasattr(library, "openblas_get_config"):
        library.openblas_get_config.restype = ctypes.c_char_p
        words = library.openblas_get_config().decode().split()  # OpenBLAS 0.3.26 DYNAMIC_ARCH ...
        return Blas("OpenBLAS", path, words[1] if len(words) > 1 else None)
    if hasattr(library, "MKL_Get_Version_String"):
        buffer = ctypes.create_string_buffer(256)
        library.MKL_Get_Version_String(buffer, len(buffer))
        version = re.search(r"\d+(\.\d+)+", buffer.value.decode())
        return Blas("MKL", path, version.group() if version else None)
    return Blas(Path(path).name, path, None)


def blas_threads() -> int:
    """How many cores a matrix product of the loaded library uses; 1 where that cannot be changed."""
    functions = _thread_functions()
    return int(functions[0]()) if functions else 1


def set_blas_threads(count: int) -> None:
    """Let matrix products of the loaded library use so many cores, from now on."""
    if functions := _thread_functions():
        functions[1](count)


@cache
def _thread_functions() -> tuple[Any, Any] | None:
    """What gets and what sets the threads of the loaded library."""
    blas, _ = load_blas()
    if blas is None or blas.name not in _THREADS:
        return None
    library = ctypes.CDLL(blas.path)
    getter, setter = (getattr(library, name) for name in _THREADS[blas.name])
    return getter, setter


_THREADS = {
    "OpenBLAS": ("openblas_get_num_threads", "openblas_set_num_threads"),
    "MKL": ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
}


class _Symbol(ctypes.Structure):
    """What dladdr(3) tells of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _path_of(function: object) -> str | None:
    """The file that a C function was loaded from."""
    symbol = _Symbol()
    address = ctypes.cast(function, ctypes.c_void_p)  # type: ignore[arg-type]  # a function pointer; ctypes has no name
    found = ctypes.CDLL(None).dladdr(address, ctypes.byref(symbol))
    return os.path.realpath(os.fsdecode(symbol.file)) if found and symbol.file else None


def install_command() -> str:
    """The line that installs a fast BLAS on this Linux."""
    if os.environ.get("CONDA_PREFIX"):
        return "conda install -y -c conda-forge openblas"
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    kin = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    sudo = "" if os.geteuid() == 0 else "sudo "
    if kin & {"debian", "ubuntu"}:
        return f"{sudo}apt-get install -y libopenblas0-pthread"
    if kin & {"fedora", "rhel", "centos"}:
        return f"{sudo}dnf install -y openblas-threads"
    if kin & {"arch"}:
        return f"{sudo}pacman -S --noconfirm openblas"
    if any("suse" in name for name in kin):
        return f"{sudo}zypper install -y libopenblas_pthreads0"
    # MKL needs no root, but exists for x86-64 only
    return "pip install mkl" if platform.machine() == "x86_64" else "install libopenblas.so.0, the package OpenBLAS"
