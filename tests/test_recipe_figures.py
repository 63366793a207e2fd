"""What the figures in the headers of the recipes are reckoned with: the shapes of the bases, and the straight line."""

from __future__ import annotations

import re

import pytest

from mlxsft.recipe import load_recipe
from mlxsft.recipe_shipped import ShippedRecipe
from tests.benchmarks import recipes
from tests.benchmarks.recipes import all_layers, counted, tried
from tests.test_recipe_shipped import RECIPES

SIZED = [r for r in RECIPES.values() if any(name in r.base for name in recipes.SHAPES)]


@pytest.mark.parametrize("recipe", SIZED, ids=lambda recipe: recipe.name)
def test_the_shape_of_a_base_has_the_bytes_that_the_header_needs(recipe: ShippedRecipe) -> None:
    base = counted(recipe.base)
    if said := re.match(r"([\d.]+) GB", recipe.parts["Needs"]):
        assert base.weight_bytes / 1e9 == pytest.approx(float(said[1]), abs=0.05)
    else:
        assert recipe.name == "dolly"
        assert base.parameters == pytest.approx(1.5e9, rel=0.02)


@pytest.mark.long  # three trials each
@pytest.mark.parametrize("name", ["customer-support", "small-memory"])
def test_trials_with_few_layers_tell_that_with_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To about a fifth: a peak depends on how far MLX has computed when it takes memory for what comes next."""
    shown = RECIPES[name]
    (key,) = (key for key in recipes.SHAPES if key in shown.base)
    monkeypatch.setitem(recipes.SHAPES, key, (128, 512, 12, 4, 2, 32, 2400, True))
    monkeypatch.setattr(recipes, "VOCABULARY", 2000)
    recipe, base = load_recipe(shown.path), counted(shown.base)
    whole, few, more = (tried(shown, recipe, layers) for layers in (None, 1, 2))
    told = all_layers(few, more, base, recipes.tuned(recipe, base))
    assert more.peak_bytes < 0.9 * whole.peak_bytes
    assert 0.8 < told.peak_bytes / whole.peak_bytes < 1.25
