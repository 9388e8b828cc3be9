"""Recipes: what is done to a model, as text, in the format of llm-compressor."""

from fxcalib.recipes.reading import Recipe, load_recipe
from fxcalib.recipes.writing import dump_recipe, settings_of

__all__ = ["Recipe", "dump_recipe", "load_recipe", "settings_of"]
