"""Greedy removal of blocks by the loss without them: SLEB (arXiv:2402.09025), BlockPruner (arXiv:2406.10594)."""

from saap_jax.config.search import PerStructure, SearchConfig
from saap_jax.recipes.base import Recipe

_STEP = 0.001
"""Less than a block of the models that there are (attention of one of 80 layers with few KV heads: 0.002), so that one
goes, and then all that are left are tried again."""


def _search(whole_layers: bool) -> SearchConfig:
    nothing = PerStructure(attention=0, mlp=0)
    return SearchConfig(
        allocation="global", rank_by="score", depth=True, min_keep=nothing, rescore_every=_STEP,
        whole_layers=whole_layers,
    )  # fmt: skip


RECIPES = {
    "sleb": Recipe(
        title="SLEB: the layer whose removal raises the loss least goes, again and again",
        paper="arXiv:2402.09025",
        estimator="block_ablation(granularity='layer')",
        search=_search(whole_layers=True),
        calibration="128 windows of WikiText-2 (training part)",
    ),
    "blockpruner": Recipe(
        title="BlockPruner: the attention or MLP whose removal raises the loss least goes, again and again",
        paper="arXiv:2406.10594",
        estimator="block_ablation",
        search=_search(whole_layers=False),
        calibration="256 windows of Alpaca",
    ),
}
