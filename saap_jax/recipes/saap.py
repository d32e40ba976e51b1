"""SAAP (Zheng et al., arXiv:2412.15127), as its paper reads."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "saap": Recipe(
        title="SAAP: vector- and element-wise Taylor scores fused, ranked with the stability indicator",
        paper="arXiv:2412.15127",
        chain=(
            "fused(taylor_vector, taylor_element, attention=fused) > within(protect=(0.13, -0.07)) > "
            "stable(-0.25) > global(by=score)"
        ),
        calibration="windows of BookCorpus, as LLM-Pruner",
        deviations=(
            "The paper leaves the weight of the indicator open, and its sign: here the unstable goes (λ = -1/4).",
            "The indicator is that of |∂ℒ_n/∂g| over examples.",
            "Its closed form takes the place of gradient steps on σ, one for attention and one for MLPs.",
            "Heads and channels are ranked by that score, as it is; the paper does not weigh it by parameters.",
            "The first four and the last two of 32 layers are left alone, and of other depths as large a share.",
        ),
    ),
}
