"""Methods that go by what least squares cannot put back: OSSCAR, SlimGPT, and MoDeGPT of the MLP."""

from saap_jax.recipes.base import GROUPED, Recipe, refitted

_SIXTEEN = "Sixteen coordinates, or one head, go at once; {}."
_HEADS = "Heads that go are rounded down to whole ones, and channels make up for it; the code {}."

_OSSCAR = Recipe(
    title="OSSCAR: greedy removal by optimal brain surgeon, then swaps while the error of the output falls",
    paper="arXiv:2403.12983",
    chain="obs > uniform(floor=True) > layerwise(obs_swaps)",
    calibration="128 windows of 2,048 tokens of C4",
    deviations=(
        "Units are swapped one by one, out by the least cost and in by the most gain, an eighth as many as there "
        "are at most; the paper's search swaps several at a time.",
        _SIXTEEN.format("by default of the code, ten channels or two heads"),
        _HEADS.format("rounds down those that stay"),
        "The MLP of a layer is looked at behind its pruned attention; the code looks at both and then prunes both.",
        GROUPED,
    ),
)
_SLIMGPT = Recipe(
    title="SlimGPT: greedy removal by optimal brain surgeon, shares that grow with the logarithm of the depth",
    paper="arXiv:2412.18110",
    chain="obs > log > layerwise(obs)",
    calibration="256 windows of 2,048 tokens of C4",
    deviations=(
        "The share grows with log(layer + 1) from the least at which the ratio can be met, which is 0 where that "
        "suffices; the paper does not state the share of its first layer, which is set by hand. The one command of its "
        "code, LLaMA-7B at 20 %, goes from 6.25 to 25 %.",
        _SIXTEEN.format("the code takes 64 to 1,024 channels"),
        _HEADS.format("rounds to the nearest number, and has the same share for the MLP"),
        GROUPED,
    ),
)
_MODEGPT = Recipe(
    title="MoDeGPT of the MLP: the largest ridge leverage stays, shares by softmax of block influence, refitted",
    paper="arXiv:2408.09632",
    chain=(
        "block_influence(granularity=layer) > within(max_ratio={attention: 0}) > softmax(0.1) > layerwise(leverage)"
    ),
    calibration="128 windows of 2,048 tokens of WikiText-2 (training part)",
    deviations=(
        "Attention stays whole: the paper decomposes its matrices, which is no selection of units.",
        "The temperature is 0.1 for all models, where the paper has one for each; a layer keeps one channel.",
        "The ridge of the leverage is 0.01 of the mean of the diagonal; the paper's λ is a number of its own.",
        "Layers are observed behind those that were pruned; others who wrote it down observe the unpruned model.",
    ),
)

RECIPES = {
    "osscar": refitted(
        _OSSCAR,
        0.01,
        "The ridge is 0.01 of the mean of the diagonal, as by default of the code.",
    ),
    "slimgpt": refitted(_SLIMGPT, 0.01, "The ridge is 0.01 of the mean of the diagonal, as in the code."),
    "modegpt-mlp": refitted(
        _MODEGPT,
        0.0001,
        "The refit, (SᵀCS)⁻¹ SᵀCW, has no ridge; here it has 0.0001 of the mean of the diagonal, for 32 bits.",
    ),
}
