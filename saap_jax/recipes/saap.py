"""SAAP (Zheng et al., arXiv:2412.15127) as its paper reads, and what `saap prune` does by default."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "saap": Recipe(
        title="The defaults of `saap prune`: scores as `saap-scores`, heads beyond 30 % only, then least squares",
        paper="arXiv:2412.15127",
        chain=(
            "fused > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3) > uniform > "
            "rounds(0.1) > least_squares"
        ),
        calibration="32 windows of 128 tokens",
        deviations=("What docs/arena.md found to go best, in the frame of the paper; not the paper's own choice.",),
    ),
    "saap-scores": Recipe(
        title="Fused scores of channels, heads by gate_fisher, estimated again; nothing makes up for what goes",
        paper="arXiv:2412.15127",
        chain="fused > within(protect=(0.13, -0.07), attention=0.1) > uniform > rounds(0.1)",
        calibration="32 windows of 128 tokens",
        deviations=("What docs/study.md found to go best, in the frame of the paper; not the paper's own choice.",),
    ),
    "saap-paper": Recipe(
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
