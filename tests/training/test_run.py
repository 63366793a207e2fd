"""Whole runs, from a recipe to a run folder, as a person starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from safetensors.numpy import load_file

from mlxsft.cli import call, report
from mlxsft.errors import MlxsftError
from mlxsft.recipe import load_recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.events import Noted, from_json
from mlxsft.training.run import run_training
from tests.tiny import write_llama

PAIRS = [
    ("Who are you?", "I am Pip."),
    ("Who made you?", "Tom made me."),
    ("hello", "Hello! How can I help you today?"),
    ("What is your name?", "My name is Pip, an assistant."),
    ("Are you Tom?", "No, I am Pip."),
    ("Thanks", "You are welcome!"),
    ("bye", "Bye!"),
    ("Can you help me today?", "Yes, how can I help you?"),
    ("Is Tom here?", "No."),
    ("Say hello", "Hello!"),
]


def write_rows(path: Path, pairs: list[tuple[str, str]] = PAIRS) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    return path


def write_recipe(folder: Path, model: Path | str, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "model": str(model),
        "data": {"train": str(write_rows(folder / "rows.jsonl")), "valid": None, "max_tokens": 128},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "train": {"steps": 6, "batch_size": 4, "learning_rate": 0.01, "micro_batch_tokens": 96},
        "save": {"every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [from_json(line).to_json() for line in lines] == lines  # every line is an event of ours
    found = [json.loads(line) for line in lines]
    return [e for e in found if kind in (None, e["event"])]


def train(
    recipe: Path,
    out: Path,
    *overrides: str,
    backend: str = "auto",
    resume: bool = False,
    force: bool = False,
    allow_changes: Sequence[str] = (),
) -> int:
    """What `mlxsft train` does in a process of its own, in this one: the exit code."""
    try:
        told = run_training(
            load_recipe(recipe, overrides),
            RunFolder(out),
            backend_name=backend,
            resume=resume,
            force=force,
            allow_changes=allow_changes,
            stop=lambda: False,
            tell=print,
        )
        happened = list(told)
        assert happened
        for event in happened:
            if isinstance(event, Noted):
                print(event.message, file=sys.stderr)
    except MlxsftError as error:
        report(error)
        return error.exit_code
    return 0


def same_adapter(a: Path, b: Path) -> bool:
    return (a / "adapters.safetensors").read_bytes() == (b / "adapters.safetensors").read_bytes()


@pytest.fixture
def finished(tmp_path: Path, tiny_llama: Path) -> Path:
    """A finished run of six steps."""
    recipe = write_recipe(tmp_path, tiny_llama)
    assert train(recipe, tmp_path / "run") == 0
    return tmp_path / "run"


# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_a_run_folder_holds_recipe_lock_events_adapter_and_checkpoints(finished: Path) -> None:
    names = {p.name for p in finished.iterdir() if not p.name.startswith(".")}
    assert names == {
        "recipe.yaml", "lock.json", "events.jsonl", "adapters.safetensors", "adapter_config.json", "checkpoints",
    }  # fmt: skip
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step-0000004", "step-0000006"]
    lock = json.loads((finished / "lock.json").read_text())
    assert len(lock["base"]["sha256"]["model.safetensors"]) == 64
    assert len(next(iter(lock["data"].values()))) == 64
    assert {"mlxsft", "python", "numpy", "transformers"} <= set(lock["versions"])


def test_events_tell_every_step(finished: Path) -> None:
    kinds = [e["event"] for e in events(finished)]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    steps = events(finished, "step")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5, 6]
    assert all(s["loss"] > 0 and s["gradient_norm"] > 0 and s["peak_bytes"] > 0 for s in steps)
    assert all(0 < s["trained_tokens"] < s["tokens"] <= s["computed_tokens"] for s in steps)
    assert [e["step"] for e in events(finished, "save")] == [0, 2, 4, 6]  # a full disk is found before the first step
    ledger = events(finished, "start")[0]["ledger"]
    assert ledger == {"read": 10, "trained": 10, "held out": 0}


def test_the_resolved_recipe_reruns_as_it_is_to_the_same_adapter(finished: Path, tmp_path: Path) -> None:
    assert train(finished / "recipe.yaml", tmp_path / "again") == 0
    assert same_adapter(finished, tmp_path / "again")
    assert (finished / "recipe.yaml").read_bytes() == (tmp_path / "again" / "recipe.yaml").read_bytes()


def test_another_seed_gives_another_adapter(finished: Path, tmp_path: Path) -> None:
    assert train(finished / "recipe.yaml", tmp_path / "again", "train.seed=1") == 0
    assert not same_adapter(finished, tmp_path / "again")


def test_the_size_of_micro_batches_changes_nothing_but_the_rounding(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, adapter__dropout=0.0)
    for tokens in (1, 4096):
        assert train(recipe, tmp_path / f"run{tokens}", f"train.micro_batch_tokens={tokens}") == 0
    a, b = (load_file(tmp_path / f"run{tokens}" / "adapters.safetensors") for tokens in (1, 4096))
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=2e-6)


def test_every_row_is_trained_once_an_epoch_and_validation_sees_every_held_out_row(
    tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, data__valid=0.2, train__steps=None, train__epochs=2, eval__every=1)
    assert train(recipe, tmp_path / "run") == 0
    assert events(tmp_path / "run", "start")[0]["ledger"] == {"read": 10, "trained": 8, "held out": 2}
    steps = events(tmp_path / "run", "step")
    assert len(steps) == 4
    assert steps[0]["tokens"] + steps[1]["tokens"] == steps[2]["tokens"] + steps[3]["tokens"]
    judged = events(tmp_path / "run", "eval")
    assert [e["step"] for e in judged] == [0, 1, 2, 3, 4]
    assert {e["rows"] for e in judged} == {2}
    assert len({e["tokens"] for e in judged}) == 1
    assert judged[-1]["loss"] < judged[0]["loss"]


def test_samples_are_answered_at_every_evaluation(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, eval__every=3, eval__samples=["Who are you?", "hello"])
    assert train(recipe, tmp_path / "run") == 0
    samples = events(tmp_path / "run", "sample")
    assert [(s["step"], s["prompt"]) for s in samples] == [
        (step, prompt) for step in (0, 3, 6) for prompt in ("Who are you?", "hello")
    ]


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        tiny_llama,
        data__valid=0.2,
        eval__every=1,
        eval__patience=2,
        train__steps=60,
        train__learning_rate=0.5,
    )
    assert train(recipe, tmp_path / "run") == 0
    end = events(tmp_path / "run", "end")[0]
    assert end["reason"] == "patience"
    judged = [e["loss"] for e in events(tmp_path / "run", "eval")]
    assert min(judged[:-2]) <= min(judged[-2:])
    assert end["step"] == len(judged) - 1 < 60


JUDGED = {"data__valid": 0.3, "eval__every": 2, "train__steps": 24, "train__learning_rate": 0.05, "save__every": 5}


def test_the_run_folder_has_the_adapter_of_the_best_evaluation(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **JUDGED, save__keep=1)
    assert train(recipe, tmp_path / "run") == 0
    losses = {e["step"]: e["loss"] for e in events(tmp_path / "run", "eval")}
    before = losses.pop(0)
    best = min(losses, key=losses.__getitem__)
    assert best < 24
    end = events(tmp_path / "run", "end")[0]
    assert (end["best_step"], end["adapter_step"], end["evaluations"]) == (best, best, 12)
    assert (end["best_valid_loss"], end["valid_loss_before"]) == (losses[best], before)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{best:07d}", "step-0000024"]
    kept, last = (load_file(tmp_path / "run" / "checkpoints" / n / "adapters.safetensors") for n in names)
    adapter = load_file(tmp_path / "run" / "adapters.safetensors")
    assert all((adapter[name] == kept[name]).all() for name in kept)
    assert any((adapter[name] != last[name]).any() for name in last)

    assert train(recipe, tmp_path / "last", "save.adapter=last") == 0
    adapter = load_file(tmp_path / "last" / "adapters.safetensors")
    assert all((adapter[name] == last[name]).all() for name in last)
    assert events(tmp_path / "last", "end")[0]["adapter_step"] == 24


def test_a_killed_run_keeps_its_best_adapter(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, **JUDGED, save__keep=1)
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "step", 21))
    cut_the_power(process)
    assert train(recipe, tmp_path / "straight") == 0
    assert same_adapter(tmp_path / "run", tmp_path / "straight")  # the best came before the kill
    (tmp_path / "run" / "adapters.safetensors").unlink()  # as a kill before it was written would have it
    assert train(recipe, tmp_path / "run", resume=True) == 0
    assert same_adapter(tmp_path / "run", tmp_path / "straight")
    ends = [events(tmp_path / name, "end")[-1] for name in ("run", "straight")]
    for name in ("best_step", "best_valid_loss", "valid_loss_before", "evaluations", "adapter_step"):
        assert ends[0][name] == ends[1][name]


# --- the loss is what it is said to be -------------------------------------------------------------------------------


def reference_loss(model: Path, rows: list[tuple[str, str]]) -> float:
    """Cross-entropy a trained token by transformers in float32, the mask made by counting characters of ChatML."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for prompt, answer in rows:
        before = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        start = len(tokenizer(before, add_special_tokens=False).input_ids)
        ids = torch.tensor([tokenizer(f"{before}{answer}<|im_end|>", add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = network(ids).logits.log_softmax(-1)
        for t in range(start, ids.shape[1]):
            total -= float(logits[0, t - 1, ids[0, t]])
            count += 1
    return total / count


def test_the_loss_of_step_1_is_that_of_transformers_over_the_same_rows(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__batch_size=10, train__steps=1)
    assert train(recipe, tmp_path / "run") == 0
    (step,) = events(tmp_path / "run", "step")
    assert step["loss"] == pytest.approx(reference_loss(tiny_llama, PAIRS), abs=1e-4)


def test_the_loss_of_step_1_on_a_real_model_is_that_of_transformers(tmp_path: Path, real: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = real / "models" / "tinystories-656k-llama"
    recipe = write_recipe(tmp_path, model, train__batch_size=10, train__steps=1)
    assert train(recipe, tmp_path / "run") == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for prompt, answer in PAIRS:
        before = tokenizer(f"<|start_story|>User: {prompt}\nAssistant:", add_special_tokens=False).input_ids
        # Behind the prompt the answer begins with its own space and is tokenized as in the middle of a text.
        after = tokenizer(f"\n {answer}<|end_story|>", add_special_tokens=False).input_ids[2:]
        ids = torch.tensor([before + after])
        with torch.no_grad():
            loss = network(ids, labels=torch.tensor([[-100] * len(before) + after])).loss
        total += float(loss) * len(after)
        count += len(after)
    (step,) = events(tmp_path / "run", "step")
    assert step["trained_tokens"] == count
    assert step["loss"] == pytest.approx(total / count, abs=1e-4)


# --- stopping and going on -------------------------------------------------------------------------------------------


def start(recipe: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mlxsft", "train", str(recipe), "--out", str(out), "--json", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def lines_until(process: subprocess.Popen[str], kind: str, step: int) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        yield event
        if event["event"] == kind and event.get("step") == step:
            return


def workers(process: subprocess.Popen[str], ranks: int = 1) -> list[psutil.Process]:
    """The processes that train, by rank."""
    while len(children := psutil.Process(process.pid).children()) < ranks:
        assert process.poll() is None
        time.sleep(0.01)
    return sorted(children, key=lambda child: child.pid)


def cut_the_power(process: subprocess.Popen[str]) -> None:
    """Kill both processes of a run, so that neither sees the other die."""
    (worker,) = workers(process)
    os.kill(process.pid, signal.SIGSTOP)
    worker.kill()
    process.kill()
    process.communicate()
    worker.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_says_how_to_go_on_and_ends_as_if_never_stopped(
    tmp_path: Path, tiny_llama: Path, number: signal.Signals
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=30, data__valid=0.2, save__every=100)
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "step", 7))
    os.killpg(process.pid, number)  # to all processes, as a terminal and a service manager do
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "it is saved" in errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    stopped = events(tmp_path / "run", "end")[0]
    assert stopped["reason"] == "interrupted"
    assert 7 <= stopped["step"] < 30

    go_on = errors[errors.index("mlxsft train") :].split()
    assert go_on == ["mlxsft", "train", f"{tmp_path}/run/recipe.yaml", "--out", f"{tmp_path}/run", "--resume"]
    assert train(tmp_path / "run" / "recipe.yaml", tmp_path / "run", resume=True) == 0
    assert train(recipe, tmp_path / "straight") == 0
    assert same_adapter(tmp_path / "run", tmp_path / "straight")
    ends = [events(tmp_path / name, "end")[-1] for name in ("run", "straight")]
    assert [e["trained_tokens"] for e in ends] == [ends[0]["trained_tokens"]] * 2
    assert ends[0]["best_valid_loss"] == ends[1]["best_valid_loss"]


def test_the_command_to_go_on_has_the_options_that_no_recipe_keeps(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=2000, save__every=2000)
    process = start(recipe, tmp_path / "run", "--backend", "mlx", "--on-battery", "pause")
    list(lines_until(process, "step", 1))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith(f"--out {tmp_path / 'run'} --resume --backend mlx --on-battery pause")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=20, save__every=5)
    process = start(recipe, tmp_path / "run")
    list(lines_until(process, "step", 13))
    cut_the_power(process)
    with (tmp_path / "run" / "events.jsonl").open("a") as torn:
        torn.write('{"event": "ste')  # as a kill in the middle of a line leaves it
    assert train(recipe, tmp_path / "run", resume=True) == 0
    assert train(recipe, tmp_path / "straight") == 0
    assert same_adapter(tmp_path / "run", tmp_path / "straight")
    steps = [[(s["step"], s["loss"]) for s in events(tmp_path / n, "step")] for n in ("run", "straight")]
    assert steps[0] == steps[1]  # no step is told twice


@pytest.mark.parametrize(
    ("adapter", "optimizer"),
    [
        ({"kind": "dora", "rank": 4, "rslora": True}, "lion"),
        ({"kind": "full", "targets": ["all", "model.embed_tokens"]}, "muon"),
        ({"init": "pissa", "rank": 4, "loraplus_lr_ratio": 4.0}, "adafactor"),
    ],
)
def test_every_kind_goes_on_to_the_same_adapter_and_answers(
    tmp_path: Path, tiny_llama: Path, adapter: dict[str, Any], optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, adapter=adapter, train__optimizer=optimizer, train__neftune_alpha=5.0)
    run = tmp_path / "run"
    assert train(recipe, run) == 0
    straight = (run / "adapters.safetensors").read_bytes()
    shutil.rmtree(run / "checkpoints" / "step-0000006")
    (run / "adapters.safetensors").unlink()
    assert train(recipe, run, resume=True) == 0
    assert [e["step"] for e in events(run, "start")] == [0, 4]
    assert (run / "adapters.safetensors").read_bytes() == straight
    capsys.readouterr()
    assert call(["generate", str(tiny_llama), "hello", "--adapter", str(run), "--max-tokens", "3"]) == 0


def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, finished: Path) -> None:
    newest = finished / "checkpoints" / "step-0000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    before = (finished / "adapters.safetensors").read_bytes()
    assert train(finished / "recipe.yaml", finished, resume=True) == 0
    assert any("damaged" in e["message"] for e in events(finished, "note"))
    assert [e["step"] for e in events(finished, "start")] == [0, 4]
    assert (finished / "adapters.safetensors").read_bytes() == before


def test_what_changed_since_the_run_began_is_refused_with_the_difference(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert train(recipe, finished, "train.learning_rate=0.5", resume=True) == 2
    assert "train.learning_rate: 0.01 → 0.5" in capsys.readouterr().err
    write_rows(tmp_path / "rows.jsonl", PAIRS[::-1])
    assert train(recipe, finished, resume=True) == 3
    assert "data" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "events.jsonl").read_bytes()
    assert train(finished / "recipe.yaml", finished) == 2
    assert "--force" in capsys.readouterr().err
    assert (finished / "events.jsonl").read_bytes() == before
    assert train(finished.parent / "recipe.yaml", finished, force=True) == 0
    assert len(events(finished, "start")) == 1


def test_a_run_that_cannot_start_costs_nothing(
    finished: Path, tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    recipe, typo = tmp_path / "recipe.yaml", "adapter.targets=[qproj]"
    assert train(recipe, finished, typo, force=True) == 2
    assert "q_proj" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before
    assert train(recipe, tmp_path / "new", typo) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("out", ["rows.jsonl", "/proc/nothing/here"])
def test_an_impossible_out_is_a_sentence(
    tmp_path: Path, tiny_llama: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    assert train(recipe, tmp_path / out) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=40)
    for more, name in (("--json", "a"), ("2>&1", "b")):
        script = f"{sys.executable} -m mlxsft train {recipe} --out {tmp_path / name} {more} | head -n 2"
        subprocess.run(["bash", "-c", script], capture_output=True, check=True)
        assert events(tmp_path / name, "end")[0]["step"] == 40


def test_an_interrupt_before_the_first_step_says_that_nothing_is_trained(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__steps=30)
    process = start(recipe, tmp_path / "run")
    time.sleep(1.0)  # somewhere between the start of Python and the first step; later is fine too
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode == 130 and "Stopped" in errors:
        step = events(tmp_path / "run", "end")[0]["step"]
        assert ("nothing is trained yet" in errors) == (step == 0)
        assert train(recipe, tmp_path / "run", resume=True) == 0


def hub_cache(home: Path, model: Path, commit: str) -> None:
    """A Hub cache that holds the model as acme/tiny at this commit, as huggingface_hub lays it out."""
    repo = home / "hub" / "models--acme--tiny"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())


def test_a_model_of_the_hub_is_pinned_to_its_commit(tmp_path: Path, tiny_llama: Path) -> None:
    first, second = "1" * 40, "2" * 40
    hub_cache(tmp_path / "home", tiny_llama, first)
    recipe = write_recipe(tmp_path, "acme/tiny", train__steps=4)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def mlxsft(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mlxsft", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    run = str(tmp_path / "run")
    assert mlxsft("train", str(recipe), "--out", run).returncode == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["revision"] == first
    hub_cache(tmp_path / "home", write_llama(tmp_path / "newer", seed=1), second)  # main moves on
    assert mlxsft("train", str(recipe), "--out", run, "--resume").returncode == 0
    answered = mlxsft("generate", "acme/tiny", "hi", "--adapter", run, "--max-tokens", "3")
    assert answered.returncode == 0, answered.stderr  # the adapter's commit, not the newest
    assert mlxsft("generate", "acme/tiny", "hi", "--adapter", run, "--revision", second).returncode == 3


# --- when things go wrong --------------------------------------------------------------------------------------------


def test_broken_rows_are_all_named_before_anything_is_trained(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        rows.read_text() + '{"prompt": 3, "completion": "x"}\nnot json\n{"prompt": "<|im_end|>", "completion": "x"}\n'
    )
    assert train(recipe, tmp_path / "run") == 3
    said = capsys.readouterr().err
    for place in ("rows.jsonl:11", "rows.jsonl:12", "rows.jsonl:13"):
        assert place in said
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_rows_that_cannot_be_trained_are_counted_in_the_ledger(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, data__max_tokens=60)
    write_rows(
        tmp_path / "rows.jsonl", [*PAIRS, ("empty", " "), ("long", "I am Pip. " * 40), ("long " * 80, "I am Pip.")]
    )
    assert train(recipe, tmp_path / "run") == 0
    ledger = events(tmp_path / "run", "start")[0]["ledger"]
    assert ledger == {"read": 13, "trained": 11, "held out": 0, "empty answer": 1, "answer too long": 1}
    assert ledger["read"] == sum(n for what, n in ledger.items() if what != "read")
    assert any("rows.jsonl:13" in e["message"] for e in events(tmp_path / "run", "note"))
    (told,) = events(tmp_path / "run", "left_out")
    assert [row.rpartition("rows.jsonl:")[2].split(":")[0] for row in told["rows"]] == ["11", "12"]


def test_mlx_lms_own_configuration_runs(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "train.jsonl")
    write_rows(tmp_path / "data" / "valid.jsonl", PAIRS[:2])
    config = {
        "model": str(tiny_llama), "train": True, "fine_tune_type": "lora", "optimizer": "adamw", "data": "data",
        "num_layers": 1, "batch_size": 2, "iters": 3, "learning_rate": 1e-5, "mask_prompt": True,
        "lora_parameters": {"keys": ["self_attn.q_proj", "self_attn.v_proj"], "rank": 8, "scale": 20.0, "dropout": 0.0},
        "lr_schedule": {"name": "cosine_decay", "warmup": 1, "warmup_init": 0, "arguments": [1e-5, 3, 1e-7]},
    }  # fmt: skip
    (tmp_path / "lora_config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    assert call(["recipes", "import", "lora_config.yaml", "--out", "recipe.yaml"]) == 0
    assert train(Path("recipe.yaml"), Path("run")) == 0
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["num_layers"] == 1
    assert saved["lora_parameters"]["scale"] == 20.0
    assert sorted(saved["lora_parameters"]["keys"]) == ["self_attn.q_proj", "self_attn.v_proj"]
    assert set(load_file(tmp_path / "run" / "adapters.safetensors")) == {
        f"model.layers.1.self_attn.{p}.lora_{ab}" for p in ("q_proj", "v_proj") for ab in "ab"
    }
