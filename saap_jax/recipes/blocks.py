"""Greedy removal of blocks by the loss without them: SLEB (arXiv:2402.09025), BlockPruner (arXiv:2406.10594)."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "sleb": Recipe(
        title="SLEB: the layer whose removal raises the loss least goes, again and again",
        paper="arXiv:2402.09025",
        chain=(
            "block_ablation(granularity=layer) > within(depth=True, whole_layers=True, min_keep=0) > "
            "global(by=score) > rounds(0.001)"
        ),
        calibration="128 windows of WikiText-2 (training part)",
    ),
    "blockpruner": Recipe(
        title="BlockPruner: the attention or MLP whose removal raises the loss least goes, again and again",
        paper="arXiv:2406.10594",
        chain="block_ablation > within(depth=True, min_keep=0) > global(by=score) > rounds(0.001)",
        calibration="256 windows of Alpaca",
    ),
}
