"""LLM-Pruner (Ma et al., arXiv:2305.11627): Taylor scores of coupled units, the same share of each pruned layer."""

from saap_jax.config.method import SearchConfig
from saap_jax.recipes.base import PROTECTED, Published, Recipe

_SEARCH = SearchConfig(allocation="uniform_floor", skip_layers=PROTECTED)
_CALIBRATION = "10 windows of 64 tokens of BookCorpus"
_DEVIATIONS = (
    "A KV head goes with all its query heads, and is scored with exactly those that read it.",
    "Heads are rounded down to whole ones, as in the code; channels make up for it, so that the budget is met.",
)


def _published(ratio: float, perplexity: float, dense: float, text: str, about: str = "") -> Published:
    return Published(
        model="LLaMA-7B", ratio=ratio, metric=f"{text} ppl@128", value=perplexity, dense=dense, about=about
    )


RECIPES = {
    "llm-pruner-vectorize": Recipe(
        title="LLM-Pruner, vector-wise, first order (`vectorize`)",
        paper="arXiv:2305.11627",
        estimator="taylor_vector(within='channel')",
        search=_SEARCH,
        calibration=_CALIBRATION,
        deviations=_DEVIATIONS,
    ),
    "llm-pruner-param-first": Recipe(
        title="LLM-Pruner, element-wise, first order (`param_first`)",
        paper="arXiv:2305.11627",
        estimator="taylor_element",
        search=_SEARCH,
        calibration=_CALIBRATION,
        deviations=_DEVIATIONS,
        published=(
            _published(0.2, 19.09, 12.62, "WikiText-2"),
            _published(0.2, 34.21, 22.14, "Penn Treebank"),
            _published(0.2, 17.58, 12.62, "WikiText-2", "after LoRA"),
            _published(0.5, 112.44, 12.62, "WikiText-2"),
            _published(0.5, 38.12, 12.62, "WikiText-2", "after LoRA"),
        ),
    ),
    "llm-pruner-param-second": Recipe(
        title="LLM-Pruner, element-wise, second order (`param_second`)",
        paper="arXiv:2305.11627",
        estimator="fisher",
        search=_SEARCH,
        calibration=_CALIBRATION,
        deviations=_DEVIATIONS,
    ),
    "llm-pruner-param-mix": Recipe(
        title="LLM-Pruner, element-wise, first and second order (`param_mix`)",
        paper="arXiv:2305.11627",
        estimator="taylor_element_second",
        search=_SEARCH,
        calibration=_CALIBRATION,
        deviations=_DEVIATIONS,
    ),
}
