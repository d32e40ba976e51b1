"""What `saap prune` does where nothing is said: no paper's method, but what was found to go best here."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "default": Recipe(
        title="The default of `saap prune`: fused scores in rounds, heads beyond 30 % only, then least squares",
        chain=(
            "fused > within(protect=(0.13, -0.07), attention=0.25, attention_from=0.3) > uniform > "
            "rounds(0.1) > least_squares"
        ),
        calibration="32 windows of 128 tokens",
    ),
}
