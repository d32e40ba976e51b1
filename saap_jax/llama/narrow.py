"""A narrower residual stream: the same function of tokens as with the removed channels gated to zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool

from saap_jax.llama.model import Llama, param
from saap_jax.llama.product import check_plain

NORMS = ("attention_norm", "mlp_norm", "norm")
"""Names of the normalisation scales of a layer, and of the model."""


def narrowed(model: Llama, kept: Bool[np.ndarray, "embed"]) -> Llama:
    """Return the model without some channels of its residual stream; the given model is left as it is.

    A norm divides by the root of a mean over channels. Over D' instead of D channels that mean is D / D' times larger,
    so scales are multiplied by √(D / D') and ε by D / D': the norms are then exactly those of the model whose removed
    channels are zero. Norms of heads (Qwen3) share ε, so they change by as little as ε is beside their mean square.

    Raises:
        ValueError: `kept` has another shape or keeps nothing, or the model's matrices are not plain floats.
    """
    check_plain(model, "cut")
    if model.constants.traits.post_norms and not kept.all():
        raise ValueError(
            f"keep: expected all channels of the residual stream, got {int(kept.sum())} of {kept.size}; norms behind "
            f"the sub-blocks of a {model.constants.family} average over all that these write"
        )
    embed = model.embedding.shape[1]
    if kept.shape != (embed,) or not kept.any():
        raise ValueError(
            f"keep: expected {embed} channels of the residual stream, of which one or more stay, got {int(kept.sum())} "
            f"of shape {kept.shape}"
        )
    channels, growth = jnp.asarray(np.flatnonzero(kept)), embed / int(kept.sum())

    def take(path: tuple, parameter: nnx.Param) -> nnx.Param:
        if "embed" not in parameter.axes:
            return parameter
        value = jnp.take(parameter[...], channels, axis=parameter.axes.index("embed"))
        return param(parameter.axes, value * growth**0.5 if _name(path) in NORMS else value)

    new = _map(take, model)
    new.constants = dataclasses.replace(model.constants, norm_eps=model.constants.norm_eps * growth)
    return new


def written_by(model: Llama, narrow: Llama, kept: Bool[np.ndarray, "embed"]) -> Llama:
    """Return the model with the output matrices and biases of a narrower one, 0 in the channels that it does not have.

    With gates that are 0 on these channels it computes what the narrower one does.
    """
    channels = jnp.asarray(np.flatnonzero(kept))
    new = jax.tree.map(lambda x: x, model)
    for segment, other in zip(new.segments, narrow.segments, strict=True):
        for part, source in ((segment.attention, other.attention), (segment.mlp, other.mlp)):
            for name in ("output", "output_bias", "down", "down_bias"):
                if (parameter := getattr(source, name, None)) is None:
                    continue
                value = parameter[...]
                wide = jnp.zeros((*value.shape[:-1], len(kept)), value.dtype).at[..., channels].set(value)
                setattr(part, name, nnx.data(param(parameter.axes, wide)))
    return new


def _map(function, model: Llama) -> Llama:
    return jax.tree_util.tree_map_with_path(function, model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").rsplit("/", 1)[-1]
