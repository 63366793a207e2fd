"""The seam: who may open a backend."""

from __future__ import annotations

import pytest

from mlxsft.backends import load_backend
from mlxsft.errors import UsageError


def test_unknown_backend_is_refused(llama: object) -> None:
    with pytest.raises(UsageError, match="'tpu'"):
        load_backend("tpu", llama)  # type: ignore[arg-type]  # never looked at
