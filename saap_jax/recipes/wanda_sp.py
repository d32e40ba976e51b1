"""Wanda-sp: Wanda's metric (Sun et al., arXiv:2306.11695) summed to units, the baseline of FLAP (arXiv:2312.11983)."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "wanda-sp": Recipe(
        title="Wanda-sp: Wanda's metric added up to units, the same share of every layer",
        paper="arXiv:2312.11983",
        chain="wanda > uniform(floor=True) > layerwise(wanda, tokens=equal)",
        calibration="1,024 windows of 128 tokens of WikiText-2 (training part)",
        deviations=(
            "The MLP of a layer is looked at behind its pruned attention; the code prunes both and then goes on.",
            "Heads are rounded down to whole ones, as in the code; channels make up for it, so that the budget is met.",
        ),
    ),
}
