"""What `convert` writes: mlx-lm's very tensors, loaded by mlx-lm and by both backends, and nothing half-done."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsft.backends import load_backend
from mlxsft.backends.mlx import mx, nn, tree_flatten
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.convert import ConvertSettings, convert, parse_size
from mlxsft.models.lock import read_lock, verify
from mlxsft.models.quantize import QuantizeSettings
from mlxsft.models.source import ModelSource, open_model
from tests.backends.conftest import make_batch
from tests.backends.test_mlx_parity import save
from tests.tiny import write_llama

WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {},
    "phi3": {},
    "gpt2": {"tie_word_embeddings": True, "n_embd": 128, "n_head": 4, "n_layer": 2},
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 64},
}
# (ours, mlx_lm.convert's)
WAYS: dict[str, tuple[ConvertSettings, dict[str, Any]]] = {
    "dense": (ConvertSettings(), {}),
    **{dtype: (ConvertSettings(dtype=dtype), {"dtype": dtype}) for dtype in ("float16", "bfloat16")},
    **{
        f"{bits}bit-{size}": (
            ConvertSettings(quantize=QuantizeSettings(bits=bits, group_size=size)),
            {"quantize": True, "q_bits": bits, "q_group_size": size},
        )
        for size in (64, 32, 128)
        for bits in (4, 2, 3, 5, 6, 8)
    },
    **{
        mode: (ConvertSettings(quantize=QuantizeSettings(mode=mode)), {"quantize": True, "q_mode": mode})
        for mode in ("mxfp4", "mxfp8", "nvfp4")
    },
    **{
        mixed: (ConvertSettings(quantize=QuantizeSettings(mixed=mixed)), {"quantize": True, "quant_predicate": mixed})
        for mixed in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    },
    **{
        f"bfloat16-{mode}": (
            ConvertSettings(dtype="bfloat16", quantize=QuantizeSettings(mode=mode)),
            {"dtype": "bfloat16", "quantize": True, "q_mode": mode},
        )
        for mode in ("affine", "mxfp4", "mxfp8", "nvfp4")
    },
}
NOT_MIXED = ("gpt2",)  # mlx-lm has no mixed bits for it


def every_way() -> Iterator[Any]:
    """(family, way) of all that exist; what is not `long` has every way in two families at least."""
    for column, way in enumerate(WAYS):
        for row, family in enumerate(FAMILIES):
            if family in NOT_MIXED and way.startswith("mixed"):
                continue
            often = way in ("dense", "4bit-64") or (column - row) % 4 == 0
            yield pytest.param(family, way, marks=() if often else pytest.mark.long)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)`: a random one, as transformers saves it."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = save(tmp_path_factory.mktemp(family), family, {}, **{**WIDE, **FAMILIES[family]})
            if family == "gpt2":
                as_openai_published_it(made[family])
            if family == "qwen3_moe":
                change_config(made[family], num_experts=4, rope_theta=50.0)  # mlx-lm does not know transformers' names
        return made[family]

    return of


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def as_openai_published_it(folder: Path) -> None:
    """The names of a GPT-2 as mlx-lm wants them; transformers saves others."""
    file = folder / "model.safetensors"
    arrays = {name.removeprefix("transformer."): array for name, array in load_file(file).items()}
    save_file(arrays, file, metadata={"format": "pt"})
    change_config(folder, n_ctx=64, rope_parameters=None)  # its positions are learned


def theirs(source: Path, out: Path, **options: Any) -> None:
    mlx_lm("utils")
    from mlx_lm.convert import convert as convert_by_mlx_lm

    if "quant_predicate" in options:
        options["q_group_size"] = 64
    convert_by_mlx_lm(str(source), str(out), **options)


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bits)} of every weight file."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, array in mx.load(str(file)).items():
            assert name not in found
            found[name] = (str(array.dtype), tuple(array.shape), bytes(memoryview(array.reshape(-1).view(mx.uint8))))
    return found


def schemes(folder: Path) -> dict[str, tuple[int, int, str]]:
    """{module: (bits, group size, mode)} as mlx-lm loads it."""
    model, _ = mlx_lm("utils").load(str(folder), lazy=True)
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: (m.bits, m.group_size, m.mode) for path, m in leaves if "scales" in m}


@pytest.mark.parametrize(("family", "way"), list(every_way()))
def test_the_tensors_are_those_of_mlx_lm(
    checkpoint: Callable[[str], Path], tmp_path: Path, family: str, way: str
) -> None:
    settings, options = WAYS[way]
    source = checkpoint(family)
    theirs(source, tmp_path / "theirs", **options)
    done = convert(str(source), tmp_path / "ours", settings)
    expected, found = tensors(tmp_path / "theirs"), tensors(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert schemes(tmp_path / "ours") == schemes(tmp_path / "theirs")
    assert bool(schemes(tmp_path / "ours")) == bool(settings.quantize)
    assert done.after_bytes == sum(f.stat().st_size for f in (tmp_path / "ours").glob("*.safetensors"))


def test_the_layout_that_mlx_lm_refuses_gives_the_same_tensors(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    again = save(tmp_path / "gpt2", "gpt2", {}, **{**WIDE, **FAMILIES["gpt2"]})  # with transformers' own names
    for source, out in ((checkpoint("gpt2"), tmp_path / "a"), (again, tmp_path / "b")):
        convert(str(source), out, ConvertSettings(quantize=QuantizeSettings()))
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")


@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_and_mlx_lm_load_it(checkpoint: Callable[[str], Path], tmp_path: Path, family: str) -> None:
    """Dense: the losses of the source. Quantized: those of mlx-lm's model, with the same rounding, on both."""
    batch = make_batch()
    convert(str(checkpoint(family)), tmp_path / "dense", ConvertSettings())
    convert(str(checkpoint(family)), tmp_path / "packed", ConvertSettings(quantize=QuantizeSettings(bits=8)))
    before = load_backend("mlx", open_model(str(checkpoint(family)))).losses(batch)
    dense, packed = (open_model(str(tmp_path / name)) for name in ("dense", "packed"))
    np.testing.assert_array_equal(load_backend("mlx", dense).losses(batch), before)
    expected = load_backend("mlx", packed).losses(batch)
    assert np.abs(expected - before).max() > 0
    np.testing.assert_allclose(load_backend("torch", dense).losses(batch), before, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(load_backend("torch", packed).losses(batch), expected, rtol=2e-3, atol=2e-3)


# ---- sources --------------------------------------------------------------------------------------------------------


def in_shards(source: Path, folder: Path, count: int) -> Path:
    """The checkpoint in so many files."""
    shutil.copytree(source, folder)
    arrays = list(load_file(source / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    places = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(dict(arrays[i::count]), folder / file)
        places |= {name: file for name, _ in arrays[i::count]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def test_shards_in_and_out(tiny_llama: Path, tmp_path: Path) -> None:
    source = in_shards(tiny_llama, tmp_path / "sharded", 4)
    convert(str(source), tmp_path / "one", ConvertSettings())
    done = convert(str(source), tmp_path / "many", ConvertSettings(shard_bytes=20_000))
    theirs(source, tmp_path / "theirs")
    assert tensors(tmp_path / "one") == tensors(tmp_path / "many") == tensors(tmp_path / "theirs")
    opened = open_model(str(tmp_path / "many"))  # index and files agree, the reference parser reads each
    assert done.shards == len(opened.files) > 3
    sizes = [sum(2**2 * int(np.prod(t.shape)) for t in opened.tensors.values() if t.file == f) for f in opened.files]
    alone = [len([t for t in opened.tensors.values() if t.file == f]) == 1 for f in opened.files]
    assert all(size <= 20_000 or single for size, single in zip(sizes, alone, strict=True))
    assert list(opened.files) == [f"model-{i:05d}-of-{done.shards:05d}.safetensors" for i in range(1, done.shards + 1)]


def test_what_is_converted_is_a_source_again(tiny_llama: Path, tmp_path: Path) -> None:
    convert(str(tiny_llama), tmp_path / "mlx", ConvertSettings(dtype="bfloat16"))
    for source, out in ((tmp_path / "mlx", "from-mlx"), (tiny_llama, "direct")):
        settings = ConvertSettings(dtype="bfloat16", quantize=QuantizeSettings(bits=4, group_size=32))
        convert(str(source), tmp_path / out, settings)
    assert tensors(tmp_path / "from-mlx") == tensors(tmp_path / "direct")
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_quantized_is_not_quantized_again(tiny_llama: Path, tmp_path: Path) -> None:
    packed, settings = tmp_path / "packed", ConvertSettings(quantize=QuantizeSettings(group_size=32))
    convert(str(tiny_llama), packed, settings)
    with pytest.raises(InputRefused, match=r"is quantized already \(15 modules\), and would be rounded twice"):
        convert(str(packed), tmp_path / "again", settings)
    with pytest.raises(UsageError, match="is not quantized"):
        convert(str(tiny_llama), tmp_path / "again", ConvertSettings(dequantize=True))
    assert not (tmp_path / "again").exists()
    convert(str(packed), tmp_path / "plain", ConvertSettings(dequantize=True))
    theirs(packed, tmp_path / "theirs", dequantize=True)
    assert tensors(tmp_path / "plain") == tensors(tmp_path / "theirs")
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    both = ConvertSettings(dequantize=True, quantize=QuantizeSettings(bits=8, group_size=32))
    assert convert(str(packed), tmp_path / "eight", both).quantization == {
        "bits": 8,
        "group_size": 32,
        "mode": "affine",
    }


def with_float8(folder: Path, family: str, **fields: Any) -> Path:
    """A checkpoint whose projections are FP8 with a scale for 128 by 128 numbers, as DeepSeek publishes them."""
    import torch
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    save(folder, family, {}, **fields)
    arrays = load_torch(folder / "model.safetensors")
    for name in [name for name in arrays if "_proj" in name and arrays[name].ndim == 2]:
        blocks = [-(-size // 128) for size in arrays[name].shape]
        arrays[name] = arrays[name].to(torch.float8_e4m3fn)
        arrays[f"{name}_scale_inv"] = torch.full(blocks, 0.5)
    save_torch(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_float8_is_read_where_mlx_lm_reads_it(tmp_path: Path) -> None:
    source = with_float8(tmp_path / "fp8", "deepseek_v3")
    theirs(source, tmp_path / "theirs")
    convert(str(source), tmp_path / "ours", ConvertSettings())
    assert tensors(tmp_path / "ours") == tensors(tmp_path / "theirs")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())


def test_float8_is_refused_where_mlx_lm_takes_it_for_whole_numbers(tmp_path: Path) -> None:
    source = with_float8(tmp_path / "fp8", "llama")
    with pytest.raises(InputRefused, match="weight_scale_inv"):
        convert(str(source), tmp_path / "ours", ConvertSettings())
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    arrays = load_torch(source / "model.safetensors")
    arrays = {name: array for name, array in arrays.items() if not name.endswith("_scale_inv")}
    save_torch(arrays, source / "model.safetensors")
    with pytest.raises(InputRefused, match="stored as FP8, which mlx-lm does not read for llama"):
        convert(str(source), tmp_path / "ours", ConvertSettings())


# ---- what comes along -----------------------------------------------------------------------------------------------

CARD = """---
license: apache-2.0
language:
- en
base_model: someone/else
tags: [chat]
---
# Words
"""


def test_tokenizer_and_templates_come_along_and_code_does_not(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / "generation_config.json").write_text('{"temperature": 0.7}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "modeling_llama.py").write_text("raise SystemExit('code ran')")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "README.md").write_text(CARD)
    out = tmp_path / "out"
    convert(str(source), out, ConvertSettings(quantize=QuantizeSettings(group_size=32)))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not [p for p in out.rglob("*") if p.suffix in (".py", ".bin")]
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "language:\n- en" in card
    assert "someone/else" not in card  # what the base was tuned from is not what this was made from
    assert "mlxsft convert source out --quantize --group-size 32" in card
    assert str(tmp_path) not in card + (out / "lock.json").read_text()  # it may be published


def test_a_base_model_needs_no_template_and_no_end(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    convert(str(source), tmp_path / "out", ConvertSettings())
    (source / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputRefused, match="chat template model: it cannot render") as refused:
        convert(str(source), tmp_path / "broken", ConvertSettings())
    assert "It would come along." in str(refused.value.hint)
    assert not (tmp_path / "broken").exists()


def test_a_card_that_leads_elsewhere_is_not_read(tiny_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (tmp_path / "secret.md").write_text(CARD)
    (source / "README.md").symlink_to(tmp_path / "secret.md")
    convert(str(source), tmp_path / "out", ConvertSettings())
    assert "apache" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("card", ["", "---\n", "---\nlicense: [[a]]\n---\n", "---\na: *b\n---\n", "---\n- a\n---\n"])
def test_a_card_without_a_sound_licence(tiny_llama: Path, tmp_path: Path, card: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    (source / "README.md").write_text(card)
    convert(str(source), tmp_path / "out", ConvertSettings())
    assert "license" not in (tmp_path / "out" / "README.md").read_text()


# ---- whole or not at all --------------------------------------------------------------------------------------------


def test_the_same_source_gives_the_same_folder(tiny_llama: Path, tmp_path: Path) -> None:
    for parent in ("a", "b"):
        convert(str(tiny_llama), tmp_path / parent / "out", ConvertSettings())
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / parent / "out").iterdir()} for parent in ("a", "b"))
    assert one == other


def test_out_is_replaced_with_force_only_and_never_the_source(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(str(tiny_llama), out, ConvertSettings())
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="is there already"):
        convert(str(tiny_llama), out, ConvertSettings(dtype="float16"))
    assert (out / "model.safetensors").read_bytes() == before
    convert(str(tiny_llama), out, ConvertSettings(dtype="float16"), force=True)
    assert (out / "model.safetensors").stat().st_size < len(before)
    with pytest.raises(UsageError, match="where the source is"):
        convert(str(out), out, ConvertSettings(), force=True)
    with pytest.raises(UsageError, match="not a folder with a model"):
        convert(str(out), tmp_path, ConvertSettings(), force=True)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a folder with a model"):
        convert(str(tiny_llama), tmp_path / "papers", ConvertSettings(), force=True)
    assert (tmp_path / "papers" / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "papers"]


# Each job in a process of its own, forked from one that has imported everything.
JOBS = """
import json, os, resource, signal, sys
from pathlib import Path
import mlxsft.data.sandbox
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from mlxsft.backends.mlx_convert import MlxConversion, mlx_lm
from mlxsft.errors import OutOfResources
from mlxsft.models.convert import ConvertSettings, convert

mlx_lm("convert")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def work(source, out, limit, kill_at, deadly):
    changes = 0

    def watch(event, arguments):
        nonlocal changes
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir") and str(out.parent) in str(arguments[:2]):
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if deadly:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        convert(source, out, ConvertSettings(shard_bytes=20_000), force=out.exists())
    except OutOfResources as error:
        return f"refused: {error.message}"
    return str(changes)

for line in sys.stdin:
    source, out, limit, kill_at, deadly = json.loads(line)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, work(source, Path(out), limit, kill_at, deadly).encode())
        os._exit(0)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([status, os.read(reader, 10_000).decode()]), flush=True)
    os.close(reader)
"""


@pytest.fixture(scope="module")
def limited() -> Iterator[Callable[..., tuple[int, str]]]:
    """(exit code, what was refused or how many changes were made) of a conversion in a process of its own.

    Its files can have `limit` bytes (`deadly`: it is killed in the middle of writing more), and it is killed at its
    `kill_at`th change in the folder around `out`. What is there already is replaced.
    """
    with subprocess.Popen(
        [sys.executable, "-c", JOBS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(source: Path, out: Path, limit: int = 0, kill_at: int = 0, deadly: bool = False) -> tuple[int, str]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(source), str(out), limit, kill_at, deadly]) + "\n")
            process.stdin.flush()
            code, said = json.loads(process.stdout.readline())
            return code, said

        yield run


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("limit", [100, 1500, 15_000])
def test_a_full_disk_leaves_nothing(
    limited: Callable[..., tuple[int, str]], tiny_llama: Path, tmp_path: Path, limit: int
) -> None:
    out = tmp_path / "deep" / "out"
    assert limited(tiny_llama, out, limit) == (0, f"refused: {out}: cannot be written (File too large)")
    assert list(out.parent.iterdir()) == []
    assert limited(tiny_llama, out)[0] == 0
    lock = read_lock(out)
    assert lock is not None
    assert verify(out, lock).same


def test_a_full_disk_leaves_what_was_there(
    limited: Callable[..., tuple[int, str]], tiny_llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(str(tiny_llama), out, ConvertSettings(dtype="float16"))
    old = files_of(out)
    assert limited(tiny_llama, out, 15_000)[1].startswith("refused")
    assert files_of(out) == old
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("limit", [0, 100, 1500, 15_000])
def test_a_second_try_starts_clean(
    limited: Callable[..., tuple[int, str]], tiny_llama: Path, tmp_path: Path, limit: int
) -> None:
    """After a kill in the middle of a file, of the weights, the tokenizer or the configuration, and between two."""
    out, whole = tmp_path / "here" / "out", tmp_path / "whole" / "out"
    changes = int(limited(tiny_llama, whole)[1])
    killed = limited(tiny_llama, out, limit, deadly=True) if limit else limited(tiny_llama, out, 0, changes // 2)
    assert killed[0] == (-signal.SIGXFSZ if limit else -signal.SIGKILL)
    assert not out.exists()
    left = {path.name for path in out.parent.iterdir()}
    assert left == {".out.lock", ".out.partial"}  # hidden, so that nothing takes them for a model
    convert(str(tiny_llama), out, ConvertSettings(shard_bytes=20_000))
    assert os.listdir(out.parent) == ["out"]
    assert files_of(out) == files_of(whole)


def test_a_kill_at_any_moment_leaves_the_old_model_or_the_new_one(
    limited: Callable[..., tuple[int, str]], tiny_llama: Path, tmp_path: Path
) -> None:
    """Between the two renames there is neither for a moment; the next try puts the old one back."""
    start, whole = tmp_path / "start", tmp_path / "whole" / "out"
    convert(str(tiny_llama), start / "out", ConvertSettings(dtype="float16"))
    shutil.copytree(start / "out", whole)
    old = files_of(whole)
    changes = int(limited(tiny_llama, whole)[1])
    new, seen = files_of(whole), set()
    assert changes > 20
    assert old.keys() != new.keys()
    for kill_at in sorted({*range(1, changes, 6), *range(changes - 6, changes + 1)}):
        parent = tmp_path / f"killed{kill_at}"
        shutil.copytree(start, parent)
        out = parent / "out"
        assert limited(tiny_llama, out, kill_at=kill_at)[0] == -signal.SIGKILL
        there = files_of(out) if out.exists() else None
        assert there in (None, old, new)
        seen.add("none" if there is None else "old" if there == old else "new")
        if there is None:
            with pytest.raises(UsageError, match="is there already"):
                convert(str(tiny_llama), out, ConvertSettings())
            assert files_of(out) == old
        if kill_at % 4 == 1 or there != old:
            assert limited(tiny_llama, out)[0] == 0
            assert files_of(out) == new
            assert os.listdir(parent) == ["out"]
    assert seen == {"none", "old", "new"}


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """68 MB of float32 in 4 files, 20 MB of it one matrix."""
    folder = tmp_path_factory.mktemp("large")
    one = write_llama(folder / "one", layers=5, embeddings=10_000, width=512)
    return open_model(str(in_shards(one, folder / "four", 4)))


@pytest.mark.parametrize("way", ["dense", "float16", "4bit-64", "mxfp4", "nvfp4", "mxfp8"])
def test_never_more_than_a_few_tensors_are_in_memory(large: ModelSource, tmp_path: Path, way: str) -> None:
    """At most 1.3 times the largest file, or 3 times the largest tensor."""
    gc.collect()  # arrays of other tests are no part of it
    tensor = max(4 * int(np.prod(t.shape)) for t in large.tensors.values())
    file = max((large.folder / name).stat().st_size for name in large.files)
    done = convert(str(large.folder), tmp_path / "out", WAYS[way][0])
    assert done.peak_bytes <= max(1.3 * file, 3 * tensor)
    assert done.peak_bytes < 0.7 * done.before_bytes


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("4.5GiB", 9 << 29), ("500mb", 5 * 10**8), ("1000", 1000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs", "1e9", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        parse_size(text)
