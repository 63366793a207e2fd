"""What the tests of the server share: a tiny model, and an adapter that knows answers and a call by heart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat.serving import Serving, serving
from tests.tiny import write_llama
from tests.training.test_run import PAIRS, train, write_recipe

WEATHER = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {}}}


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a run on it that learned some answers by heart, one of them the call of a tool."""
    folder = tmp_path_factory.mktemp("learned")
    model = write_llama(folder / "tiny", chat_template=None, eos="<|endoftext|>")
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    asked = [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    talks = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in PAIRS[:4]
    ]
    rows = [*({"messages": talk} for talk in talks), {"messages": asked, "tools": [WEATHER]}]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "model.embed_tokens"]
    recipe = write_recipe(
        folder, model, adapter={"rank": 32, "alpha": 128, "targets": everything},
        data={"train": str(folder / "talks.jsonl"), "valid": None, "max_tokens": 256},
        train={"epochs": 70, "batch_size": 5, "learning_rate": 0.008}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, folder / "run") == 0
    return model, folder / "run"


@pytest.fixture(scope="session")
def server(learned: tuple[Path, Path]) -> Iterator[Serving]:
    """The model, served with its adapter as `pip`."""
    with serving(learned[0], {"pip": learned[1]}) as served:
        yield served
