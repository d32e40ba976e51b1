"""Where in a tree of arrays a number is not finite."""

from typing import Any

import jax
import jax.numpy as jnp


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Return the arrays (or abstract ones) of a tree by path, such as `segments/0/mlp/down` or `mean/attention`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/").removesuffix("/value"): x for p, x in leaves}


def first_not_finite(tree: Any) -> str | None:
    """Return the path of the first array that holds a number that is not finite, None where all are."""
    for path, leaf in leaves_by_path(tree).items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(leaf))):
            return path
    return None
