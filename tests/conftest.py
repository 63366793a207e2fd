"""What the tests share: the real material beside the checkout, where there is any."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import Hub, serving
from tests.tiny import write_llama

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network; those with a local Hub say so
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

os.environ["MLXSFT_CACHE"] = tempfile.mkdtemp(prefix="mlxsft-tests-")  # no test reads what an earlier run kept

# The processes that tests start are many, and need not each compile the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A shell without job control starts what runs in its background deaf to Ctrl-C, and so would be what tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

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


@pytest.fixture(scope="session")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a run on it that learned ten answers by heart."""
    from tests.training.test_run import train, write_recipe

    folder = tmp_path_factory.mktemp("tuned")
    model = write_llama(folder / "model")
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "model.embed_tokens"]
    recipe = write_recipe(
        folder, model, adapter={"rank": 32, "alpha": 128, "targets": everything},
        train={"epochs": 120, "batch_size": 4, "learning_rate": 0.005}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, folder / "run") == 0
    return model, folder / "run"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub of ours on this machine."""
    with serving() as hub:
        yield hub
