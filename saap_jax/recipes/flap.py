"""FLAP (An et al., arXiv:2312.11983): fluctuation of activations, one standardised ranking, a bias for what went."""

from saap_jax.recipes.base import Published, Recipe

RECIPES = {
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
}
