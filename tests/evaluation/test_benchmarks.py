"""lm-eval on our backends: its numbers are those of lm-eval's own transformers model, and the adapter counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxsft.backends import load_backend
from mlxsft.chat.load import load_for_chat
from mlxsft.cli import call
from mlxsft.data.render import load_renderer
from mlxsft.evaluation.benchmarks import Benchmark, scores, side_by_side
from mlxsft.models.source import open_model
from tests.tiny import write_llama
from tests.training.test_run import PAIRS, train, write_recipe

EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "model.embed_tokens"]


def test_metrics_that_both_models_have_stand_side_by_side() -> None:
    base, tuned = {("arc", "acc"): (0.25, 0.1), ("arc", "f1"): (0.5, None)}, {("arc", "acc"): (0.5, 0.2)}
    assert side_by_side(base, tuned) == [Benchmark("arc", "acc", 0.25, 0.5, 0.1, 0.2)]


def test_without_lm_eval_the_command_that_installs_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert call(["eval", str(tmp_path), "--benchmark", "arc_easy"]) == 2
    assert "pip install 'mlxsft[benchmarks]'" in capsys.readouterr().err


@pytest.mark.long  # lm-eval and all that it needs are no part of the development environment
@pytest.mark.filterwarnings("default")
def test_log_probabilities_are_those_of_lm_evals_own_model(tmp_path: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from mlxsft.evaluation.lm_eval_model import BackendModel

    model = write_llama(tmp_path / "model")
    source = open_model(str(model))
    ours = BackendModel(load_backend("mlx", source), load_renderer(source))
    theirs = huggingface.HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=1)
    pairs = [("Who are you?", " I am Pip."), ("Who made you? ", "Tom"), ("", "hello"), ("hello " * 90, "user"),
             ("Say", " " + "I am Pip. " * 3)]  # fmt: skip
    from lm_eval.api.instance import Instance

    def asked(kind: str, arguments: tuple[Any, ...]) -> Any:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    found = ours.loglikelihood([asked("loglikelihood", pair) for pair in pairs])
    expected = theirs.loglikelihood([asked("loglikelihood", pair) for pair in pairs], disable_tqdm=True)
    for (a, greedy), (b, also) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
        assert greedy == also
    text = ("hello user, who are you? " * 60,)  # longer than the model's 512 positions
    rolled = ours.loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    expected_rolled = theirs.loglikelihood_rolling([asked("loglikelihood_rolling", text)], disable_tqdm=True)
    assert rolled[0] == pytest.approx(expected_rolled[0], rel=5e-3)  # windows of 511 and of 512 tokens
    given = {"until": ["a"], "max_gen_toks": 12, "do_sample": False}
    answers = ours.generate_until([asked("generate_until", ("Who are you?", given))])
    assert answers == theirs.generate_until([asked("generate_until", ("Who are you?", given))], disable_tqdm=True)


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_the_adapter_counts(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model = write_llama(tmp_path / "model")
    recipe = write_recipe(
        tmp_path, model, adapter={"rank": 32, "alpha": 128, "targets": EVERYTHING},
        train={"epochs": 100, "batch_size": 4, "learning_rate": 0.005}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, tmp_path / "run") == 0
    rows = tmp_path / "task.jsonl"
    before, behind = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    lines = [{"asked": f"{before}{p}{behind}", "wanted": c, "wrong": "user system"} for p, c in PAIRS]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test",
              "doc_to_text": "{{asked}}", "target_delimiter": ""}  # fmt: skip
    said = shared | {"task": "said", "output_type": "generate_until", "doc_to_target": "{{wanted}}",
                     "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40},
                     "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    picked = shared | {"task": "picked", "output_type": "multiple_choice", "doc_to_target": 0,
                       "doc_to_choice": "{{[wanted, wrong]}}", "metric_list": [{"metric": "acc"}]}  # fmt: skip
    loaded = load_for_chat(str(model), {"run": tmp_path / "run"}, revision=None, template=None, backend_name="mlx")
    found = []
    for name in (None, "run"):
        loaded.backend.use(name)
        found.append(scores(loaded.backend, loaded.renderers["run"], [said, picked], limit=10, seed=0))
    both = {b.task: b for b in side_by_side(*found)}
    assert (both["said"].base, both["said"].tuned) == (0, 1)
    assert both["picked"].tuned == 1
