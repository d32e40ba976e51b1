"""Methods that remove whole layers, or whole attentions and MLPs."""

from saap_jax.recipes.base import Recipe

_TEXT = "10 windows of 128 tokens of BookCorpus"
_FOUR_AND_TWO = "The first four and the last two layers stay by default of the code, of 32; elsewhere as large a share."

RECIPES = {
    "shortgpt": Recipe(
        title="ShortGPT: layers of the lowest block influence go",
        paper="arXiv:2403.03853",
        chain=(
            "block_influence(granularity=layer) > within(depth=True, whole_layers=True, min_keep=0) > global(by=score)"
        ),
        calibration="windows of PG19",
    ),
    "shortened-llama-ppl": Recipe(
        title="Shortened LLaMA, PPL: the layers go without which, each alone, the loss is lowest; four and two stay",
        paper="arXiv:2402.02834",
        chain=(
            "block_ablation(granularity=layer) > "
            "within(depth=True, whole_layers=True, min_keep=0, protect=(0.13, -0.07)) > global(by=score)"
        ),
        calibration=_TEXT,
        deviations=(_FOUR_AND_TWO,),
    ),
    "shortened-llama-taylor": Recipe(
        title="Shortened LLaMA, Taylor+: the layers of the smallest sum of |w ∂w| go, the first four and last two stay",
        paper="arXiv:2402.02834",
        chain=(
            "taylor_element(within=layer) > "
            "within(depth=True, whole_layers=True, min_keep=0, protect=(0.13, -0.07)) > global(by=score)"
        ),
        calibration=_TEXT,
        deviations=(
            _FOUR_AND_TWO,
            "Norms are left out of the sum; in the code's scores of LLaMA-2-7B they are 1 % of it.",
        ),
    ),
    "sleb": Recipe(
        title="SLEB: the layer whose removal raises the loss least goes, again and again; the first and the last stay",
        paper="arXiv:2402.09025",
        chain=(
            "block_ablation(granularity=layer) > "
            "within(depth=True, whole_layers=True, min_keep=0, protect=(0, -1)) > global(by=score) > rounds(0.001)"
        ),
        calibration="128 windows of WikiText-2 (training part)",
    ),
    "blockpruner": Recipe(
        title="BlockPruner: the attention or MLP whose removal raises the loss least goes, again and again",
        paper="arXiv:2406.10594",
        chain="block_ablation > within(depth=True, min_keep=0) > global(by=score) > rounds(0.001)",
        calibration="256 windows of Alpaca",
    ),
    "evopress": Recipe(
        title="EvoPress, depth: attentions and MLPs that go, by evolution towards the unpruned model's predictions",
        paper="arXiv:2410.14649",
        chain=(
            "block_influence > normalize(to=ranks) > within(depth=True, min_keep=0) > global(by=score) > "
            "evolve(15, microbatches=(1, 3))"
        ),
        calibration="windows of FineWeb-Edu",
        deviations=(
            "As many attentions go as MLPs, as in the code, which rounds their number down. Here the share of "
            "parameters is met: where it is not that of whole layers, the number of MLPs is rounded up, and fewer "
            "attentions go (SmolLM2-135M at 35 %: 11 MLPs and 9 attentions).",
            "It begins with the sub-blocks of either kind of the lowest block influence; the code begins with the best "
            "of some random states.",
            "15 generations of 16 children; the paper has hundreds, of 32, on far more text.",
            "A quarter of the text is held out, and says at the end whether the outcome is better than the start.",
        ),
    ),
}
