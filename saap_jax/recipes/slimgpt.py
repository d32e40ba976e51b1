"""SlimGPT (Ling et al., arXiv:2412.18110): the optimal brain surgeon in batches, deeper layers lose more."""

from saap_jax.recipes.base import CORRECTED, Recipe

RECIPES = {
    "slimgpt": Recipe(
        title="SlimGPT: greedy removal by optimal brain surgeon, shares that grow with the logarithm of the depth",
        paper="arXiv:2412.18110",
        chain="obs > log > layerwise(obs) > least_squares(tokens=equal)",
        calibration="256 windows of 2,048 tokens of C4",
        deviations=(
            "The first layer loses nothing and the share grows with log(layer + 1); the paper starts at a share that "
            "is set by hand.",
            CORRECTED,
        ),
    ),
}
