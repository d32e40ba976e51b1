"""The ways to recover a pruned model: what is put into it, what of it is trained, and what is left of it afterwards."""

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array

from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import MATRICES
from saap_jax.recovery.adapters import AdapterParam, adapted, merged
from saap_jax.recovery.quantization import Rounding, quantize

ALL = tuple(MATRICES)
"""Matrices that have adapters unless others are named."""


class Method(NamedTuple):
    """A way to recover: pure functions between models, and the type of the variables that an optimiser changes."""

    name: str
    prepare: Callable[[Llama, Array], Llama]
    """(model, typed key) -> the model to train, which computes what the given one does (quantised: nearly)."""
    trainable: type[nnx.Variable]
    """`nnx.split(model, trainable, ...)` separates what is trained from what is not."""
    merge: Callable[[Llama], Llama]
    """Trained model -> one without adapters that computes the same."""


def full() -> Method:
    """Train every parameter."""
    return Method("full", lambda model, key: model, nnx.Param, lambda model: model)


def lora(*, rank: int = 8, scale: float = 16.0, matrices: tuple[str, ...] = ALL) -> Method:
    """Train adapters beside matrices in floats, which stay: y = x·W + (η/r)·x·A·B; merged, W + (η/r)·A·B.

    Args:
        rank: r, the width of A and B.
        scale: η.
        matrices: names of `MATRICES`.
    """
    _check_adapters(rank, scale, matrices)

    def prepare(model: Llama, key: Array) -> Llama:
        return adapted(model, key, rank=rank, scale=scale, matrices=matrices)

    return Method("lora", prepare, AdapterParam, merged)


def groupwise(
    *,
    bits: int = 4,
    group_size: int = 32,
    rank: int = 8,
    scale: float = 16.0,
    matrices: tuple[str, ...] = ALL,
    rounding: Rounding = "search",
) -> Method:
    """Quantise, and train adapters that see one number a group: y = x·α(q − β) + (η/r)·pool(x)·A·B (QA-LoRA).

    pool is the mean over each group, so the adapter adds the same to all weights of a group, (η/r)(A·B)/s, which the
    zero points take: β' = β − (η/r)(A·B)/(s·α). The merged model has no adapter, and the size of the quantised one.

    Args:
        bits: 2, 3, 4 or 8 an integer.
        group_size: s, inputs that share a scale and a zero point.
        rank: r, the width of A and B.
        scale: η.
        matrices: names of `MATRICES`, which are quantised and have adapters.
        rounding: see `quantize`.
    """
    _check_adapters(rank, scale, matrices)

    def prepare(model: Llama, key: Array) -> Llama:
        quantised = quantize(model, bits=bits, group_size=group_size, matrices=matrices, rounding=rounding)
        return adapted(quantised, key, rank=rank, scale=scale, matrices=matrices, group_size=group_size)

    return Method("groupwise", prepare, AdapterParam, merged)


def _check_adapters(rank: int, scale: float, matrices: tuple[str, ...]) -> None:
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if not matrices or len(set(matrices)) < len(matrices) or not set(matrices) <= MATRICES.keys():
        raise ValueError(f"matrices: expected some of {', '.join(MATRICES)}, each once, got {', '.join(matrices)!r}")


METHODS: dict[str, Callable[..., Method]] = {"full": full, "lora": lora, "groupwise": groupwise}
"""Name -> factory with keyword-only hyper-parameters."""
