"""Wanda-sp: Wanda's metric (Sun et al., arXiv:2306.11695) summed to units, the baseline of FLAP (arXiv:2312.11983)."""

from saap_jax.config.method import SearchConfig
from saap_jax.recipes.base import Recipe

RECIPES = {
    "wanda-sp": Recipe(
        title="Wanda-sp: Wanda's metric added up to units, the same share of every layer",
        paper="arXiv:2312.11983",
        estimator="wanda",
        search=SearchConfig(allocation="uniform_floor"),
        calibration="1,024 windows of 128 tokens of WikiText-2 (training part)",
        deviations=(
            "Activations are those of the unpruned model; the code prunes a layer before it looks at the next.",
            "Heads are rounded down to whole ones, as in the code; channels make up for it, so that the budget is met.",
        ),
    ),
}
