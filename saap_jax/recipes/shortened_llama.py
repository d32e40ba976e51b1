"""Shortened LLaMA (Kim et al., arXiv:2402.02834): whole layers go at once, by one of two criteria."""

import dataclasses

from saap_jax.config.search import PROTECTED, PerStructure, SearchConfig
from saap_jax.recipes.base import Recipe

_LAYERS = SearchConfig(
    allocation="global", rank_by="score", depth=True, whole_layers=True, min_keep=PerStructure(attention=0, mlp=0)
)
_TEXT = "10 windows of 128 tokens of BookCorpus"

RECIPES = {
    "shortened-llama-ppl": Recipe(
        title="Shortened LLaMA, PPL: the layers without each of which alone the loss is lowest go at once",
        paper="arXiv:2402.02834",
        estimator="block_ablation(granularity='layer')",
        search=_LAYERS,
        calibration=_TEXT,
    ),
    "shortened-llama-taylor": Recipe(
        title="Shortened LLaMA, Taylor+: the layers of the smallest sum of |w ∂w| go, the first four and last two stay",
        paper="arXiv:2402.02834",
        estimator="taylor_element(within='layer')",
        search=dataclasses.replace(_LAYERS, skip_layers=PROTECTED),
        calibration=_TEXT,
        deviations=("Four and two layers are of 32; of other depths as large a share is left alone.",),
    ),
}
