"""Learned quantization: on the rows given, without a network, and kept only where it beats rounding on other rows."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from mlxsft.backends import mlx_learned
from mlxsft.cli import call
from mlxsft.models.check import BUILT_IN, CheckSettings
from mlxsft.models.convert import ConvertSettings, convert
from mlxsft.models.quantize import QuantizeSettings
from tests.backends.test_mlx_parity import save
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    file.write_text("".join(BUILT_IN.read_text(encoding="utf-8").splitlines(keepends=True)[:10]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("tiny") / "model", width=64, layers=1)


@pytest.fixture
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize("method", ["gptq", "awq", "dynamic", pytest.param("dwq", marks=pytest.mark.long)])
def test_the_better_one_on_held_out_rows_is_written(
    real: Path, text: Path, tmp_path: Path, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model, out = real / "models" / "tinystories-656k-llama", tmp_path / "out"
    check = CheckSettings(method=method, calibration=text)
    quality = convert(str(model), out, ConvertSettings(quantize=QuantizeSettings(4), check=check)).quality
    assert quality is not None
    assert quality.compared is not None
    assert quality.kl == pytest.approx(min(quality.compared.kl, quality.compared.rounded_kl), rel=1e-3)
    if method in ("gptq", "awq", "dwq"):  # measured; dynamic has no narrower width to spare in so small a model
        assert quality.compared.won
        assert quality.kl < 0.95 * quality.compared.rounded_kl
    else:
        assert "did not win, so that rounding is kept" in quality.sentence()
    rounded = convert(str(model), tmp_path / "rounded", ConvertSettings(quantize=QuantizeSettings(4)))
    assert json.loads((out / "config.json").read_text())["quantization"] == rounded.quantization
    assert (out / "model.safetensors").stat().st_size == (tmp_path / "rounded" / "model.safetensors").stat().st_size
    assert f"--method {method} --calibration text.jsonl" in (out / "README.md").read_text()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("method", ["gptq", "dwq"])
def test_numbers_of_bfloat16_are_written_as_such(
    tiny: Path, text: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_learned, "DWQ_STEPS", 2)
    check = CheckSettings(method=method, calibration=text)
    settings = ConvertSettings("bfloat16", QuantizeSettings(2, 32), check=check)
    quality = convert(str(tiny), tmp_path / "out", settings).quality
    assert quality is not None
    assert quality.compared is not None
    assert quality.kl == pytest.approx(min(quality.compared.kl, quality.compared.rounded_kl), rel=0.05)


def test_a_method_whose_model_gives_no_numbers_does_not_win(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlx_learned, "DWQ_STEPS", 2)
    monkeypatch.setattr(mlx_learned, "DWQ_RATE", 1e38)
    command = ["quantize", str(tiny), str(tmp_path / "out"), "--group-size", "32", "--json"]
    assert call([*command, "--method", "dwq", "--calibration", str(text)]) == 0
    quality = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["quality"]
    assert quality["compared"]["kl"] is None
    assert quality["kl"] == pytest.approx(quality["compared"]["rounded_kl"], rel=1e-3)
    convert(str(tiny), tmp_path / "rounded", ConvertSettings(quantize=QuantizeSettings(group_size=32)))
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "rounded" / weights).read_bytes()
    assert "dwq has no number of nats a token, rounding to nearest" in (tmp_path / "out/README.md").read_text()
    assert "did not win, so that rounding is kept" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--method", "awq"], 2, "--method awq learns from rows Give them with --calibration FILE."),
        (["--calibration", "TEXT"], 2, "rounding to nearest learns nothing"),
        (["--method", "gptq", "--calibration", "TEXT", "--mode", "mxfp4"], 2, "--method gptq with --mode mxfp4"),
        (["--method", "gptq", "--calibration", "TEXT", "--bits", "3"], 3, "mlx-lm has it for 2, 4 and 8 bits"),
        (["--method", "awq", "--calibration", "TEXT", "--bits-for", "lm_head=8"], 2, "it takes one width for all"),
        (["--method", "dynamic", "--calibration", "TEXT", "--bits", "8"], 2, "mixes the widths on either side of it"),
        (["--method", "dwq", "--calibration", "TEXT", "--bits", "8"], 2, "trains fewer bits only"),
        (["--method", "awq", "--calibration", "TEXT", "--target-kl", "1"], 2, "both choose"),
        (["--method", "awq", "--calibration", "TEXT", "--check", "TEXT"], 3, "has the rows of --check and no others"),
        (["--method", "awq", "--calibration", "nowhere.jsonl"], 3, "--calibration nowhere.jsonl: "),
    ],
)
def test_what_is_refused_leaves_nothing(
    tiny: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    words: str,
) -> None:
    command = ["quantize", str(tiny), str(tmp_path / "out"), "--group-size", "32"]
    assert call([*command, *(str(text) if word == "TEXT" else word for word in options)]) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_what_mlx_lm_has_not_is_said(
    text: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = save(tmp_path / "phi3", "phi3", {}, **sizes)
    command = ["convert", str(model), str(tmp_path / "out"), "--method", "awq", "--calibration", str(text)]
    assert call([*command, "--group-size", "32"]) == 3
    assert "and not for phi3" in capsys.readouterr().err
    assert call(["quantize", str(tiny), *command[2:], "--group-size", "128"]) == 2  # of down_proj alone
    assert "awq: quantizes every matrix" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
