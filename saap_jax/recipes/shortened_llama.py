"""Shortened LLaMA (Kim et al., arXiv:2402.02834): whole layers go at once, by one of two criteria."""

from saap_jax.recipes.base import Recipe

_TEXT = "10 windows of 128 tokens of BookCorpus"

RECIPES = {
    "shortened-llama-ppl": Recipe(
        title="Shortened LLaMA, PPL: the layers without each of which alone the loss is lowest go at once",
        paper="arXiv:2402.02834",
        chain=(
            "block_ablation(granularity=layer) > within(depth=True, whole_layers=True, min_keep=0) > global(by=score)"
        ),
        calibration=_TEXT,
    ),
    "shortened-llama-taylor": Recipe(
        title="Shortened LLaMA, Taylor+: the layers of the smallest sum of |w ∂w| go, the first four and last two stay",
        paper="arXiv:2402.02834",
        chain=(
            "taylor_element(within=layer) > "
            "within(depth=True, whole_layers=True, min_keep=0, protect=(0.13, -0.07)) > global(by=score)"
        ),
        calibration=_TEXT,
        deviations=("Four and two layers are of 32; of other depths as large a share is left alone.",),
    ),
}
