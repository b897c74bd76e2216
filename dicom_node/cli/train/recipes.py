"""`dicom-node train recipes`: what there is to train by."""

from __future__ import annotations

from dicom_node.cli.common import console, safe, table
from dicom_node.cli.train import app
from dicom_node.cli.train.common import refused


@app.command("recipes")
def recipes() -> None:
    """The recipes and ablations that ship with the product; a TOML file of your own does as well."""
    with refused():
        from training.ablation import load_ablation, shipped_ablations
        from training.recipe import load_recipe, shipped_recipes

        shown = table("recipes", "name", "profile", "generators", "length", "statement")
        for name in shipped_recipes():
            recipe = load_recipe(name)
            sizes = f"{recipe.model.pix2pix.architecture} {recipe.model.pix2pix.width}"
            sizes += f", {recipe.model.cyclegan.architecture} {recipe.model.cyclegan.width}"
            epochs = recipe.train.epochs
            length = f"{epochs} epochs" if epochs else f"{sum(recipe.train.steps['pix2pix'].values())} steps"
            shown.add_row(*(safe(cell) for cell in (name, recipe.profile, sizes, length, recipe.statement)))
        console.print(shown)
        shown = table("ablations", "name", "title", "base", "variants")
        for name in shipped_ablations():
            ablation = load_ablation(name)
            variants = "; ".join(variant.name for variant in ablation.variant)
            shown.add_row(*(safe(cell) for cell in (name, ablation.title, ablation.base, variants)))
        console.print(shown)
