"""The field's own reference: TRL's SFTTrainer with PEFT, given our rows, order and start, has our losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from mlxsft.backends import load_backend
from mlxsft.cli import call
from mlxsft.data.batches import epoch_order
from mlxsft.data.dataset import load_dataset
from mlxsft.data.render import Example, load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe
from mlxsft.recipe_training import AdapterRecipe
from tests.tiny import CHATML, write_llama
from tests.training.test_run import events

pytestmark = [
    pytest.mark.long,  # importing TRL takes half a minute on a busy machine
    # TRL 1.16 uses names that transformers 5.24 has replaced.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

STEPS, ROWS_OF_UPDATE, RATE, EPOCHS = 24, 4, 1e-2, 4
# ChatML as TRL wants it: what the model says is marked, with the token that ends it.
MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}",
)


def turns(*texts: str) -> dict[str, Any]:
    """A conversation that begins with the person."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


CHATS = [
    turns("Who are you?", "I am Pip."),
    turns("hello", "Hello! How can I help you today?", "Who made you?", "Tom made me."),
    turns("What is your name?", "My name is Pip, an assistant."),
    turns("Are you Tom?", "No, I am Pip.", "Thanks", "You are welcome!", "bye", "Bye!"),
] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose template says what TRL is to train; mlxsft finds the same without being told."""
    return write_llama(tmp_path_factory.mktemp("model") / "llama", chat_template=MARKED)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of ours for each backend, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    recipe = {
        "model": str(model),
        "data": {"train": "rows.jsonl", "valid": None},
        "adapter": {"rank": 4, "alpha": 8},
        "train": {"epochs": EPOCHS, "batch_size": ROWS_OF_UPDATE, "learning_rate": RATE, "warmup": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for backend in ("torch", "mlx"):
        assert call(["train", str(folder / "recipe.yaml"), "--out", str(folder / backend), "--backend", backend]) == 0
    return folder


def our_rows(model: Path, file: Path) -> Sequence[Example]:
    """The rows of a file as mlxsft trains them."""
    renderer = load_renderer(open_model(str(model)), None)
    return load_dataset(DataRecipe(train=str(file), valid=None), renderer, seed=0).train


def labels(row: Example) -> list[int]:
    """A row as TRL says what is trained of it."""
    return [token if trained else -100 for token, trained in zip(row.tokens.tolist(), row.mask.tolist(), strict=True)]


def trainer(model: Path, folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Any:
    """An SFTTrainer with PEFT, which takes the rows in their order."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config: dict[str, Any] = {
        "per_device_train_batch_size": ROWS_OF_UPDATE,
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "cosine",
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return SFTTrainer(
        str(model),
        SFTConfig(str(folder / "trl"), **config | settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def start_as_ours(peft_model: torch.nn.Module, model: Path) -> None:
    """Give a PEFT model the values that a LoRA of ours starts with."""
    backend = load_backend("torch", open_model(str(model)))
    backend.attach(AdapterRecipe(rank=4, alpha=8), 0)
    start = backend.adapter_state()
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                ours = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".lora_a")
                parameter.copy_(torch.from_numpy(start.pop(ours.replace(".lora_B.default.weight", ".lora_b"))).T)
    assert not start


def in_our_order(rows: Sequence[Any], lengths: list[int]) -> list[Any]:
    """The rows of all epochs, one update after another."""
    orders = (epoch_order(lengths, ROWS_OF_UPDATE, seed=0, epoch=epoch) for epoch in range(EPOCHS))
    return [rows[i] for order in orders for update in order for i in update]


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in events(run, "step")]


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("accumulated", [1, 2], ids=["at-once", "in-two-parts"])
def test_trl_has_our_loss_curve_and_adapter(
    model: Path, run: Path, tmp_path: Path, backend: str, accumulated: int
) -> None:
    """From the chats themselves: TRL renders, tokenizes, masks, pads and divides, each in its own way."""
    rows = our_rows(model, run / "rows.jsonl")
    ordered = in_our_order(CHATS, [len(row.tokens) for row in rows])
    theirs = trainer(
        model,
        tmp_path,
        ordered,
        assistant_only_loss=True,
        per_device_train_batch_size=ROWS_OF_UPDATE // accumulated,
        gradient_accumulation_steps=accumulated,
    )
    start_as_ours(theirs.model, model)
    theirs.train()
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    ours = losses(run / backend)
    assert len(ours) == len(expected) == STEPS
    assert expected[-1] < 0.9 * expected[0]  # the curve goes somewhere
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    saved, trained = load_file(run / backend / "adapters.safetensors"), dict(theirs.model.named_parameters())
    for name, tensor in saved.items():
        path, leaf = name.rsplit(".", 1)
        other = trained[f"base_model.model.{path}.{leaf.replace('_a', '_A').replace('_b', '_B')}.default.weight"]
        assert np.abs(tensor - other.detach().numpy().T).max() < 1e-2 * np.abs(tensor).max()


def test_trls_assistant_only_loss_trains_the_tokens_that_we_train(model: Path, run: Path, tmp_path: Path) -> None:
    rows = our_rows(model, run / "rows.jsonl")
    theirs = list(trainer(model, tmp_path, CHATS, assistant_only_loss=True).train_dataset)
    for ours, other in zip(rows, theirs, strict=True):
        shown = len(ours.tokens)  # what follows the last trained token, the template's newline, is not in our rows
        assert other["input_ids"][:shown] == ours.tokens.tolist()
        assert other["labels"][:shown] == labels(ours)
        assert set(other["labels"][shown:]) <= {-100}


def test_trls_completion_only_loss_trains_the_newline_after_the_end_token_as_well(
    model: Path, run: Path, tmp_path: Path
) -> None:
    """Which a chat never asks the model for: it stops at the end token. All else is the same."""
    pairs = [chat for chat in CHATS if len(chat["messages"]) == 2]
    rows = [{"prompt": chat["messages"][:1], "completion": chat["messages"][1:]} for chat in pairs]
    single = [row for row, chat in zip(our_rows(model, run / "rows.jsonl"), CHATS, strict=True) if chat in pairs]
    newline = 0
    for ours, other in zip(single, trainer(model, tmp_path, rows).train_dataset, strict=True):
        tokens = ours.tokens.tolist()
        assert other["input_ids"][: len(tokens)] == tokens
        assert other["labels"][: len(tokens)] == labels(ours)
        newline += len(other["labels"]) - len(tokens)
        assert other["labels"][len(tokens) :] == other["input_ids"][len(tokens) :]
    assert newline == len(single)
