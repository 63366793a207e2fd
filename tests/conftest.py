"""What the tests share: the real material beside the checkout, where there is any."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub, serving
from tests.tiny import write_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network; those with a local Hub say so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

os.environ["MLXSFT_CACHE"] = tempfile.mkdtemp(prefix="mlxsft-tests-")  # no test reads what an earlier run kept

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of real checkpoints, tokenizers and rows; the test is skipped where it is absent."""
    if not REAL.is_dir():
        pytest.skip("real checkpoints and rows are not beside this checkout")
    return REAL


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of a few ten thousand random parameters with a ChatML template."""
    return write_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub of ours on this machine."""
    with serving() as hub:
        yield hub
