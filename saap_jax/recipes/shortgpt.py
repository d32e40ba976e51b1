"""ShortGPT (Men et al., arXiv:2403.03853): whole layers go, by how little they turn the residual stream."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "shortgpt": Recipe(
        title="ShortGPT: layers of the lowest block influence go",
        paper="arXiv:2403.03853",
        chain=(
            "block_influence(granularity=layer) > within(depth=True, whole_layers=True, min_keep=0) > global(by=score)"
        ),
        calibration="windows of PG19",
    ),
}
