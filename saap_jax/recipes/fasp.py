"""FASP (Hu et al., arXiv:2501.09412): Wanda's metric by columns, least squares for what is left."""

from saap_jax.recipes.base import CORRECTED, Recipe

RECIPES = {
    "fasp-mlp": Recipe(
        title="FASP of the MLP: channels by Wanda's metric, the same share of every layer, least squares",
        paper="arXiv:2501.09412",
        chain="wanda > within(max_ratio={attention: 0}) > uniform > layerwise(wanda) > least_squares(tokens=equal)",
        calibration="128 windows of 2,048 tokens of WikiText-2",
        deviations=(
            "FASP removes single coordinates of value and output too; units of attention here are heads, which stay.",
            CORRECTED,
        ),
    ),
}
