"""What `saap prune` does: no paper's methods, but what was found to go best, by how long they take."""

from saap_jax.recipes.base import Recipe

_FUSED = "fused(fisher, leverage, wanda) > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3) > uniform"
_LEVERAGE = "leverage > within(max_ratio={attention: 0}) > uniform"
_CHOICE = f"best_of({_FUSED}, {_LEVERAGE})"
# Chosen on SmolLM2-135M at 50 % by text for development (docs/studies.md), one seed: a hint. The noise gives δ = 1.2 on
# 32 windows of 128 tokens. Perplexity on WikiText-2 / Penn Treebank with both: 246.0 / 439.1; with damping=0.3 in the
# place of the noise 252.2 / 460.0, damping=3 257.2 / 456.6; with blend=0 257.0 / 458.2, blend=1 266.2 / 479.7.
_LEAST_SQUARES = "least_squares(noise=8, blend=0.3)"
# There too: scales on text that least squares had, 235.4 / 419.9, and on other text of the model's own, 213.6 / 356.1.
# Least squares on 96 windows of the model's own beside the 32 of C4: 211.5 / 396.7; on 128 of its own alone 214.1 /
# 404.5; on 192 of them beside C4 206.9 / 401.0, which takes longer.
_RECONSTRUCT = (
    f"self_calibration(96, beside=True) > {_LEAST_SQUARES} > self_calibration(64, seed=1) > scales(12, rate=0.03)"
)
_TEXT = "32 windows of 128 tokens"

RECIPES = {
    "fast": Recipe(
        title="The closer of two ways to choose, then least squares",
        chain=f"{_CHOICE} > {_LEAST_SQUARES}",
        calibration=_TEXT,
    ),
    "default": Recipe(
        title="The closer of two ways to choose, then reconstruct",
        chain=f"{_CHOICE} > reconstruct",
        calibration=_TEXT,
    ),
    "homogeneous": Recipe(
        title="Layers that are all alike, as plain checkpoints and servers want them, then reconstruct",
        chain=(
            "fused(fisher, leverage, wanda) > within(max_ratio={attention: 0}, multiple_of={mlp: 32}) > "
            "uniform(alike=True) > reconstruct"
        ),
        calibration=_TEXT,
    ),
    "reconstruct": Recipe(
        title="Our repair, for any chain: least squares on text of the model's own, then scales on more of it",
        chain=_RECONSTRUCT,
        calibration=_TEXT,
        repair=True,
    ),
}
