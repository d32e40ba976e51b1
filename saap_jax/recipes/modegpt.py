"""MoDeGPT (Lin et al., arXiv:2408.09632), its part for the MLP: ridge leverage, shares by block influence."""

from saap_jax.recipes.base import CORRECTED, Recipe

RECIPES = {
    "modegpt-mlp": Recipe(
        title="MoDeGPT of the MLP: the largest ridge leverage stays, shares by softmax of block influence, refitted",
        paper="arXiv:2408.09632",
        chain=(
            "block_influence(granularity=layer) > within(max_ratio={attention: 0}) > softmax(0.1) > "
            "layerwise(leverage) > least_squares(tokens=equal)"
        ),
        calibration="128 windows of 2,048 tokens of WikiText-2 (training part)",
        deviations=(
            "Attention stays whole: the paper decomposes its matrices, which is no selection of units.",
            "The temperature is 0.1 for all models, where the paper has one for each; a layer keeps one channel.",
            "The ridge is relative to the mean of the diagonal, and layers are observed behind those that were pruned.",
            CORRECTED,
        ),
    ),
}
