"""GISP (Wang et al., arXiv:2510.18030): first-order scores of units a weight, one ranking, in many small steps."""

from saap_jax.config.search import PerStructure, SearchConfig
from saap_jax.recipes.base import Recipe

STEPS = 112
"""Of the published configurations of models of 7 or 8 billion parameters, to `FURTHEST`."""

FURTHEST = 0.7
"""Share of the units that the steps lead to; lower ratios are read on the way."""

RECIPES = {
    "gisp": Recipe(
        title="GISP: mean of |w ∂w| over a unit's weights, one ranking, estimated again after every small step",
        paper="arXiv:2510.18030",
        estimator="taylor_element",
        search=SearchConfig(
            allocation="global",
            rank_by="score_per_parameter",
            min_keep=PerStructure(attention=0, mlp=0),
            skip_layers=(0, 1, 2, -1),
            rescore_every=FURTHEST / STEPS,
        ),
        calibration="2,000 windows of 256 tokens of C4, or answers of tasks",
        deviations=(
            "Its text objective only, the next-token loss; that for answers, a margin, is not here.",
            "A unit is divided by its own number of weights; the code divides a channel of the MLP by three times the "
            "width of the MLP instead of the model's.",
            "A KV head goes with all its query heads; where query heads share one, the code masks query heads and does "
            "not count key and value.",
            "Steps are of the prunable parameters, not of the number of units.",
            "The first tenth of the layers and the last stay, as in the code: of a model of 30 to 39 layers.",
        ),
    ),
}
"""Published perplexities are left out: the window they were measured on is not stated with them."""
