"""ShortGPT (Men et al., arXiv:2403.03853): whole layers go, by how little they turn the residual stream."""

from saap_jax.config.search import PerStructure, SearchConfig
from saap_jax.recipes.base import Recipe

RECIPES = {
    "shortgpt": Recipe(
        title="ShortGPT: layers of the lowest block influence go",
        paper="arXiv:2403.03853",
        estimator="block_influence(granularity='layer')",
        search=SearchConfig(
            allocation="global",
            rank_by="score",
            depth=True,
            whole_layers=True,
            min_keep=PerStructure(attention=0, mlp=0),
        ),
        calibration="windows of PG19",
    ),
}
