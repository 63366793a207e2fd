"""Where things are kept between runs that can be made again at any time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MLXSFT_CACHE, or mlxsft in the user's cache folder; it may not be there yet."""
    if folder := os.environ.get("MLXSFT_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxsft"
