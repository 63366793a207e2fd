"""Plans: who gets how many bits, and what cannot be asked for."""

from __future__ import annotations

import pytest

from mlxsft.backends.mlx import mx
from mlxsft.backends.mlx_convert import quantized_in_blocks
from mlxsft.errors import UsageError
from mlxsft.models.quantize import QuantizationPlan, QuantizeSettings, Scheme, make_plan, parse_bits_for, scheme

SHAPES = {
    "model.embed_tokens": (320, 64),
    "model.layers.0.mlp.down_proj": (64, 128),
    "model.layers.1.mlp.down_proj": (64, 128),
    "model.layers.10.mlp.down_proj": (64, 128),
    "model.layers.0.odd": (64, 40),
    "lm_head": (320, 64),
}
FOUR = Scheme(4, 64)


def plan(text: str = "", default: Scheme = FOUR) -> QuantizationPlan:
    return make_plan(default, dict.fromkeys(SHAPES, default), SHAPES, parse_bits_for(text))


def test_a_plan_names_what_divides_into_groups() -> None:
    assert plan().modules == {path: FOUR for path in SHAPES if path != "model.layers.0.odd"}
    assert plan().block() == {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("lm_head=8,embed_tokens=6", {"lm_head": 8, "model.embed_tokens": 6}),
        ("layers.1=3", {"model.layers.1.mlp.down_proj": 3}),  # and not layer 10
        ("down_proj=2, layers.0.mlp=8", {f"model.layers.{i}.mlp.down_proj": b for i, b in ((0, 8), (1, 2), (10, 2))}),
        ("model=8,model.layers=5", {"model.embed_tokens": 8} | {p: 5 for p in SHAPES if p.endswith("down_proj")}),
    ],
)
def test_bits_for_names_parts_of_paths_and_the_last_one_counts(text: str, bits: dict[str, int]) -> None:
    shapes = {path: shape for path, shape in SHAPES.items() if shape[-1] != 40}
    found = make_plan(FOUR, dict.fromkeys(shapes, FOUR), shapes, parse_bits_for(text))
    assert {path: s.bits for path, s in found.modules.items()} == dict.fromkeys(shapes, 4) | bits
    entries = {path: {"group_size": 64, "bits": b, "mode": "affine"} for path, b in bits.items()}
    assert found.block() == FOUR.entry() | entries


def test_sixteen_bits_are_the_numbers_themselves() -> None:
    assert "lm_head" not in plan("lm_head=16").modules
    assert "model.layers.0.odd" not in plan("odd=16").modules


def test_another_mode_takes_the_bits_it_has() -> None:
    found = plan("lm_head=8", Scheme(4, 32, "mxfp4")).modules
    assert found["lm_head"] == Scheme(8, 32, "affine")
    assert plan("lm_head=8", Scheme(4, 16, "nvfp4")).modules["lm_head"] == Scheme(8, 64, "affine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "lm_haed=8,embed_token=4",
            "nothing to quantize is named lm_haed, embed_token; did you mean lm_head, embed_tokens?",
        ),
        ("layers.0=8", "its rows of 40 numbers do not divide into groups of 64"),
        ("lm_head", "expected NAME=BITS"),
        ("lm_head=7", "expected NAME=BITS"),
        ("lm_head=٤", "expected NAME=BITS"),
        ("=4", "expected NAME=BITS"),
    ],
)
def test_what_cannot_be(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        plan(text)
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (QuantizeSettings(bits=8, mode="mxfp4"), "--bits 8: mxfp4 has 4"),
        (QuantizeSettings(group_size=64, mode="nvfp4"), "--group-size 64: nvfp4 has 16"),
        (QuantizeSettings(group_size=16), "--group-size 16: affine has 32 or 64 or 128"),
        (QuantizeSettings(bits=7), "--bits 7"),
        (QuantizeSettings(bits=4, mixed="mixed_3_6"), "at once"),
        (QuantizeSettings(mode="mxfp8", mixed="mixed_3_6"), "--mixed mixed_3_6 with --mode mxfp8"),
        (QuantizeSettings(mode="int4"), "--mode int4"),
        (QuantizeSettings(mixed="mixed_1_2"), "--mixed mixed_1_2"),
    ],
)
def test_settings_at_odds(settings: QuantizeSettings, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        settings.default()
    assert words in refused.value.message


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("shape", [(700, 512), (3, 90, 1024), (1, 64), (5, 128)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_of_rows_are_what_mlx_makes_at_once(mode: str, shape: tuple[int, ...], dtype: str) -> None:
    weight = mx.random.normal(shape, key=mx.random.key(1)).astype(getattr(mx, dtype))
    wanted = scheme(None, None, mode)
    expected = mx.quantize(weight, **wanted.entry())
    for threads in (1, 2, 5):
        found = quantized_in_blocks(weight, wanted, threads)
        assert [a.dtype for a in found] == [a.dtype for a in expected]
        assert all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True))
