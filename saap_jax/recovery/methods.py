"""What is trained when a pruned model recovers, and how that becomes one model again."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array

from saap_jax.llama.model import Llama


class Method(NamedTuple):
    """A way to recover: parameters of one type are trained, all others are frozen."""

    name: str
    prepare: Callable[[Llama, Array], Llama]
    """Return the model with what is to be trained, from the pruned one and a random key."""
    trainable: type[nnx.Variable]
    """Variables of this type are trained; the rest has no gradient and no optimiser state."""
    merge: Callable[[Llama], Llama]
    """Return the trained model as one without anything beside its parameters."""


def full() -> Method:
    """Train all parameters."""
    return Method("full", lambda model, key: model, nnx.Param, lambda model: model)
