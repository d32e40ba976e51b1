"""GISP (Wang et al., arXiv:2510.18030): first-order scores of units a weight, one ranking, in many small steps."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "gisp": Recipe(
        title="GISP: mean of |w ∂w| over a unit's weights, one ranking, estimated again after every small step",
        paper="arXiv:2510.18030",
        chain="taylor_element > within(min_keep=0, protect=(0, 1, 2, -1)) > global > rounds(0.7/112)",
        calibration="2,000 windows of 256 tokens of C4, or answers of tasks",
        deviations=(
            "Its text objective only, the next-token loss; that for answers, a margin, is not here.",
            "A unit is divided by its own number of weights; the code divides a channel of the MLP by three times the "
            "width of the MLP instead of the model's.",
            "A KV head goes with all its query heads; where query heads share one, the code masks query heads and does "
            "not count key and value.",
            "112 steps lead to 70 %, as in the published configurations of models of 7 or 8 billion parameters; lower "
            "ratios are read on the way. Steps are of the prunable parameters, not of the number of units.",
            "The first tenth of the layers and the last stay, as in the code: of a model of 30 to 39 layers.",
        ),
    ),
}
"""Published perplexities are left out: the window they were measured on is not stated with them."""
