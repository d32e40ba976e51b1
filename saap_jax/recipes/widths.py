"""Methods that say how wide layers become, or which sub-blocks they keep, by more than one score: ZipLM, 2SSP."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "ziplm-no-search": Recipe(
        title="ZipLM, at once: widths of all layers by errors relative to those of removing everything, then refitted",
        paper="arXiv:2302.04089",
        chain=(
            "obs > normalize(within=sub_block) > within(min_keep=0) > global > "
            "least_squares(propagate=dense, tokens=equal, damping=0.01)"
        ),
        calibration="2,048 samples of the training text",
        deviations=(
            "The budget is of parameters, where the paper has a table of times.",
            "Every width is possible, where the paper has some and solves by dynamic programming: with costs that grow "
            "from unit to unit, taking the least error a parameter is its optimum, but for the last block.",
            "Each sub-block's error counts alike, hence the name; the paper searches weights of them by the loss of "
            "the pruned model, at random.",
            "Sixteen channels go at once; in the code one goes at a time, and errors are measured.",
            "The damping of the refit is relative to each coordinate's energy, that of the errors to their mean; the "
            "code damps only what cannot be inverted.",
        ),
    ),
    "two-ssp": Recipe(
        title="2SSP: channels by norms of activations, each layer alike, then whole attentions by greedy perplexity",
        paper="arXiv:2501.17771",
        chain="activation_norm > within(max_ratio={attention: 0}) > uniform > attentions(examples=16)",
        calibration="256 windows of 2,048 tokens of C4 for channels, one for attentions",
        deviations=(
            "Attentions are judged on the first 16 windows: of 128 tokens, they have as many as the paper's one.",
            "Where channels cannot make up what equation 5 leaves to them, more attentions go than it says.",
        ),
    ),
}
