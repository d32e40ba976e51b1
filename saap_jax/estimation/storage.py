"""The statistics of one pass in a file, so that a new formula or fusion needs no new pass over the text.

A safetensors file: tensors `STATISTIC/PATH` and `losses`, float32, and the counts as JSON in the metadata. Statistics
that neither this package nor the caller knows are left where they are.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import safe_open

from saap_jax.errors import reading, shown
from saap_jax.estimation.base import Plan, Statistic, Statistics, statistics_dtype
from saap_jax.estimation.registry import STATISTICS
from saap_jax.llama.files.layout import Tensor
from saap_jax.llama.files.write import write_tensors
from saap_jax.runtime.gather import fetched, leaves_by_path
from saap_jax.runtime.mesh import mesh_of
from saap_jax.runtime.processes import is_primary
from saap_jax.structures.weights import Weights, weights_of

FORMAT = "saap_jax statistics 2"


def save_statistics(path: str | Path, statistics: Statistics, *, only: frozenset[Statistic] | None = None) -> Path:
    """Write statistics to a safetensors file, whole or not at all; return its path.

    `only` leaves the others out: weight gradients take as much space as the model. One layer of a statistic at a time
    is held beside the statistics. Of several processes of a job, all have to call this, and the first one writes.

    Raises:
        ValueError: statistics of a model with masked units, which a file does not name.
    """
    if statistics.gates is not None:
        raise ValueError("save_statistics: expected statistics of a whole model, got them of one observed at gates")

    def tensor(name: str, leaf: Any) -> Tensor:
        def pieces() -> Iterator[np.ndarray]:
            return (fetched(leaf, index) for index in range(leaf.shape[0]))

        spread = leaf.ndim > 2 and leaf.size and mesh_of(leaf)
        return Tensor(name, tuple(leaf.shape), lambda: fetched(leaf), np.dtype(np.float32), pieces if spread else None)

    named = {each.name: tree for each, tree in statistics.values.items() if only is None or each in only}
    tensors = [
        tensor(f"{name}/{place}".rstrip("/"), leaf)
        for name, tree in {"losses": statistics.losses, **named}.items()
        for place, leaf in leaves_by_path(tree).items()
    ]
    counts = {
        "examples": int(statistics.examples),
        "tokens": int(statistics.tokens),
        "statistics": sorted(named),
        "tensors": len(tensors),
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")  # what a kill leaves there is written over
    try:
        if is_primary():
            target.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, partial, np.dtype(np.float32), {"format": FORMAT, "counts": json.dumps(counts)})
        if is_primary():
            os.replace(partial, target)
    finally:
        if is_primary():
            partial.unlink(missing_ok=True)
    return target


def kept_statistics(path: str | Path) -> frozenset[str]:
    """Name the statistics that a file holds, by its header alone; raises as `load_statistics`."""
    with reading(path, f"a file of {FORMAT!r}"), safe_open(path, framework="numpy") as file:
        return frozenset(_counts(path, file)["statistics"])


def load_statistics(path: str | Path, model: Any, known: Iterable[Statistic] = ()) -> Statistics:
    """Read statistics that were observed on `model`, or one of the same shapes (abstract is enough).

    `known` are statistics that may be in the file beside those of `STATISTICS`; of others nothing is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of statistics, one of another model, or one that is damaged.
    """
    weights = weights_of(model)
    by_name = STATISTICS | {statistic.name: statistic for statistic in known}
    with reading(path, f"a file of {FORMAT!r}"), safe_open(path, framework="numpy") as file:
        about = _counts(path, file)
        examples = about["examples"]
        tokens = about["tokens"]
        stored: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in file.keys():  # noqa: SIM118
            statistic, _, place = name.partition("/")
            stored.setdefault(statistic, {})[place] = tuple(file.get_slice(name).get_shape())

        def read(name: str, like: Any, homes: Mapping[str, Any] = MappingProxyType({})) -> Any:
            expected = leaves_by_path(like)
            found = stored.get(name, {})
            for place in sorted(expected.keys() | found.keys()):
                shape = expected[place].shape if place in expected else None
                if shape != found.get(place):
                    raise ValueError(
                        f"{path}: expected tensor {name}/{place} of shape {shape} for this model, got "
                        f"{found.get(place)}; load it with the model that the statistics were observed on"
                    )
            arrays = [
                _placed(path, file, f"{name}/{place}".rstrip("/"), leaf, homes.get(place))
                for place, leaf in expected.items()
            ]
            return jax.tree.unflatten(jax.tree.structure(like), arrays)

        values = {}
        for statistic in sorted(by_name[name] for name in by_name.keys() & set(about["statistics"])):
            like = _like(statistic, stored.get(statistic.name, {}), examples, weights)
            # what is as large as the model lies where its parameters lie
            homes = {}
            if statistic.large:
                homes = leaves_by_path(weights.model or weights)
            values[statistic] = read(statistic.name, like, homes)
        losses = read("losses", jax.ShapeDtypeStruct((examples,), _dtype(weights)))
        return Statistics(jnp.asarray(examples), jnp.asarray(tokens), losses, values)


def _counts(path: str | Path, file: Any) -> dict[str, Any]:
    """Read the metadata of a file of statistics, and hold them against its tensors.

    Raises:
        ValueError: another file; counts that are no whole numbers above 0; tensors of statistics that it does not name,
            or none of one that it names; numbers that are no float32.
    """
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {metadata.get('format')!r}")
    counts = json.loads(metadata["counts"])
    for name in ("examples", "tokens", "tensors"):
        if type(counts[name]) is not int or counts[name] < 1:
            raise ValueError(f"{path}: expected {name} to be a whole number above 0, got {shown(counts[name])}")
    tensors = list(file.keys())
    if len(tensors) != counts["tensors"]:
        raise ValueError(f"{path}: expected {counts['tensors']} tensors, got {len(tensors)}; observe again")
    held = {name.partition("/")[0] for name in tensors} - {"losses"}
    if set(counts["statistics"]) != held:
        raise ValueError(
            f"{path}: expected the statistics {', '.join(sorted(held)) or 'none'}, of which it has tensors, got "
            f"{shown(counts['statistics'])}; observe again"
        )
    for name in tensors:
        if (kind := file.get_slice(name).get_dtype()) != "F32":
            raise ValueError(f"{path}: expected float32 (F32) in tensor {name}, got {kind}; observe again")
    return counts


def _like(statistic: Statistic, stored: Mapping[str, tuple[int, ...]], examples: int, weights: Weights) -> Any:
    """Make the tree that a statistic is for a model, of abstract arrays; sizes of axes that no model has as stored."""
    if statistic.large:
        model = weights.model
        if model is None:
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), weights)
        return jax.eval_shape(lambda: statistic.init(model, Plan(examples)))
    exists = weights.units
    dtype = _dtype(weights)
    arrays: dict[str, dict[str, Any]] = {}
    for place, shape in stored.items():
        field, _, structure = place.partition("/") if statistic.kind else ("", "", place)
        layers, units = exists.get(structure, next(iter(exists.values()))).shape
        sizes = {"examples": examples, "layers": layers, "units": units}
        axes = statistic.axes(place)
        leading = (sizes.get(axis, own) for axis, own in zip(axes, shape, strict=False))
        array = jax.ShapeDtypeStruct((*leading, *shape[len(axes) :]), dtype)
        arrays.setdefault(field, {})[structure] = array
    found = {structure for each in arrays.values() for structure in each}
    if missing := exists.keys() - found - ({*exists} if found == {""} else set()):
        raise ValueError(f"no {statistic.name} of {', '.join(missing)}; load it with the model that it was observed on")
    if statistic.kind:
        kind: Any = statistic.kind
        # a field that is not always observed has a default; of the others, one without structures is empty
        fields = {name: {} for name in kind._fields} | kind._field_defaults | arrays
        return kind(**fields)
    return arrays[""].get("", arrays[""])


def _dtype(weights: Weights) -> Any:
    if weights.model is None:
        return jnp.float32
    return statistics_dtype(weights.model)


def _placed(path: str | Path, file: Any, name: str, leaf: Any, home: Any = None) -> jax.Array:
    """Read a tensor; where it is like a parameter that is spread over devices, what this process holds of that."""

    def read(part: Any) -> np.ndarray:
        values = np.asarray(file.get_slice(name)[part] if part else file.get_tensor(name), leaf.dtype)
        if not (np.isfinite(values.min(initial=0)) and np.isfinite(values.max(initial=0))):  # NaN is either of them
            raise ValueError(f"{path}: expected finite numbers in tensor {name}, got others; observe again")
        return values

    place = getattr(home, "sharding", None)
    if isinstance(place, NamedSharding) and home.shape == leaf.shape:
        return jax.make_array_from_callback(leaf.shape, place, read)
    return jnp.asarray(read(()))
