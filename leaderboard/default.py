"""What `saap prune` does: the better of two ways to choose, least squares on text that the model writes, scales."""

AUTHOR = "saap_jax"
METHOD = "default"
