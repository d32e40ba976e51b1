"""What `saap prune` does: no paper's methods, but what was found to go best, by how long they take."""

from saap_jax.recipes.base import Recipe

_FUSED = "fused(fisher, leverage, wanda) > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3) > uniform"
_LEVERAGE = "leverage > within(max_ratio={attention: 0}) > uniform"
_FISHER = "fisher > within(protect=(0.13, -0.07), max_ratio={attention: 0}) > uniform"
_EACH = ", ".join(f"{each} > least_squares" for each in (_FUSED, _LEVERAGE, _FISHER))
_TEXT = "32 windows of 128 tokens"

RECIPES = {
    "fast": Recipe(
        title="Fused scores, the ends protected, heads beyond 30 % only, then least squares",
        chain=f"{_FUSED} > least_squares",
        calibration=_TEXT,
    ),
    "default": Recipe(
        title="The best on held-out text of three ways to choose, each with least squares; then scales",
        chain=f"best_of({_EACH}) > scales(24)",
        calibration=_TEXT,
    ),
    "best": Recipe(
        title="As `default`, with four times the training of scales",
        chain=f"best_of({_EACH}) > scales(96)",
        calibration=_TEXT,
    ),
}
