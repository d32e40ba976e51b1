"""Minitron (Muralidharan et al., arXiv:2407.14679), width: units of small activations go, as many of every layer."""

from saap_jax.recipes.base import Recipe

RECIPES = {
    "minitron": Recipe(
        title="Minitron, width of attention and MLP: mean over tokens, L2 over examples, of activations",
        paper="arXiv:2407.14679",
        chain="activation_norm(tokens=mean, examples=l2) > uniform",
        calibration="1,024 windows of the pre-training text",
        deviations=(
            "Channels of the residual stream and depth stay; sizes are not searched for, nor is anything distilled.",
            "Channels are scored behind the activation function, where they meet the matrix that writes.",
        ),
    ),
}
