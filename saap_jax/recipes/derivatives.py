"""Methods that go by derivatives of the loss by weights or gates: LLM-Pruner, GISP, GRASPrune."""

from saap_jax.recipes.base import Published, Recipe


def _llm_pruner(taylor: str, title: str, estimator: str, published: tuple[Published, ...] = ()) -> Recipe:
    """One of the values of `--taylor`."""
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
    "llm-pruner-vectorize": _llm_pruner("vectorize", "vector-wise, first order", "taylor_vector(within=channel)"),
    "llm-pruner-param-first": _llm_pruner("param_first", "element-wise, first order", "taylor_element", _ELEMENT),
    "llm-pruner-param-second": _llm_pruner("param_second", "element-wise, second order", "fisher"),
    "llm-pruner-param-mix": _llm_pruner("param_mix", "element-wise, first and second order", "taylor_element_second"),
    "gisp": Recipe(
        title="GISP: |w ∂w| of a unit over sizes of its block, one ranking, estimated again after every small step",
        paper="arXiv:2510.18030",
        chain=(
            "taylor_element(within=block) > within(min_keep=0, protect=(0, 1, 2, -1)) > global(by=score) > "
            "rounds(0.7/112)"
        ),
        calibration="2,000 windows of 256 tokens of C4, or answers of tasks",
        deviations=(
            "Its text objective only, the next-token loss; that for answers, a margin, is not here.",
            "A KV head goes with all its query heads, by the mean of their scores. Where query heads share one, the "
            "code masks query heads and leaves key and value; these are not in its scores, nor here, but go.",
            "112 steps lead to 70 %, as in the published configurations of models of 7 or 8 billion parameters; lower "
            "ratios are read on the way. Steps are of the prunable parameters, not of the number of units.",
            "The first tenth of the layers and the last stay, as in the code: of a model of 30 to 39 layers.",
        ),
    ),
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
"""Published perplexities are left out: the window they were measured on is not stated with them."""
