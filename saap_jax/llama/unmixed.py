"""A mixture whose units are the channels of its experts: the same function of tokens, each channel an expert of one."""

import jax
from flax import nnx

from saap_jax.llama.model import Llama, param


def unmixed(model: Llama) -> Llama:
    """Return a model that computes the same, whose MLP units are the channels of experts, in the order of
    `EXPERT_CHANNELS`; the given model is left as it is.

    Whatever tells something of MLP units (gates, statistics, estimators, the ablation oracle) tells it of channels
    there. The router still chooses experts, and is part of no unit: the gate of a channel, or its removal, routes no
    token elsewhere, unless all channels of an expert are gated to 0. Takes no parameters more.
    """
    new = jax.tree.map(lambda x: x, model)
    for segment in new.segments:
        mlp = segment.mlp
        assert mlp.router is not None
        for name in ("gate", "up", "down"):
            parameter: nnx.Param = getattr(mlp, name)
            at, sizes = parameter.axes.index("experts"), parameter.shape
            flat = (*sizes[:at], sizes[at] * sizes[at + 1], 1, *sizes[at + 2 :])
            setattr(mlp, name, param(parameter.axes, parameter[...].reshape(flat)))
        mlp.router = param(("layers", "embed", "routes"), mlp.router[...])
    return new
