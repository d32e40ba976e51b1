"""LLM-Pruner (Ma et al., arXiv:2305.11627): Taylor scores of coupled units, the same share of each pruned layer."""

from saap_jax.recipes.base import Published, Recipe


def _recipe(taylor: str, title: str, estimator: str, published: tuple[Published, ...] = ()) -> Recipe:
    """Return the recipe of one of the values of `--taylor`."""
    return Recipe(
        title=f"LLM-Pruner, {title} (`{taylor}`)",
        paper="arXiv:2305.11627",
        chain=f"{estimator} > within(protect=(0.13, -0.07)) > uniform(floor=True)",
        calibration="10 windows of 64 tokens of BookCorpus",
        deviations=(
            "A KV head goes with all its query heads, and is scored with exactly those that read it.",
            "The first four and the last two of 32 layers are left alone, and of other depths as large a share.",
            "Heads are rounded down to whole ones, as in the code; channels make up for it, so that the budget is met.",
        ),
        published=published,
    )


def _published(ratio: float, perplexity: float, dense: float, text: str, about: str = "") -> Published:
    return Published(
        model="LLaMA-7B", ratio=ratio, metric=f"{text} ppl@128", value=perplexity, dense=dense, about=about
    )


_ELEMENT = (
    _published(0.2, 19.09, 12.62, "WikiText-2"),
    _published(0.2, 34.21, 22.14, "Penn Treebank"),
    _published(0.2, 17.58, 12.62, "WikiText-2", "after LoRA"),
    _published(0.5, 112.44, 12.62, "WikiText-2"),
    _published(0.5, 38.12, 12.62, "WikiText-2", "after LoRA"),
)

RECIPES = {
    "llm-pruner-vectorize": _recipe("vectorize", "vector-wise, first order", "taylor_vector(within=channel)"),
    "llm-pruner-param-first": _recipe("param_first", "element-wise, first order", "taylor_element", _ELEMENT),
    "llm-pruner-param-second": _recipe("param_second", "element-wise, second order", "fisher"),
    "llm-pruner-param-mix": _recipe("param_mix", "element-wise, first and second order", "taylor_element_second"),
}
