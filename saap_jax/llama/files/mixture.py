"""Mixtures of experts in a checkpoint: keys of the config, and a tensor an expert where the model has one for all.

A stored matrix of one expert is `[outputs, inputs]`; all of a layer side by side are the matrix that the rest of the
library knows: rows of gate and up, columns of down.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from saap_jax.formats.json_files import shown
from saap_jax.llama.files.config_values import flag, integer
from saap_jax.llama.files.families import FAMILIES, Mixture
from saap_jax.llama.files.hf_layout import Checkpoint
from saap_jax.llama.files.write import Tensor
from saap_jax.llama.spec import LlamaSpec

# --- config


def mixture_constants(config: dict[str, Any], where: str, family: str) -> dict[str, Any]:
    """Return the constants of a model that only mixtures have, from a config.

    Raises:
        ValueError: it does not say to how many experts a token is routed, or to more than there are.
    """
    if (how := FAMILIES[family].mixture) is None:
        return {}
    most = integer(config, "num_experts_per_tok", where, "heads")
    default = FAMILIES[family].defaults.get("norm_topk_prob", False)
    summed = how.summed is None or flag(config, how.summed, where, default)
    return {"experts_per_token": most, "route_scale": "sum_to_one" if summed else "kept"}


def experts_of(config: dict[str, Any], where: str, family: str, layers: int) -> list[dict[str, int]]:
    """Return the widths of each layer's mixture, its experts as `mlp` and the `channels` of each.

    A plain config has one number for all layers, one per layer a number of experts for each, and of channels too
    where layers differ in it.

    Raises:
        ValueError: numbers that are missing, damaged or disagree.
    """
    how = FAMILIES[family].mixture
    assert how is not None
    given = {key: config[key] for key in how.counts if config.get(key) is not None}
    if not given or any(value != next(iter(given.values())) for value in given.values()):
        raise ValueError(
            f"{where}: expected the same experts a layer in {' and '.join(how.counts)}, got {shown(given)}"
        )
    key, count = next(iter(given.items()))
    if config["model_type"] == family:
        number, most = integer({key: count}, key, where, "heads"), config.get("num_experts_per_tok")
        if type(most) is int and most > number:
            raise ValueError(f"{where}: expected num_experts_per_tok of at most {number} experts, got {most}")
        return [{"mlp": number, "channels": integer(config, how.channels, where, "channels")}] * layers
    if not isinstance(count, list) or len(count) != layers:
        raise ValueError(f"{where}: expected {key} to be {layers} non-negative integers, got {shown(count)}")
    given = config.get("channels")
    if isinstance(given, list) and len(given) != layers:
        raise ValueError(
            f"{where}: expected channels to be a positive integer, or {layers} of them, got {shown(given)}"
        )
    each = given if isinstance(given, list) else [given] * layers
    channels = [integer({"channels": number}, "channels", where, "channels") for number in each]
    numbers = [0 if number == 0 else integer({key: number}, key, where, "heads") for number in count]
    return [{"mlp": number, "channels": inner} for number, inner in zip(numbers, channels, strict=True)]


def mixture_keys(spec: LlamaSpec, per_layer: bool) -> dict[str, Any]:
    """Return the keys of a config that only mixtures have; a plain one is of layers that are alike."""
    if (how := spec.constants.traits.mixture) is None:
        return {}
    counts, channels = [layer.mlp for layer in spec.layers], [layer.channels for layer in spec.layers]
    keys: dict[str, Any] = dict.fromkeys(how.counts, counts if per_layer else counts[0])
    keys |= {"channels" if per_layer else how.channels: channels[0] if len(set(channels)) == 1 else channels}
    keys |= {"num_experts_per_tok": spec.constants.experts_per_token}
    return keys | ({how.summed: spec.constants.route_scale == "sum_to_one"} if how.summed else {})


# --- tensors


def together(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint of a tensor an expert as one whose tensors are of all experts of a layer, side by side.

    Raises:
        ValueError: a tensor of an expert is missing or misshapen.
    """
    spec, shapes, where = checkpoint.spec, dict(checkpoint.shapes), checkpoint.where
    how = spec.constants.traits.mixture
    assert how is not None
    sources: dict[str, tuple[list[str], int]] = {}
    for layer, widths in enumerate(spec.layers):
        for whole, side, names in _places(how, layer, widths.mlp):
            one = (widths.channels or 0, spec.embed)[:: -1 if side else 1]
            for name in names:
                if name not in shapes:
                    raise ValueError(f"{where}: missing tensors {name}")
                if (found := shapes.pop(name)) != one:
                    raise ValueError(f"{where}: {name} has shape {list(found)}, expected {list(one)}")
            count = len(names) * one[side]
            shapes[whole] = (spec.embed, count) if side else (count, spec.embed)
            sources[whole] = names, side

    def read(name: str) -> np.ndarray:
        if name not in sources:
            return checkpoint.read(name)
        names, side = sources[name]
        if not names:
            return np.zeros(shapes[name], np.float32)
        return np.concatenate([checkpoint.read(each) for each in names], axis=side)

    def read_part(name: str, block: tuple[slice, ...]) -> np.ndarray:
        if name in sources or checkpoint.read_part is None:
            return read(name)[block]
        return checkpoint.read_part(name, block)

    return checkpoint._replace(shapes=shapes, read=read, read_part=checkpoint.read_part and read_part)


def apart(tensors: Sequence[Tensor], spec: LlamaSpec) -> list[Tensor]:
    """Return tensors with those of all experts of a layer as one an expert."""
    how = spec.constants.traits.mixture
    assert how is not None
    wholes = {
        whole: (side, names)
        for layer, widths in enumerate(spec.layers)
        for whole, side, names in _places(how, layer, widths.mlp)
    }
    made: list[Tensor] = []
    for tensor in tensors:
        if tensor.name not in wholes:
            made.append(tensor)
            continue
        side, names = wholes[tensor.name]
        parts = _Parts(tensor, side, len(names))
        for number, name in enumerate(names):
            made.append(Tensor(name, parts.shape, functools.partial(parts.read, number), tensor.dtype))
    return made


class _Parts:
    """A tensor of all experts, read once for all of them: they are written one behind the other."""

    def __init__(self, tensor: Tensor, side: int, count: int) -> None:
        self._tensor, self._side, self._count = tensor, side, count
        self._size = tensor.shape[side] // max(count, 1)
        self._whole: np.ndarray | None = None
        self.shape = (tensor.shape[0], self._size) if side else (self._size, tensor.shape[1])

    def read(self, number: int) -> np.ndarray:
        whole = self._tensor.read() if self._whole is None else self._whole
        self._whole = whole if number + 1 < self._count else None
        start = number * self._size
        return whole[(slice(None),) * self._side + (slice(start, start + self._size),)]


def _places(how: Mixture, layer: int, experts: int) -> list[tuple[str, int, list[str]]]:
    """Return of each matrix of a layer's experts its name, the axis that they lie side by side on, and their names."""
    below = f"model.layers.{layer}.{how.experts}"
    return [
        (f"{below}.{part}.weight", side, [f"{below}.{number}.{part}.weight" for number in range(experts)])
        for part, side in zip(how.parts, how.sides.values(), strict=True)
    ]
