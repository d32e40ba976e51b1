"""What `saap prune` does: no paper's methods, but what was found to go best, by how long they take."""

from saap_jax.recipes.base import Recipe

_FUSED = "fused(fisher, leverage, wanda) > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3) > uniform"
_LEVERAGE = "leverage > within(max_ratio={attention: 0}) > uniform"
_CHOICE = f"best_of({_FUSED}, {_LEVERAGE})"
_TEXT = "32 windows of 128 tokens"

RECIPES = {
    "fast": Recipe(
        title="The closer of two ways to choose, then least squares",
        chain=f"{_CHOICE} > least_squares",
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
        chain=(
            "self_calibration(96, beside=True) > least_squares > self_calibration(64, seed=1) > scales(12, rate=0.03)"
        ),
        calibration=_TEXT,
        repair=True,
    ),
}
