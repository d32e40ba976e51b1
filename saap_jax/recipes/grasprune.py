"""GRASPrune (Wang et al., arXiv:2604.19398): gates learnt under the exact budget, then one scale a unit."""

from saap_jax.recipes.base import Published, Recipe

RECIPES = {
    "grasprune": Recipe(
        title="GRASPrune: probabilities of units learnt by a projected straight-through estimator, then scales",
        paper="arXiv:2604.19398",
        chain="gate_taylor > global > learn(48, rate=0.1, rule=sigmoid, language_loss=1.0) > scales",
        calibration="512 windows, four rounds",
        deviations=(
            "It begins with what first derivatives of gates choose, at probabilities of 3/4 and 1/4.",
            "48 steps of one microbatch at a rate of 0.1 that falls to 0, whatever the amount of text, of which a "
            "quarter is held out and says which round counts.",
            "The weight of the language loss, all rates and the size of batches are ours.",
            "Scales are trained towards the unpruned model's predictions alone.",
        ),
        published=(
            Published(
                model="LLaMA-2-7B",
                ratio=0.5,
                metric="WikiText-2 ppl@4096",
                value=12.18,
                dense=5.12,
                about="512 windows, four rounds, no training of weights",
            ),
        ),
    ),
}
