"""SAAP (Zheng et al., arXiv:2412.15127), as its paper reads."""

from saap_jax.recipes.base import GROUPED, Recipe


def _saap(title: str, weight: float, sign: str) -> Recipe:
    """With a weight λ of the stability indicator; with 0 that step is left out, and the pass that it takes."""
    stable = f"stable({weight}) > " if weight else ""
    indicator = (
        "The indicator is over examples; over several texts, as the paper has it too, use stable(over=scenarios).",
        "Attention and MLPs have a σ each, and are standardised apart.",
    )
    return Recipe(
        title=f"SAAP: vector- and element-wise Taylor scores fused, ranked {title}",
        paper="arXiv:2412.15127",
        chain=(
            "fused(taylor_vector(within=channel), taylor_element, attention=fused, method=learned) > "
            f"within(protect=(0.13, -0.07)) > {stable}global(by=score)"
        ),
        calibration="windows of BookCorpus, as LLM-Pruner",
        deviations=(
            sign,
            *(indicator if weight else ("Attention and MLPs have a σ each.",)),
            "Heads and channels are ranked by that score, as it is; the paper does not weigh it by parameters.",
            "The first four and the last two of 32 layers are left alone, and of other depths as large a share.",
            GROUPED,
            "Recovery, group-wise fine-tuning, is a command of its own.",
        ),
    )


RECIPES = {
    "saap": _saap(
        "with their stability; the unstable goes",
        -0.25,
        "The paper does not give the weight of the indicator: λ = -1/4.",
    ),
    "saap-stable-goes": _saap(
        "with their stability; the stable goes",
        0.25,
        "The paper removes what is unstable: here λ is 1/4 instead of -1/4.",
    ),
    "saap-no-stability": _saap(
        "without their stability",
        0.0,
        "The paper ranks importance with its stability: here λ is 0, which tells what the indicator brings.",
    ),
}
