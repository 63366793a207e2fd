"""What this machine is, in words that identify nobody: no host, no user, no path."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, without importing it; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def chip() -> str:
    """The name of the processor, or its architecture where the system does not tell one."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    elif sys.platform == "linux":
        name = _of_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    else:
        name = platform.processor()
    return " ".join(name.split()) or platform.machine()


def _of_cpuinfo(text: str) -> str:
    """The value of the first `model name`, which the kernels of some architectures do not write."""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value for name, _, value in lines if name.strip() == "model name"), "")


def core_count() -> int:
    """How many cores this process may compute on; of two threads that share a core, one counts."""
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return min(physical or logical, allowed)


def memory_bytes() -> int:
    """All the memory of this machine."""
    return int(psutil.virtual_memory().total)


def operating_system() -> str:
    """Name, version and architecture, as in `macOS 15.1 arm64`."""
    if sys.platform == "darwin":
        name = f"macOS {platform.mac_ver()[0]}"
    elif sys.platform == "linux":
        try:
            name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
        except OSError:
            name = "Linux"
    else:
        name = f"{platform.system()} {platform.release()}"
    return f"{name} {platform.machine()}"


def peak_resident_bytes() -> int:
    """The most memory that this process has had."""
    try:
        import resource
    except ImportError:  # Windows
        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if psutil.MACOS else int(peak) * 1024
