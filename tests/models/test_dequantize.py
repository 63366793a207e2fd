"""Our definition of MLX's quantized formats is `mx.dequantize` on the CPU, bit for bit."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mlxsft.backends.mlx_models import mlx_lm, mx, nn, tree_flatten
from mlxsft.errors import InputRefused
from mlxsft.models.dequantize import E2M1, E4M3, E8M0, MODES, dequantize, dequantized_tensors
from mlxsft.models.source import open_model
from mlxsft.models.tensors import StoredTensors
from tests.tiny import write_llama

Array = NDArray[Any]
FORMATS = [(mode, bits, size) for mode, m in MODES.items() for bits in m.bits for size in m.group_sizes]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Equal bits are promised for the CPU device only."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def to_numpy(array: Any) -> Array:
    """An array of MLX; bfloat16 as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def to_mlx(array: Array, dtype: str) -> Any:
    return mx.array(array).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(array)


def assert_same_bits(ours: Array, theirs: Array) -> None:
    """Every value alike, zeros by their sign too; a NaN is a NaN."""
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), (ours[~same][:4], theirs[~same][:4])


def rows_of_every_kind(columns: int) -> Array:
    """Rows of zeros, of ones, of huge and tiny numbers, of one sign, with an outlier, of anything."""
    rng = np.random.default_rng(columns)
    rows = rng.standard_normal((9, columns)).astype(np.float32)
    rows *= np.float32([[0], [0], [1e38], [3e4], [1e-6], [1e-40], [1], [1], [1]])
    rows[1] = 1
    rows[6] = np.abs(rows[6])
    rows[7, 0] = 1e4
    return rows


# ---- one matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "bits", "group_size"), FORMATS)
def test_what_mlx_quantizes_is_what_mlx_dequantizes(mode: str, bits: int, group_size: int, dtype: str) -> None:
    matrix = mx.array(rows_of_every_kind(3 * 128)).astype(DTYPES[dtype])
    packed = mx.quantize(matrix, group_size, bits, mode)
    theirs = mx.dequantize(*packed, group_size=group_size, bits=bits, mode=mode)
    assert theirs.dtype == (DTYPES[dtype] if mode == "affine" else mx.bfloat16)
    ours = dequantize(*map(to_numpy, packed), group_size=group_size, bits=bits, mode=mode)
    assert_same_bits(ours, np.array(theirs.astype(mx.float32)))


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(MODES["affine"].bits),
    group_size=st.sampled_from(MODES["affine"].group_sizes),
    types=st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(DTYPES))),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    seed=st.integers(0, 1 << 32),
)
def test_any_bits_of_affine(bits: int, group_size: int, types: tuple[str, str], shape: list[int], seed: int) -> None:
    """Scales and biases of any bits: infinities, NaN and subnormal numbers among them."""
    rng = np.random.default_rng(seed)
    *rows, groups = shape
    weight = rng.integers(0, 1 << 32, (*rows, groups * group_size * bits // 32), np.uint32)

    def floats(dtype: str) -> Array:
        raw = rng.integers(0, 256, (*shape, 4 if dtype == "float32" else 2), np.uint8)
        return raw.view({"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}[dtype])[..., 0]

    scales, biases = map(floats, types)
    ours = dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode="affine")
    given_to_mlx = (mx.array(weight), *map(to_mlx, (scales, biases), types))
    assert_same_bits(ours, np.array(mx.dequantize(*given_to_mlx, group_size, bits).astype(mx.float32)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_every_code_with_every_scale(mode: str, dtype: str) -> None:
    (bits,), (group_size,) = MODES[mode].bits, MODES[mode].group_sizes
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))  # of four bits: every pair of codes
    weight, groups = codes.view(np.uint32), 256 * 8 // bits // group_size
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], groups, axis=1)
    ours = dequantize(weight, scales, group_size=group_size, bits=bits, mode=mode)
    theirs = mx.dequantize(mx.array(weight), mx.array(scales), None, group_size, bits, mode, dtype=DTYPES[dtype])
    # In bfloat16 too: but for the smallest numbers of mxfp8, it has them all
    assert_same_bits(
        np.array(mx.array(ours).astype(theirs.dtype).astype(mx.float32)), np.array(theirs.astype(mx.float32))
    )


def test_small_floats_are_those_of_the_specification() -> None:
    assert E2M1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3[1], E4M3[8], E4M3[0x38], E4M3[0x7E], E4M3[0xFE]) == (2**-9, 2**-6, 1, 448, -448)
    assert np.isnan(E4M3).nonzero()[0].tolist() == [0x7F, 0xFF]
    assert (E8M0[0], E8M0[127], E8M0[254]) == (2**-127, 1, 2.0**127)


@pytest.mark.parametrize(
    ("bits", "word", "codes"),
    [
        (8, 0x04030201, [1, 2, 3, 4]),
        (4, 0x87654321, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 0b11_010_001_000_111_110_101_100_011_010_001, [1, 2, 3, 4, 5, 6, 7, 0, 1, 2]),
        (6, 0b01_000100_000011_000010_000001_100001, [33, 1, 2, 3, 4]),
    ],
)
def test_the_first_code_is_in_the_lowest_bits(bits: int, word: int, codes: list[int]) -> None:
    weight = np.zeros((1, bits), np.uint32)
    weight[0, 0] = word
    one, zero = np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    values = dequantize(weight, one, zero, group_size=32, bits=bits, mode="affine")
    assert values[0, : len(codes)].tolist() == codes


def test_a_scale_for_each_expert() -> None:
    experts = mx.array(np.random.default_rng(0).standard_normal((3, 8, 64)).astype(np.float32))
    sizes = mx.abs(experts).max(axis=(1, 2))
    packed = [mx.quantize(e, mode="nvfp4", global_scale=size) for e, size in zip(experts, sizes, strict=True)]
    weight, scales = (mx.stack(list(parts)) for parts in zip(*packed, strict=True))
    ours = dequantize(
        np.array(weight), np.array(scales), group_size=16, bits=4, mode="nvfp4", global_scale=np.array(sizes)
    )
    theirs = [mx.dequantize(*p, mode="nvfp4", global_scale=size) for p, size in zip(packed, sizes, strict=True)]
    assert_same_bits(ours, np.array(mx.stack(theirs).astype(mx.float32)))
    assert np.abs(ours - np.array(experts)).max() < np.array(sizes).max() / 6  # half of the widest step, from 4 to 6


def test_a_matrix_of_no_rows_has_none() -> None:
    empty = np.zeros((0, 1), np.float32)
    assert dequantize(np.zeros((0, 4), np.uint32), empty, empty, group_size=32, bits=4, mode="affine").shape == (0, 32)


GOOD: dict[str, Any] = {
    "weight": np.zeros((2, 8), np.uint32),
    "scales": np.zeros((2, 1), np.float32),
    "biases": np.zeros((2, 1), np.float32),
    "group_size": 64,
    "bits": 4,
    "mode": "affine",
}
BYTES: dict[str, Any] = {"biases": None, "scales": np.zeros((2, 2), np.uint8), "group_size": 32, "mode": "mxfp4"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "nf4"}, "quantization mode 'nf4', expected affine, mxfp4, mxfp8, nvfp4"),
        ({"mode": None}, "quantization mode None"),
        ({"bits": 7}, "bits 7, expected 1 or 2 or 3 or 4 or 5 or 6 or 8 for affine"),
        ({"bits": True}, "bits True"),
        ({"bits": None}, "bits None"),
        ({"group_size": 16}, "group_size 16, expected 32 or 64 or 128 for affine"),
        ({**BYTES, "bits": 8}, "bits 8, expected 4 for mxfp4"),
        ({**BYTES, "group_size": 64}, "group_size 64, expected 32 for mxfp4"),
        ({"weight": np.zeros((2, 8), np.int32)}, "weight of int32, expected uint32"),
        ({"scales": np.zeros((2, 1), np.uint8)}, "scales of uint8, expected float32 or float16 or bfloat16 as uint16"),
        ({"biases": np.zeros((2, 1), np.float64)}, "biases of float64"),
        ({"biases": None}, "no biases, which affine has"),
        ({**BYTES, "biases": np.zeros((2, 2), np.float32)}, "biases of float32, expected none for mxfp4"),
        ({**BYTES, "scales": np.zeros((2, 2), np.float16)}, "scales of float16, expected uint8 for mxfp4"),
        ({**BYTES, "global_scale": np.float32([1])[0]}, "global_scale of float32, expected none for mxfp4"),
        ({"scales": np.zeros((2, 2), np.float32)}, "weight (2, 8), scales (2, 2), biases (2, 1)"),
        ({"biases": np.zeros((1, 1), np.float32)}, "do not belong together, with 4 bits and groups of 64"),
        ({"weight": np.zeros(8, np.uint32)}, "do not belong together"),
        ({"weight": np.zeros((), np.uint32), "scales": np.zeros((), np.float32)}, "do not belong together"),
        ({"bits": 3}, "do not belong together, with 3 bits"),
    ],
)
def test_what_mlx_would_not_take_is_refused(changes: dict[str, Any], words: str) -> None:
    dequantize(**GOOD)
    with pytest.raises(InputRefused) as caught:
        dequantize(**{**GOOD, **changes})
    assert words in caught.value.message
    assert "\n" not in caught.value.message


# ---- a checkpoint ---------------------------------------------------------------------------------------------------


def converted(folder: Path, predicate: Any = None, tied: bool = True, **options: Any) -> Path:
    """A tiny llama that mlx-lm has quantized."""
    mlx_lm("utils")
    from mlx_lm.convert import convert

    base = write_llama(folder / "base", tied=tied)
    convert(str(base), str(folder / "mlx"), quantize=True, quant_predicate=predicate, **options)
    return folder / "mlx"


def mixed(path: str, module: nn.Module, *_: object) -> bool | dict[str, Any]:
    """A width for each kind of module; one kind stays as it is."""
    bits = {"q_proj": 2, "k_proj": 3, "v_proj": 5, "o_proj": 6, "up_proj": 8}.get(path.rpartition(".")[2])
    if path.endswith("down_proj"):
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return {"group_size": 32, "bits": bits} if bits else hasattr(module, "to_quantized") and "gate" not in path


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "4 bits": {"q_group_size": 32, "q_bits": 4, "dtype": "bfloat16"},
    "3 bits, float16": {"q_group_size": 32, "q_bits": 3, "dtype": "float16", "tied": False},
    "8 bits, float32": {"q_group_size": 32, "q_bits": 8, "dtype": "float32"},
    "mxfp4": {"q_mode": "mxfp4"},
    "mxfp8": {"q_mode": "mxfp8"},
    "nvfp4": {"q_mode": "nvfp4", "tied": False},
    "mixed": {"q_group_size": 32, "q_bits": 4, "dtype": "bfloat16", "predicate": mixed},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_checkpoint_is_what_mlx_lm_makes_of_it(tmp_path: Path, kind: str) -> None:
    source = open_model(str(converted(tmp_path, **CHECKPOINTS[kind])))
    utils = mlx_lm("utils")
    model, _ = utils.load_model(source.folder)
    packed = sum(isinstance(m, nn.QuantizedLinear | nn.QuantizedEmbedding) for m in model.modules())
    assert packed == (13 if kind == "mixed" else 16 if CHECKPOINTS[kind].get("tied") is False else 15)
    theirs = dict(tree_flatten(utils.dequantize_model(model).parameters()))
    ours = dict(dequantized_tensors(StoredTensors(source), source.config))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert_same_bits(array, np.array(theirs[name].astype(mx.float32)))


def test_what_is_not_quantized_comes_as_it_is(tmp_path: Path) -> None:
    source = open_model(str(write_llama(tmp_path)))
    ours, stored = (
        dict(dequantized_tensors(StoredTensors(source), source.config)),
        load_file(tmp_path / source.files[0]),
    )
    assert ours.keys() == stored.keys()
    assert all(np.array_equal(ours[name], stored[name]) for name in stored)
    others = {"ids": np.arange(3, dtype=np.int64), "b": np.uint16([0x3F80]), "h": np.float16([2])}
    found = dict(dequantized_tensors(others, {}))
    assert [(name, str(a.dtype), a.tolist()) for name, a in found.items()] == [
        ("ids", "int64", [0, 1, 2]),
        ("b", "float32", [1.0]),
        ("h", "float32", [2.0]),
    ]


class Made(Mapping[str, Array]):
    """A checkpoint of equal matrices, each made when it is asked for."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width

    def __getitem__(self, name: str) -> Array:
        columns = self.width // (8 if name.endswith("weight") else 64)
        return np.ones((self.width, columns), np.uint32 if name.endswith("weight") else np.uint16)

    def __iter__(self) -> Iterator[str]:
        return (f"{i}.{part}" for i in range(self.count) for part in ("weight", "scales", "biases"))

    def __len__(self) -> int:
        return 3 * self.count


def test_one_matrix_at_a_time_is_in_memory() -> None:
    """32 matrices of 4 MiB as float32, of which never two are there at once."""
    tensors, names = Made(32, 1024), []
    tracemalloc.start()
    for name, array in dequantized_tensors(tensors, {"quantization": {"group_size": 64, "bits": 4}}):
        assert array.nbytes == 4 << 20
        names.append(name)
        del array
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == [f"{i}.weight" for i in range(32)]
    assert 4 << 20 < peak_bytes < 8 << 20


def packed_tensors(mode: str = "affine", bits: int = 4, group_size: int = 64) -> dict[str, Array]:
    """A module `a.b` of an MLX checkpoint."""
    packed = mx.quantize(mx.array(rows_of_every_kind(256)), group_size, bits, mode)
    return {f"a.b.{part}": to_numpy(x) for part, x in zip(("weight", "scales", "biases"), packed, strict=False)}


@pytest.mark.parametrize(
    ("own", "made"),
    [
        ({"group_size": 32, "bits": 6}, ("affine", 6, 32)),
        ({"bits": 8}, ("affine", 8, 64)),  # what is not said is MLX's default, not the model's
        ({"mode": "mxfp8"}, ("mxfp8", 8, 32)),
        (True, ("affine", 3, 128)),
        (None, ("affine", 3, 128)),
        (None, ("mxfp4", 4, 32)),  # told by its scales, as mlx-lm does
        (None, ("mxfp8", 8, 32)),
        (None, ("nvfp4", 4, 16)),
    ],
)
def test_what_is_said_of_a_module_counts(own: object, made: tuple[str, int, int]) -> None:
    mode, bits, group_size = made
    tensors = packed_tensors(mode, bits, group_size)
    said = {"group_size": 128, "bits": 3, "mode": "affine"} | ({} if own is None else {"a.b": own})
    ((name, found),) = dequantized_tensors(tensors, {"quantization": said})
    assert name == "a.b.weight"
    assert_same_bits(found, dequantize(*tensors.values(), group_size=group_size, bits=bits, mode=mode))


FOUR = {"group_size": 64, "bits": 4}


@pytest.mark.parametrize(
    ("config", "without", "words"),
    [
        ({"quantization": {**FOUR, "a.b": False}}, "", "a.b: has scales, but config.json says that it is not"),
        ({}, "", "a.b: has scales, but config.json says that it is not quantized"),
        ({"quantization": {**FOUR, "a.b": 4}}, "", "a.b: config.json: its quantization is 4"),
        ({"quantization": 4}, "", "config.json: quantization is 4, expected an object"),
        ({"quantization": {"bits": 3, "group_size": 64}}, "", "a.b: the shapes do not belong together, with 3 bits"),
        ({"quantization": {**FOUR, "mode": ["affine"]}}, "", "a.b: quantization mode ['affine']"),
        ({"quantization": FOUR}, "scales", "a.b: is quantized, but a.b.scales is missing"),
        ({"quantization": FOUR}, "biases", "a.b: no biases, which affine has"),
        ({"quantization_config": {"quant_method": "gptq"}}, "", "config.json: quantized by 'gptq', expected"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(config: dict[str, Any], without: str, words: str) -> None:
    tensors = {name: array for name, array in packed_tensors().items() if not name.endswith(without or "-")}
    with pytest.raises(InputRefused) as caught:
        list(dequantized_tensors(tensors, json.loads(json.dumps(config))))
    assert caught.value.message.startswith(words)


def test_a_tensor_of_a_modules_own_name_is_another_one() -> None:
    tensors = {"a.b": np.float32([1]), **packed_tensors(), "c.scales": np.float32([2])}
    assert [name for name, _ in dequantized_tensors(tensors, {"quantization": FOUR})] == [
        "a.b",
        "a.b.weight",
        "c.scales",
    ]
