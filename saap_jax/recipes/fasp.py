"""FASP (Hu et al., arXiv:2501.09412): Wanda's metric by columns, least squares for what is left."""

from saap_jax.config.method import CompensationConfig, SearchConfig, SharePerStructure
from saap_jax.recipes.base import Recipe

RECIPES = {
    "fasp-mlp": Recipe(
        title="FASP of the MLP: channels by Wanda's metric, the same share of every layer, least squares",
        paper="arXiv:2501.09412",
        estimator="wanda",
        search=SearchConfig(allocation="uniform", max_ratio=SharePerStructure(attention=0.0, mlp=1.0)),
        compensation=CompensationConfig(method="least_squares", propagate="pruned"),
        calibration="128 windows of 2,048 tokens of WikiText-2",
        deviations=(
            "FASP removes single coordinates of value and output too; units of attention here are heads, which stay.",
            "The damping is chosen on windows that are held out, and tokens weigh 1 / mean(x²) of the stream.",
            "Channels are chosen on activations of the unpruned model, FASP's on those of the model pruned so far.",
        ),
    ),
}
