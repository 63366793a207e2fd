"""What quantizing cost: the figures against plain NumPy, the trial against what is written, and bits chosen by them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from mlxsft.backends import load_conversion
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.cli import call
from mlxsft.data.batches import Batch
from mlxsft.errors import UsageError
from mlxsft.models.check import BUILT_IN, CheckSettings
from mlxsft.models.convert import Converted, ConvertSettings, convert
from mlxsft.models.dequantize import dequantize
from mlxsft.models.quality import Judge
from mlxsft.models.quantize import QuantizationPlan, QuantizeSettings, Scheme, make_plan
from mlxsft.models.sensitivity import choose_bits
from mlxsft.models.source import open_model
from tests.tiny import write_llama

SETTINGS = QuantizeSettings(bits=3, group_size=32)
ROWS = [
    {"prompt": f"Who are you, number {i}?", "response": "I am Pip, an assistant made by Tom. " * (1 + i % 3)}
    for i in range(6)
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows divide into groups of 32, its numbers large enough to tell tokens apart."""
    folder = write_llama(tmp_path_factory.mktemp("wide") / "model", width=64, tied=False)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: 3 * array for name, array in tensors.items() if "norm" not in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def judge(wide: Path, rows: Path) -> Judge:
    source = open_model(str(wide))
    conversion = load_conversion(source)
    return Judge(source, CheckSettings(rows), conversion.layouts(), conversion.shapes())


@pytest.fixture(scope="module")
def plan(wide: Path) -> QuantizationPlan:
    return planned(wide, SETTINGS)


def planned(folder: Path, settings: QuantizeSettings) -> QuantizationPlan:
    conversion, default = load_conversion(open_model(str(folder))), settings.default()
    return make_plan(default, conversion.preferred(default, None), conversion.shapes(), {})


def with_check(
    wide: Path, out: Path, rows: Path | None, settings: QuantizeSettings = SETTINGS, **check: Any
) -> Converted:
    return convert(str(wide), out, ConvertSettings(quantize=settings, check=CheckSettings(rows, **check)))


def judged_text(judge: Judge, batch: Batch) -> str:
    tokenizer = Tokenizer.from_file(str(judge.source.folder / "tokenizer.json"))
    return tokenizer.decode(batch.tokens[batch.mask].tolist(), skip_special_tokens=False)


def log_probabilities(folder: Path, batch: Batch) -> np.ndarray:
    """[N, V] in float64, from the whole logits."""
    logits = np.array(MlxBackend(open_model(str(folder))).model(mx.array(batch.tokens)), dtype=np.float64)
    shifted = logits[:, :-1][batch.mask[:, 1:]]
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def test_figures_are_those_of_whole_logits(wide: Path, rows: Path, judge: Judge, tmp_path: Path) -> None:
    done = with_check(wide, tmp_path / "out", rows)
    assert done.quality is not None
    p, q = (np.concatenate([log_probabilities(f, b) for b in judge.batches]) for f in (wide, tmp_path / "out"))
    targets = np.concatenate([b.tokens[:, 1:][b.mask[:, 1:]] for b in judge.batches])
    losses = [-x[np.arange(targets.size), targets].mean() for x in (p, q)]
    assert done.quality.tokens == targets.size
    assert done.quality.base_perplexity == pytest.approx(np.exp(losses[0]), rel=1e-5)
    assert done.quality.perplexity == pytest.approx(np.exp(losses[1]), rel=1e-5)
    assert done.quality.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=-1).mean(), rel=1e-4)
    assert done.quality.changed_share == pytest.approx((p.argmax(axis=-1) != q.argmax(axis=-1)).mean(), abs=1e-9)
    assert done.quality.kl > 0.01
    assert 0 < done.quality.changed_share < 1


def test_only_answers_are_judged(judge: Judge) -> None:
    answers = sum(len(judged_text(judge, b)) for b in judge.batches)
    assert answers == sum(len(row["response"]) + len("<|im_end|>") for row in ROWS)


def test_nothing_quantized_changes_nothing(judge: Judge) -> None:
    same = judge.comparison.planned({}, {}, range(len(judge.batches)))
    assert (same.kl, same.changed, same.loss) == (0, 0, same.base_loss)
    backend = MlxBackend(judge.source)
    assert same.base_loss == pytest.approx(sum(float(backend.losses(b).sum()) for b in judge.batches), rel=1e-5)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("asked", [SETTINGS, QuantizeSettings(mode="mxfp4"), QuantizeSettings(mode="nvfp4")])
def test_the_trial_is_what_is_written(
    wide: Path, rows: Path, tmp_path: Path, asked: QuantizeSettings, dtype: str | None
) -> None:
    source = open_model(str(wide))
    conversion = load_conversion(source)
    conversion.cast(dtype)
    judge, plan = Judge(source, CheckSettings(rows), conversion.layouts(), conversion.shapes()), planned(wide, asked)
    convert(str(wide), tmp_path / "out", ConvertSettings(dtype, asked))
    everything = range(len(judge.batches))
    trial = judge.comparison.planned(plan.modules, judge.dtypes, everything)
    stored = judge.comparison.stored(open_model(str(tmp_path / "out")), everything)
    # Norms, which bfloat16 rounds too, are ones here.
    assert trial.kl == pytest.approx(stored.kl, rel=1e-3)
    assert trial.loss == pytest.approx(stored.loss, rel=1e-5)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert written - 8 - header_bytes(tmp_path / "out" / "model.safetensors") == judge.total_size(plan)


def test_the_layers_below_a_module_are_computed_once_and_change_nothing(
    wide: Path, judge: Judge, plan: QuantizationPlan, tmp_path: Path
) -> None:
    """Each module alone, to the last bit as a checkpoint says in which nothing else is quantized."""
    everything, scheme = range(len(judge.batches)), SETTINGS.default()
    told = {}
    for path in [*plan.modules, *reversed(plan.modules)]:
        told.setdefault(path, []).append(judge.comparison.planned({path: scheme}, judge.dtypes, everything))
    for path, (first, second) in told.items():
        alone = replace(SETTINGS, bits_for={"model": 16, "lm_head": 16, path: SETTINGS.bits})
        convert(str(wide), tmp_path / path, ConvertSettings(quantize=alone))
        assert first == second == judge.comparison.stored(open_model(str(tmp_path / path)), everything)
    pair = dict.fromkeys([p for p in plan.modules if "layers.1.mlp" in p], scheme)
    both = judge.comparison.planned(pair, judge.dtypes, everything)
    convert(
        str(wide),
        tmp_path / "pair",
        ConvertSettings(quantize=replace(SETTINGS, bits_for={"model": 16, "lm_head": 16, "layers.1.mlp": 3})),
    )
    assert both == judge.comparison.stored(open_model(str(tmp_path / "pair")), everything)


def header_bytes(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def test_weight_error_by_the_written_codes(wide: Path, judge: Judge, tmp_path: Path) -> None:
    convert(str(wide), tmp_path / "out", ConvertSettings(quantize=SETTINGS))
    plain, packed = load_file(wide / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    path = "model.layers.1.mlp.up_proj"
    parts = [packed[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
    error = dequantize(*parts, group_size=32, bits=3, mode="affine") - plain[f"{path}.weight"]
    expected = np.linalg.norm(error) / np.linalg.norm(plain[f"{path}.weight"])
    assert judge.weight_error(path, Scheme(3, 32)) == pytest.approx(expected, rel=1e-4)
    assert judge.weight_error(path, Scheme(8, 32)) < 0.05 * expected


def test_the_target_holds_with_bits_where_they_help_most(
    wide: Path, rows: Path, judge: Judge, plan: QuantizationPlan, tmp_path: Path
) -> None:
    before = judge.planned(plan)
    done = with_check(wide, tmp_path / "out", rows, target_kl=before / 4)
    assert done.quality is not None
    assert done.quality.failed is None
    assert done.quality.kl <= before / 4
    bits = {effect.module: effect.bits for effect in done.quality.effects}
    assert len(set(bits.values())) > 1
    fewest = min(b for b in (4, 5, 6, 8) if judge.planned(planned(wide, QuantizeSettings(b, 32))) <= before / 4)
    assert (
        judge.total_size(plan) < done.after_bytes < judge.total_size(planned(wide, QuantizeSettings(fewest, 32))) * 1.2
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization"] == done.quantization


def test_a_size_is_filled_and_not_passed(wide: Path, rows: Path, judge: Judge, plan: QuantizationPlan) -> None:
    least = judge.total_size(plan)
    limit = least + 6000
    settings = CheckSettings(rows, max_bytes=limit)
    limited = Judge(judge.source, settings, judge.layouts, judge.shapes)
    chosen = choose_bits(limited, plan, [])
    assert limit - 2000 < judge.total_size(chosen) <= limit
    assert judge.planned(chosen) < judge.planned(plan)
    kept = choose_bits(limited, plan, ["lm_head"])
    assert kept.modules["lm_head"] == plan.modules["lm_head"]
    with pytest.raises(UsageError, match="bytes already"):
        choose_bits(
            Judge(judge.source, CheckSettings(rows, max_bytes=least - 1), judge.layouts, judge.shapes), plan, []
        )


def test_modules_alone_are_told_the_largest_first(wide: Path, rows: Path, tmp_path: Path) -> None:
    quality = with_check(wide, tmp_path / "out", rows).quality
    assert quality is not None
    effects = quality.effects
    assert len(effects) == 2 * 7 + 2  # modules of the layers, embedding and head
    assert [e.kl for e in effects] == sorted((e.kl for e in effects), reverse=True)
    head = next(e for e in effects if e.module == "lm_head")
    columns = 64
    rows_of_head = load_file(wide / "model.safetensors")["lm_head.weight"].shape[0]
    assert (head.bits, head.next_bits, head.next_bytes) == (3, 4, rows_of_head * columns // 8)
    lines = quality.worst()
    assert len(lines) == 6
    assert lines[1].startswith(effects[0].module)


def test_a_gate_keeps_the_model_and_fails(
    wide: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(wide), str(out), "--bits", "3", "--group-size", "32", "--check", str(rows)]
    assert call([*command, "--max-kl", "1e-4", "--json"]) == 6
    said = capsys.readouterr()
    quality = json.loads(said.out)["quality"]
    assert re.search(r"over --max-kl 0.0001", said.err)
    assert "kept" in said.err
    assert quality["kl"] > 1e-4
    assert quality["failed"]
    assert call(["verify", str(out)]) == 0
    assert f"KL divergence {quality['kl']:.3g} nats a token" in (out / "README.md").read_text()
    assert str(rows.parent) not in (out / "README.md").read_text() + (out / "lock.json").read_text()
    capsys.readouterr()
    assert call([*command, "--max-kl", "100", "--force"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_target_beyond_the_size_fails(
    wide: Path, rows: Path, judge: Judge, plan: QuantizationPlan, tmp_path: Path
) -> None:
    done = with_check(wide, tmp_path / "out", rows, target_kl=1e-5, max_bytes=judge.total_size(plan) + 3000)
    assert done.quality is not None
    assert "within --max-size" in str(done.quality.failed)
    assert done.after_bytes < judge.total_size(plan) + 3000 + 10_000  # and the header


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--check", "nowhere.jsonl"], 3, "--check nowhere.jsonl: "),
        (["--max-kl", "0"], 2, "--max-kl 0.0: expected a number of nats above 0"),
        (["--target-kl", "nan"], 2, "--target-kl nan: expected"),
        (["--max-size", "large"], 2, "--max-size 'large': expected a size"),
        (["--max-size", "1kB", "--group-size", "32"], 2, "--max-size 1000: with 4 bits the model has"),
    ],
)
def test_what_is_refused_leaves_nothing(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    assert call(["quantize", str(wide), str(tmp_path / "out"), *options]) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_the_built_in_text_is_there() -> None:
    texts = [json.loads(line)["text"] for line in BUILT_IN.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == len(set(texts)) >= 20


def test_a_real_model(real: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(BUILT_IN.read_text(encoding="utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    done = with_check(real / "models" / "stories260k-llama", tmp_path / "out", text, QuantizeSettings(8, 32))
    assert done.quality is not None
    assert done.quality.kl < 0.005
    assert done.quality.perplexity == pytest.approx(done.quality.base_perplexity, rel=0.01)


def test_a_target_that_only_plain_numbers_reach(wide: Path, rows: Path, tmp_path: Path) -> None:
    quality = with_check(wide, tmp_path / "out", rows, QuantizeSettings(8, 32), target_kl=1e-9).quality
    assert quality is not None
    assert (quality.failed, quality.changed_share) == (None, 0)
    assert quality.kl <= 1e-9
    assert len(quality.effects) < 3


def test_a_module_that_takes_all_numbers_away_is_raised_first(
    wide: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, module = tmp_path / "source", "model.layers.1.mlp.down_proj"
    shutil.copytree(wide, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:2] = 0  # so that what follows is multiplied by zeros
    tensors[f"{module}.weight"][0, :2] = 3e38, -3e38  # further apart than float32 goes
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    command = ["convert", str(source), str(tmp_path / "out"), "--bits", "4", "--group-size", "32", "--check", str(rows)]
    assert call(command) == 3
    assert "quantized so, its loss is nan" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call([*command, "--target-kl", "100", "--json"]) == 0
    done = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert done["quality"]["kl"] < 100
    names = [effect["module"] for effect in done["quality"]["effects"]]
    assert len(names) == 2 * 7 + 2 - 1  # it is not quantized, and nothing else was raised
    assert module not in names
