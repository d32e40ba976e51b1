"""Stage 2d: from a keep-set to a pruned model, masked (gates) or cut (smaller arrays). Both give the same logits."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from saap_jax.llama.model import DecoderLayer, Llama
from saap_jax.llama.runs import existing_units, run_bounds
from saap_jax.llama.spec import LlamaSpec
from saap_jax.types import PRUNABLE_AXES, STRUCTURES, Gates, Keep


def masks(keep: Keep) -> Gates:
    """Return gates that are 1 where a unit is kept and 0 where it is removed, float32."""
    return {name: jnp.asarray(kept, jnp.float32) for name, kept in keep.items()}


def cut(model: Llama, keep: Keep) -> Llama:
    """Return a model with the removed units' weights gone; neighbouring layers of equal widths form one run.

    A layer may lose all units of a structure. The given model is left as it is.

    Raises:
        ValueError: a keep-set of the wrong shape, or one that keeps a unit that does not exist.
    """
    check_keep(keep, existing_units(model.runs))
    layers: list[DecoderLayer] = []
    for run, bounds in zip(model.runs, run_bounds(model.runs), strict=True):
        for offset, layer in enumerate(range(bounds.start, bounds.stop)):
            kept = {axis: np.flatnonzero(keep[name][layer]) for axis, name in PRUNABLE_AXES.items()}
            layers.append(_map_params(_layer_cutter(offset, kept), run))
    pruned = jax.tree.map(lambda x: x, model)
    pruned.runs = nnx.List([_stack(stretch) for stretch in _stretches(layers)])
    return pruned


def pruned_spec(spec: LlamaSpec, keep: Keep) -> LlamaSpec:
    """Return the spec of the model that `cut` makes."""
    layers = (
        dataclasses.replace(widths, kv_heads=int(attention.sum()), mlp=int(mlp.sum()))
        for widths, attention, mlp in zip(spec.layers, keep["attention"], keep["mlp"], strict=True)
    )
    return dataclasses.replace(spec, layers=tuple(layers))


def check_keep(keep: Keep, existing: Keep) -> None:
    """Raise ValueError unless `keep` has the shape of `existing` and keeps only units that exist."""
    for name in STRUCTURES:
        if name not in keep or keep[name].shape != existing[name].shape:
            got = keep[name].shape if name in keep else "nothing"
            raise ValueError(f"keep: expected {name} of shape {existing[name].shape} for this model, got {got}")
        extra = np.argwhere(keep[name] & ~existing[name])
        if len(extra):
            raise ValueError(f"keep: {name} unit {extra[0][1]} of layer {extra[0][0]} does not exist in this model")


def keep_to_json(keep: Keep) -> dict:
    """Return the kept indices of each layer, and how many units there were, as JSON values."""
    return {
        name: {"units": int(kept.shape[1]), "kept": [np.flatnonzero(row).tolist() for row in kept]}
        for name, kept in keep.items()
    }


def keep_from_json(record: dict) -> Keep:
    """Return the keep-set that `keep_to_json` wrote."""
    keep = {}
    for name in STRUCTURES:
        kept = np.zeros((len(record[name]["kept"]), record[name]["units"]), bool)
        for row, indices in zip(kept, record[name]["kept"], strict=True):
            row[indices] = True
        keep[name] = kept
    return keep


def _map_params(function: Callable[[nnx.Param], nnx.Param], tree: DecoderLayer) -> DecoderLayer:
    return jax.tree.map(function, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _layer_cutter(offset: int, kept: dict[str, np.ndarray]) -> Callable[[nnx.Param], nnx.Param]:
    """Return a function that takes one layer of a stacked parameter and the kept units along its prunable axis."""

    def cut_parameter(parameter: nnx.Param) -> nnx.Param:
        value: Array = parameter[...][offset : offset + 1]
        for position, axis in enumerate(parameter.axes):
            if axis in kept:
                value = jnp.take(value, kept[axis], axis=position)
        return nnx.Param(value, axes=parameter.axes)

    return cut_parameter


def _stretches(layers: list[DecoderLayer]) -> list[list[DecoderLayer]]:
    """Group neighbouring layers of equal widths."""
    stretches: list[list[DecoderLayer]] = []
    for layer in layers:
        if stretches and stretches[-1][0].widths == layer.widths:
            stretches[-1].append(layer)
        else:
            stretches.append([layer])
    return stretches


def _stack(layers: list[DecoderLayer]) -> DecoderLayer:
    return jax.tree.map(lambda *values: jnp.concatenate(values), *layers)
