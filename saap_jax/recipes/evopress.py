"""EvoPress (Sieberling et al., arXiv:2410.14649), its depth pruning: which attentions and MLPs go, by evolution."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "evopress": Recipe(
        title="EvoPress, depth: attentions and MLPs that go, by evolution towards the unpruned model's predictions",
        paper="arXiv:2410.14649",
        chain="block_influence > within(depth=True, min_keep=0) > global(by=score) > evolve(15, microbatches=(1, 3))",
        calibration="windows of FineWeb-Edu",
        deviations=(
            "It begins with what block influence of sub-blocks chooses, which also says how many of either kind go; "
            "the paper begins with the best of some random states.",
            "15 generations of 16 children; the paper has hundreds, of 32, on far more text.",
            "A quarter of the text is held out, and says at the end whether the outcome is better than the start.",
        ),
    ),
}
