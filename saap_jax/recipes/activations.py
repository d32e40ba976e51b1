"""Methods that go by activations and the weights that they meet: Wanda-sp, FASP, FLAP, Minitron."""

from saap_jax.recipes.base import GROUPED, Published, Recipe, refitted

_FASP = Recipe(
    title="FASP of the MLP: channels by Wanda's metric, the same share of every layer, least squares",
    paper="arXiv:2501.09412",
    chain="wanda > within(max_ratio={attention: 0}) > uniform > layerwise(wanda)",
    calibration="128 windows of 2,048 tokens of WikiText-2",
    deviations=(
        "FASP removes single coordinates of value and output too; units of attention here are heads, which stay.",
    ),
)

RECIPES = {
    "wanda-sp": Recipe(
        title="Wanda-sp: Wanda's metric added up to units, the same share of every layer",
        paper="arXiv:2312.11983",
        chain="wanda > uniform(floor=True) > layerwise(wanda, tokens=equal)",
        calibration="128 windows of 128 tokens of C4",
        deviations=(
            GROUPED,
            "The MLP of a layer is looked at behind its pruned attention; the code prunes both and then goes on.",
            "Heads are rounded down to whole ones, as in the code; channels make up for it, so that the budget is met.",
        ),
    ),
    "fasp-mlp": refitted(
        _FASP,
        0.01,
        "The ridge is 0.01 of the mean of the diagonal, towards the old weights; the paper's is a small δ, towards 0.",
    ),
    "flap": Recipe(
        title="FLAP, WIFV, adaptive over layers and modules (`AL-AM`), with its bias",
        paper="arXiv:2312.11983",
        chain=(
            "fluctuation(standardize=True) > within(min_keep=0) > global(by=score) > "
            "bias(propagate=dense, tokens=equal)"
        ),
        calibration="1,024 windows of 128 tokens of WikiText-2 (training part)",
        deviations=("A KV head goes with all its query heads; its score is the mean over all their coordinates.",),
        published=(
            Published(model="LLaMA-7B", ratio=0.2, metric="WikiText-2 ppl@128", value=14.62, dense=12.62),
            Published(model="LLaMA-7B", ratio=0.5, metric="WikiText-2 ppl@128", value=31.80, dense=12.62),
        ),
    ),
    "minitron": Recipe(
        title="Minitron, width of attention and MLP: mean over tokens, L2 over examples, of activations",
        paper="arXiv:2407.14679",
        chain="activation_norm(tokens=mean, examples=l2) > uniform",
        calibration="1,024 windows of the pre-training text",
        deviations=(
            "A KV head goes with all its query heads.",
            "Channels of the residual stream and depth stay; sizes are not searched for, nor is anything distilled.",
            "Channels are scored behind the activation function, where they meet the matrix that writes.",
        ),
    ),
}
