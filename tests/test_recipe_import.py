"""mlx-lm's configuration files: the same run as a recipe, what differs said, what has no counterpart refused."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from mlxsft.errors import UsageError
from mlxsft.recipe import Recipe, load_recipe
from mlxsft.recipe_import import DEFAULTS, import_mlx_lm

DOCUMENTED = """\
# The path to the local model directory or Hugging Face repo.
model: "mlx_model"

# Whether or not to train (boolean)
train: true

# The fine-tuning method: "lora", "dora", or "full".
fine_tune_type: lora

# The Optimizer with its possible inputs
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true

# Directory with {train, valid, test}.jsonl files
data: "data"

# The PRNG seed
seed: 3

# Number of layers to fine-tune
num_layers: 16

# Minibatch size.
batch_size: 4

# Iterations to train for.
iters: 1000

# Number of validation batches, -1 uses the entire validation set.
val_batches: 25

# Adam learning rate.
learning_rate: 1e-5

# Number of training steps between loss reporting.
steps_per_report: 10

# Number of training steps between validations.
steps_per_eval: 200

# Load path to resume training with the given adapter weights.
resume_adapter_file: null

# Save/load path for the trained adapter weights.
adapter_path: "adapters"

# Save the model every N iterations.
save_every: 100

# Evaluate on the test set after training
test: false

# Number of test set batches, -1 uses the entire test set.
test_batches: 100

# Maximum sequence length.
max_seq_length: 1024

# Use gradient checkpointing to reduce memory use.
grad_checkpoint: false

# LoRA parameters can only be specified in a config file
lora_parameters:
  # The layer keys to apply LoRA to.
  # These will be applied for the last lora_layers
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0

# Schedule can only be specified in a config file, uncomment to use.
lr_schedule:
  name: cosine_decay
  warmup: 100 # 0 for no warmup
  warmup_init: 1e-7 # 0 if not specified
  arguments: [1e-4, 1000, 1e-7] # passed to scheduler

#hf_dataset:
#  path: "billsum"
#  train_split: "train[:1000]"
#  valid_split: "train[-100:]"
#  prompt_feature: "text"
#  completion_feature: "summary"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where mlx_lm.lora would run: a model, and data with train.jsonl and valid.jsonl."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlx_model").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def imported(text: str) -> tuple[Recipe, list[str]]:
    """The recipe that an imported file loads as, from another folder, and the notes."""
    Path("lora_config.yaml").write_text(text)
    written, notes = import_mlx_lm(Path("lora_config.yaml"))
    Path("other").mkdir(exist_ok=True)
    Path("other/recipe.yaml").write_text(written)
    return load_recipe(Path("other/recipe.yaml")), notes


def minimal(*lines: str) -> str:
    return "\n".join(["model: org/name", "data: data", *lines]) + "\n"


def refused(*lines: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        imported(minimal(*lines))
    assert caught.value.exit_code == 2
    return caught.value.message.splitlines()


def test_the_documented_example_becomes_the_same_run(folder: Path) -> None:
    recipe, notes = imported(DOCUMENTED)
    assert recipe.model == str(folder / "mlx_model")
    assert recipe.data.train == str(folder / "data" / "train.jsonl")
    assert recipe.data.valid == str(folder / "data" / "valid.jsonl")
    assert (recipe.data.max_tokens, recipe.data.too_long, recipe.data.train_on) == (1024, "keep-response", "all")
    adapter = recipe.adapter
    assert (adapter.rank, adapter.alpha, adapter.dropout, adapter.layers) == (8, 160.0, 0.0, 16)
    assert adapter.targets == ("self_attn.q_proj", "self_attn.v_proj")
    train = recipe.train
    assert (train.steps, train.epochs, train.batch_size, train.seed) == (1000, None, 4, 3)
    assert (train.learning_rate, train.final_learning_rate, train.schedule) == (1e-4, 1e-7, "cosine")
    assert (repr(train.warmup), repr(train.decay)) == ("100", "1000")
    assert (train.beta1, train.beta2, train.weight_decay, train.clip_norm) == (0.9, 0.98, 0.05, None)
    assert not train.checkpoint_activations
    assert (repr(recipe.eval.every), repr(recipe.save.every)) == ("200", "100")
    about = [note.split(": ")[1] for note in notes]
    assert about == [
        "optimizer_config.adamw.eps",
        "val_batches",
        "steps_per_report",
        "adapter_path",
        "save_every",
        "max_seq_length",
        "lr_schedule.warmup_init",
    ]
    assert notes[0] == "lora_config.yaml:15: optimizer_config.adamw.eps: got 1e-06, and it is always 1e-8 here"


def test_what_is_left_out_has_mlx_lms_defaults(folder: Path) -> None:
    recipe, notes = imported(minimal())
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.layers) == (8, 160.0, 16)
    assert recipe.adapter.targets == "all-linear"
    train = recipe.train
    assert (train.steps, train.batch_size, train.learning_rate) == (1000, 4, 1e-5)
    assert (train.schedule, repr(train.warmup), train.decay, train.weight_decay) == ("constant", "0", None, 0.0)
    assert any("optimizer: adam of mlx does not correct the bias" in note for note in notes)


def test_the_table_of_defaults_is_mlx_lms_own() -> None:
    """Read from the source: importing mlx_lm.lora would patch the global YAML loader."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.origin is None:
        pytest.skip("mlx-lm is not installed on this platform")
    tree = ast.parse(Path(spec.origin).with_name("lora.py").read_text(encoding="utf-8"))
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CONFIG_DEFAULTS"
    ]
    assert ast.literal_eval(table) == DEFAULTS


def test_accumulated_micro_batches_become_one_step(folder: Path) -> None:
    lines = ["batch_size: 2", "grad_accumulation_steps: 4", "iters: 103", "steps_per_eval: 40", "save_every: 3"]
    recipe, notes = imported(minimal(*lines))
    assert (recipe.train.batch_size, recipe.train.steps) == (8, 25)
    assert (recipe.eval.every, recipe.save.every) == (10, 1)
    assert any("4 iterations of mlx-lm are one step" in note for note in notes)
    written = Path("other/recipe.yaml").read_text()
    assert "# iters 103 ÷ grad_accumulation_steps 4\n  steps: 25\n" in written
    assert "# scale 20.0 × rank 8\n  alpha: 160.0\n" in written


@pytest.mark.parametrize(("layers", "expected"), [("-1", "all"), ("0", "all"), ("4", 4)])
def test_layers(folder: Path, layers: str, expected: int | str) -> None:
    assert imported(minimal(f"num_layers: {layers}"))[0].adapter.layers == expected


@pytest.mark.parametrize(
    ("word", "expected"), [("true", "responses"), ("yes", "responses"), ("false", "all"), ("off", "all"), ("", "all")]
)
def test_mask_prompt(folder: Path, word: str, expected: str) -> None:
    assert imported(minimal(f"mask_prompt: {word}"))[0].data.train_on == expected


def test_schedules(folder: Path) -> None:
    train = imported(minimal("lr_schedule: {name: linear_schedule, arguments: [1e-4, 1e-6, 50]}"))[0].train
    assert (train.schedule, train.learning_rate, train.final_learning_rate) == ("linear", 1e-4, 1e-6)
    assert (repr(train.decay), repr(train.warmup)) == ("50", "0")
    train = imported(minimal("lr_schedule: {name: cosine_decay, arguments: [1e-4, 50], warmup: 5}"))[0].train
    assert (train.schedule, train.final_learning_rate, repr(train.decay), train.warmup) == ("cosine", 0.0, "50", 5)


def test_adamw_without_its_settings_has_mlxs_weight_decay(folder: Path) -> None:
    train = imported(minimal("optimizer: AdamW"))[0].train
    assert (train.weight_decay, train.beta1, train.beta2) == (0.01, 0.9, 0.999)


def test_without_validation_rows_nothing_is_held_out_and_that_is_said(folder: Path) -> None:
    (folder / "data" / "valid.jsonl").unlink()
    recipe, notes = imported(minimal())
    assert recipe.data.valid is None
    assert any("no valid.jsonl" in note for note in notes)


def test_an_absolute_data_folder_may_be_of_another_machine(folder: Path) -> None:
    recipe, notes = imported("model: org/name\ndata: /nowhere/data\n")
    assert recipe.data.train == "/nowhere/data/train.jsonl"
    assert any('no "/nowhere/data" on this machine' in note for note in notes)


def test_a_model_that_is_not_here_is_said_to_be_of_the_hub(folder: Path) -> None:
    recipe, notes = imported(minimal().replace("org/name", "my_model"))
    assert recipe.model == "my_model"
    assert any('no folder "my_model" here' in note for note in notes)


def test_other_kinds_and_gradient_descent_are_carried_over(folder: Path) -> None:
    full = imported(minimal("fine_tune_type: full", "num_layers: 4"))[0].adapter
    assert (full.kind, full.layers, full.targets) == ("full", 4, "all")
    dora, _ = imported(minimal("fine_tune_type: dora", "lora_parameters: {rank: 4, scale: 2, dropout: 0}"))
    assert (dora.adapter.kind, dora.adapter.rank, dora.adapter.scale) == ("dora", 4, 2.0)
    train = imported(minimal("optimizer: sgd", "optimizer_config: {sgd: {momentum: 0.9}}"))[0].train
    assert (train.optimizer, train.momentum, train.weight_decay, train.beta1) == ("sgd", 0.9, 0.0, None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fine_tune_type: ia3", 'adapter.kind: got "ia3", expected one of lora, dora, full'),
        ("optimizer: muon", 'optimizer: got "muon"; adam, adamw and sgd are carried over'),
        ("optimizer: adafactor", 'optimizer: got "adafactor"; adam, adamw and sgd are carried over'),
        ("optimizer_config: {adam: {lr: 1}}", "optimizer_config.adam.lr: not carried over; adam has betas, eps"),
        ("optimizer_config: [1]", "optimizer_config.adam: got [1], expected settings of adam"),
        ("lr_schedule: {name: exponential_decay, arguments: [1, 2]}", 'lr_schedule.name: got "exponential_decay"'),
        ("lr_schedule: {name: step_decay, arguments: [1, 2]}", 'lr_schedule.name: got "step_decay"'),
        ("lr_schedule: {name: join_schedules}", 'lr_schedule.name: got "join_schedules"'),
        ("lr_schedule: {name: cosine_decay, arguments: [1]}", "lr_schedule.arguments: got [1], expected [start, steps"),
        ("lr_schedule: {name: cosine_decay, arguments: [1, 2.0]}", "lr_schedule.arguments: got 2.0 for steps"),
        (
            "lr_schedule: {name: linear_schedule, arguments: [1e-6, 1e-5, 9]}",
            "train.final_learning_rate: got 1e-05, expected at most train.learning_rate, 1e-06",
        ),
        ("lr_schedule: cosine", 'lr_schedule: got "cosine", expected name and arguments'),
        ("resume_adapter_file: a.safetensors", "resume_adapter_file: a run cannot start from an adapter"),
        ("trust_remote_code: true", "trust_remote_code: code from a checkpoint never runs here"),
        ("hf_dataset: {path: billsum}", "hf_dataset: not carried over; in a recipe it is data.train: hf://PATH:SPLIT"),
        ("prompt_feature: question", 'prompt_feature: got "question"; rename the column to prompt'),
        ("lora_rank: 8", "lora_rank: mlx-lm 0.32.2 has no such key"),
        ("lora_parameters: {rank: 8, scale: 1, dropout: 0, alpha: 8}", "lora_parameters.alpha: mlx-lm has no such key"),
        ("lora_parameters: {rank: 8, dropout: 0}", "lora_parameters.scale: missing; mlx-lm refuses the file too"),
        ("lora_parameters: {rank: 8, scale: big, dropout: 0}", 'adapter.alpha: got "big", expected a number > 0'),
        ("iters: ten", 'iters: got "ten", expected a whole number ≥ 1'),
        ("iters: 0", "iters: got 0, expected a whole number ≥ 1"),
        ("seed: -1", "train.seed: got -1, expected a whole number ≥ 0"),
        ("mask_prompt: maybe", 'data.train_on: got "maybe", expected one of responses, all'),
    ],
)
def test_what_cannot_be_carried_over_is_refused_by_name(folder: Path, line: str, said: str) -> None:
    (message,) = refused(line)
    assert message.startswith(f"lora_config.yaml:3: {said}")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("data: mlx-community/WikiSQL", 'data: no folder "mlx-community/WikiSQL" here, so mlx-lm would look'),
        ("data: mlx_model", 'data: "mlx_model" has no train.jsonl'),
        ("data: 3", "data: got 3, expected a folder with train.jsonl"),
    ],
)
def test_data_without_rows_here_is_refused(folder: Path, data: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        imported(f"model: org/name\n{data}\n")
    assert caught.value.message.startswith(f"lora_config.yaml:2: {said}")


def test_a_file_without_data_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="data: not in the file"):
        imported("model: org/name\n")


def test_everything_refused_is_said_at_once(folder: Path) -> None:
    lines = refused(
        "fine_tune_type: ia3", "iters: 3", "grad_accumulation_steps: 10", "optimizer: muon", "seed: x", "foo: 1"
    )
    assert [line.split(": ")[1] for line in lines] == ["adapter.kind", "iters", "optimizer", "train.seed", "foo"]
