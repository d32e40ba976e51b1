"""OSSCAR (Meng et al., arXiv:2403.12983): the surgeon's greedy removal, then a local search by swaps."""

from saap_jax.recipes.base import CORRECTED, Recipe

RECIPES = {
    "osscar": Recipe(
        title="OSSCAR: greedy removal by optimal brain surgeon, then swaps while the error of the output falls",
        paper="arXiv:2403.12983",
        chain="obs > uniform(floor=True) > layerwise(obs_swaps) > least_squares(tokens=equal)",
        calibration="128 windows of 2,048 tokens of C4",
        deviations=(
            "Units are swapped one by one, out by the least cost and in by the most gain, an eighth as many as there "
            "are at most; the paper's search swaps several at a time.",
            CORRECTED,
        ),
    ),
}
