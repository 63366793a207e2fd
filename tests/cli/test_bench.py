"""`mlxsft bench`: a fixed protocol, results that identify nobody, and tables that are made of them."""

from __future__ import annotations

import getpass
import io
import json
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from mlxsft import __version__
from mlxsft.bench.measure import measured, refuse_few_positions
from mlxsft.bench.protocol import PROTOCOL
from mlxsft.bench.result import name_of, weights_of
from mlxsft.cli import call
from mlxsft.errors import InputRefused
from mlxsft.models.headers import TensorInfo
from mlxsft.models.source import open_model
from mlxsft.quickstart.trial import BASE
from tests.hostile import MODELS
from tests.tiny import write_llama

ROOT = Path(__file__).resolve().parents[2]
RECORDED = [
    ROOT / "tests/benchmarks/results" / f"{name}.json" for name in ("quickstart", "qwen2.5-0.5b-4bit", "smollm2-135m")
]
PROTOCOL_1 = {
    "version": 1,
    "seed": 0,
    "rows": 8,
    "row_tokens": 128,
    "trained_tokens": 64,
    "prompt_tokens": 512,
    "answer_tokens": 128,
    "adapter": {
        "kind": "lora",
        "rank": 16,
        "alpha": 32.0,
        "rslora": False,
        "init": "default",
        "dropout": 0.0,
        "loraplus_lr_ratio": 1.0,
        "layers": "all",
        "targets": "all-linear",
    },
    "train": {
        "batch_size": 8,
        "micro_batch_tokens": 4096,
        "batching": "buckets",
        "learning_rate": 2e-4,
        "optimizer": "adamw",
        "clip_norm": 1.0,
        "checkpoint_activations": False,
        "cache_limit": None,
    },
}


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A result of each backend, as `--json` writes it."""
    folder, files = tmp_path_factory.mktemp("results"), {}
    for backend in ("mlx", "torch"):
        files[backend] = folder / f"{backend}.json"
        files[backend].write_text(benched(str(tiny_llama), "--backend", backend, "--repetitions", "1", "--json"))
    return files


def benched(*arguments: str) -> str:
    """What the command writes to stdout."""
    out = io.StringIO()
    with redirect_stdout(out):
        assert call(["bench", *arguments]) == 0
    return out.getvalue()


def read(file: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(file.read_text())
    return result


# ---- the protocol ---------------------------------------------------------------------------------------------------


def test_protocol_1_is_what_it_was() -> None:
    assert PROTOCOL.to_json() == PROTOCOL_1  # what differs is another version


def test_rows_and_prompt_are_the_same_for_every_run_and_fit_the_vocabulary() -> None:
    rows, again = PROTOCOL.examples(320), PROTOCOL.examples(320)
    assert [len(row.tokens) for row in rows] == [128] * 8
    assert [int(row.mask.sum()) for row in rows] == [64] * 8
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(rows, again, strict=True))
    assert len({tuple(row.tokens) for row in rows}) == 8
    everything = np.concatenate([*(row.tokens for row in rows), PROTOCOL.prompt(320)])
    assert (everything.min(), everything.max()) == (0, 319)
    assert rows[0].tokens[:4].tolist() == [272, 203, 163, 86]
    assert len(PROTOCOL.prompt(320)) == 513


# ---- a result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_result_has_every_figure(results: dict[str, Path], tiny_llama: Path, backend: str) -> None:
    result = read(results[backend])
    assert result["protocol"] == PROTOCOL_1
    assert result["model"]["name"] == "tiny-llama"
    assert result["model"]["weights"] == "float32"
    assert result["engine"]["backend"] == backend
    assert result["engine"]["multiplies_with"]
    assert 1 <= result["machine"]["cores"] <= (psutil.cpu_count() or 1)
    assert result["versions"]["mlxsft"] == __version__
    assert result["versions"].keys() == {"mlxsft", "mlx", "mlx-lm", "torch", "transformers", "peft"}
    tuning, generating = result["tuning"], result["generating"]
    assert (tuning["tokens"], tuning["trained_tokens"], len(tuning["losses"])) == (1024, 512, 2)
    assert (generating["prompt_tokens"], generating["tokens"]) == (512, 128)
    assert tuning["losses"][0] == pytest.approx(np.log(320), rel=0.1)
    assert tuning["losses"][1] < tuning["losses"][0]
    for part, tokens, seconds, rate in (
        (tuning, 1024, "seconds", "tokens_per_second"),
        (generating, 512, "prompt_seconds", "prompt_tokens_per_second"),
        (generating, 128, "seconds", "tokens_per_second"),
    ):
        assert part[rate]["median"] == pytest.approx(tokens / part[seconds][0])
        assert part["resident_peak_bytes"] > part["peak_bytes"] > 0
    assert tuning["peak_bytes"] > result["model"]["weight_bytes"]
    reached = tuning["needed_operations"] / tuning["seconds"][0] / result["engine"]["float32_matmul_flops"]
    assert tuning["share_of_float32_matmul"] == pytest.approx(reached)


def test_a_result_tells_no_path_no_user_and_no_host(results: dict[str, Path], tiny_llama: Path) -> None:
    for file in results.values():
        text = file.read_text()
        words = set(re.findall(r"[\w.-]+", text))
        assert not words & {getpass.getuser(), platform.node(), Path.home().name}
        strings = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
        assert not [s for s in strings if re.search(r"(^|[ (])[/~\\]|/(tmp|home|Users|var|private)/", s)]


def test_both_backends_and_a_second_run_do_the_same_work(results: dict[str, Path], tiny_llama: Path) -> None:
    mlx, torch = read(results["mlx"]), read(results["torch"])
    *_, again = measured("tuning", open_model(str(tiny_llama)), "mlx", 1)
    for name in ("losses", "trainable_parameters", "needed_operations"):
        assert again[name] == mlx["tuning"][name]
    for name in ("tokens", "trained_tokens", "trainable_parameters", "needed_operations"):
        assert torch["tuning"][name] == mlx["tuning"][name]
    assert torch["tuning"]["losses"] == pytest.approx(mlx["tuning"]["losses"], rel=1e-5)
    assert (torch["model"], torch["protocol"]) == (mlx["model"], mlx["protocol"])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_quantized_model_and_the_base_that_ships(tmp_path: Path, tiny_llama: Path, backend: str) -> None:
    small = tmp_path / "small"
    assert call(["quantize", str(tiny_llama), str(small), "--group-size", "32"]) == 0
    options = ("--backend", backend, "--repetitions", "2", "--json")
    assert json.loads(benched(str(small), *options))["model"]["weights"] == "4 bits"
    shipped = json.loads(benched(*options))
    assert shipped["model"]["name"] == "quickstart"
    assert len(shipped["tuning"]["losses"]) == 3


def test_names_are_ids_or_last_parts_of_paths(tmp_path: Path, tiny_llama: Path) -> None:
    assert name_of(open_model(str(BASE))) == "quickstart"
    source = open_model(str(tiny_llama))
    assert name_of(source) == "tiny-llama"
    assert name_of(replace(source, name="org/model", commit="0" * 40)) == "org/model"
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert name_of(replace(source, name=str(snapshot), folder=snapshot, commit="0" * 40)) == "org/model"


def test_the_kind_of_weights_is_told(tiny_llama: Path) -> None:
    source = open_model(str(tiny_llama))
    assert weights_of(source) == "float32"
    assert weights_of(replace(source, config={"quantization": {"bits": 4, "group_size": 64}})) == "4 bits"


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_results_are_laid_side_by_side(results: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(results["mlx"]), str(results["torch"])]
    assert json.loads(benched("--compare", "--json", *files)) == [read(file) for file in results.values()]
    assert call(["bench", "--compare", *files]) == 0
    table = capsys.readouterr().out
    assert table.count("tiny-llama") == 2
    assert "tuning, tokens/s" in table
    head, line, *rows = benched("--compare", "--markdown", *files).splitlines()
    assert head.count("|") == line.count("|") == rows[0].count("|")
    for backend, row in zip(results, rows, strict=True):
        assert re.search(rf"{backend} \S+ on the CPU", row)


def test_what_others_wrote_cannot_break_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = read(RECORDED[0])
    result["model"]["name"] = "a|b <img>\n\x1b[31mc"
    result["added_later"] = {"x": 1}
    (tmp_path / "other.json").write_text(json.dumps(result))
    assert call(["bench", "--compare", "--markdown", str(tmp_path / "other.json")]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert "a\\|b &lt;img>\\n\\x1b[31mc" in out
    assert call(["bench", "--compare", str(tmp_path / "other.json")]) == 0
    assert "\x1b[31m" not in capsys.readouterr().out


def test_the_readme_has_what_the_recorded_results_say() -> None:
    table = benched("--compare", "--markdown", *map(str, RECORDED))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- refusals -------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """A result with other values, by `section__field`."""

    def change(result: dict[str, Any]) -> dict[str, Any]:
        for name, value in changes.items():
            *sections, last = name.split("__")
            place = result
            for section in sections:
                place = place[section]
            place[last] = value
        return result

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed(protocol__version=2), "was made by protocol 2, and this mlxsft has protocol 1"),
        (changed(protocol__rows=4), "its protocol is not protocol 1"),
        (changed(tuning__tokens_per_second__median=float("nan")), "tuning.tokens_per_second.median"),
        (changed(tuning__peak_bytes=-1), "tuning.peak_bytes"),
        (changed(machine__chip=None), "machine.chip"),
        (changed(tuning={}), "tuning."),
        (lambda result: [], "is no result of bench"),
        (lambda result: {}, "protocol: Field required"),
    ],
)
def test_what_is_no_result_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], Any],
    said: str,
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(change(read(RECORDED[0]))))
    refused(["--compare", str(RECORDED[0]), str(tmp_path / "bad.json")], 3, said, capsys)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"protocol": ' + b" " * (2 << 20), b"\xff\xfe"])
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    refused(["--compare", str(tmp_path / "bad.json")], 3, "bad.json: is no result of bench", capsys)


def test_wrong_command_lines(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_llama)
    refused([model, model], 2, "2 models are named", capsys)
    refused([model, "--json", "--markdown"], 2, "--json and --markdown", capsys)
    refused(["--compare"], 2, "no file is named", capsys)
    refused(["--compare", "x.json", "--backend", "mlx"], 2, "--backend is about measuring", capsys)
    refused([model, "--repetitions", "0"], 2, "--repetitions", capsys)
    refused([model, "--revision", "main"], 2, "is a folder", capsys)
    refused(["--compare", str(tmp_path / "absent.json")], 3, "No such file", capsys)
    refused(["--compare", str(tmp_path)], 3, "Is a directory", capsys)
    refused(["/no/such/folder"], 3, "no such folder", capsys)
    refused([str(tmp_path)], 3, "no weights", capsys)


def test_a_model_larger_than_memory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_llama(tmp_path / "model")
    MODELS["four TB of nothing"].change(model, tmp_path)
    refused([str(model)], 4, "GiB of memory", capsys)


def test_a_model_without_numbers_ends_with_5(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused([str(model), "--backend", "mlx"], 5, "is not finite", capsys)


def test_learned_positions_have_to_suffice(tiny_llama: Path) -> None:
    source = open_model(str(tiny_llama))
    refuse_few_positions(source)  # computed ones go on
    for count, refuses in ((642, True), (643, False)):
        positions = {"transformer.wpe.weight": TensorInfo("model.safetensors", "F32", (count, 32))}
        learned = replace(source, tensors={**source.tensors, **positions})
        if refuses:
            with pytest.raises(InputRefused, match="has learned 642 positions, and the protocol needs 643"):
                refuse_few_positions(learned)
        else:
            refuse_few_positions(learned)


def refused(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with this code and a sentence, and writes no result."""
    assert call(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_both_processes(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "mlxsft", "bench", str(tiny_llama), "--repetitions", "100", "--backend", "mlx"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (children := psutil.Process(process.pid).children()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")
    assert not psutil.wait_procs(children, timeout=60)[1]
