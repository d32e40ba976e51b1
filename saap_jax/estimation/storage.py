"""Statistics in a file, so that a new formula or fusion needs no new pass over the text.

One safetensors file holds all scenarios: tensors `SCENARIO/STATISTIC/PATH` and `SCENARIO/losses`, float32, and the
counts as JSON in the metadata. Statistics that neither this package nor the caller knows are left where they are.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import safe_open

from saap_jax.estimation.base import Curvature, Plan, Statistic, Statistics, statistics_dtype
from saap_jax.estimation.registry import STATISTICS
from saap_jax.llama.files.write import Tensor, write_tensors
from saap_jax.runtime.errors import reading
from saap_jax.runtime.gather import fetched, leaves_by_path
from saap_jax.runtime.mesh import mesh_of
from saap_jax.runtime.processes import is_primary
from saap_jax.structures.weights import TracedWeights, Weights, units_of

FORMAT = "saap_jax statistics 1"


def save_statistics(
    path: str | Path, statistics: Mapping[str, Statistics], *, only: frozenset[Statistic] | None = None
) -> Path:
    """Write the statistics of each scenario to a safetensors file; return its path.

    `only` leaves the others out: weight gradients take as much space as the model. The file is written under a
    temporary name and renamed, and replaces one of an earlier run. One layer of a statistic at a time is held beside
    the statistics. Of several processes of a job, all have to call this, and the first one writes.
    """
    target = Path(path)
    tensors: list[Tensor] = []
    scenarios = {}
    for scenario, observed in statistics.items():
        named = {each.name: tree for each, tree in observed.values.items() if only is None or each in only}
        for name, tree in {"losses": observed.losses, **named}.items():
            for place, leaf in leaves_by_path(tree).items():
                tensors.append(_tensor(f"{scenario}/{name}/{place}".rstrip("/"), leaf))
        counts = {"examples": int(observed.examples), "tokens": int(observed.tokens)}
        scenarios[scenario] = {**counts, "statistics": sorted(named)}
    about = {"format": FORMAT, "scenarios": json.dumps(scenarios)}
    if not is_primary():
        write_tensors(tensors, target, np.dtype(np.float32), about)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")  # what a kill leaves there is written over
    try:
        write_tensors(tensors, partial, np.dtype(np.float32), about)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _tensor(name: str, leaf: Any) -> Tensor:
    """Describe how an array of a statistic is written: layer by layer, or example by example."""

    def pieces() -> Iterator[np.ndarray]:
        return (fetched(leaf, index) for index in range(leaf.shape[0]))

    rows = pieces if leaf.ndim > 2 and leaf.size and mesh_of(leaf) else None
    return Tensor(name, tuple(leaf.shape), lambda: fetched(leaf), np.dtype(np.float32), rows)


def kept_statistics(path: str | Path, scenario: str) -> frozenset[str]:
    """Name the statistics that a file holds of a scenario, by its header alone; raises as `load_statistics`."""
    with reading(path, f"a file of {FORMAT!r}"), safe_open(path, framework="numpy") as file:
        return frozenset(_of_scenario(path, _described(path, file), scenario)["statistics"])


def load_scenario(path: str | Path, model: Weights, scenario: str, known: Iterable[Statistic] = ()) -> Statistics:
    """Read the statistics of one scenario; raises as `load_statistics`, also where the file has another."""
    return _of_scenario(path, load_statistics(path, model, known), scenario)


def load_statistics(path: str | Path, model: Weights, known: Iterable[Statistic] = ()) -> dict[str, Statistics]:
    """Read the statistics of each scenario, observed on `model` or one of the same shapes (abstract is enough).

    `known` are statistics that may be in the file beside those of `STATISTICS`; of others nothing is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of statistics, one of another model, or one that is damaged.
    """
    by_name = STATISTICS | {statistic.name: statistic for statistic in known}
    with reading(path, f"a file of {FORMAT!r}"), safe_open(path, framework="numpy") as file:
        found = {}
        for scenario, about in _described(path, file).items():
            examples, tokens = int(about["examples"]), int(about["tokens"])
            names = [name for name in about["statistics"] if name in by_name]
            values = {
                by_name[name]: _read(path, file, f"{scenario}/{name}", by_name[name], examples, model) for name in names
            }
            dtype = jnp.float32 if isinstance(model, TracedWeights) else statistics_dtype(model)
            losses = _placed(path, file, f"{scenario}/losses", jax.ShapeDtypeStruct((examples,), dtype))
            if losses.shape != (examples,):
                raise ValueError(
                    f"{path}: expected the losses of {examples} examples, got {len(losses)}; observe again"
                )
            found[scenario] = Statistics(jnp.asarray(examples), jnp.asarray(tokens), losses, values)
        return found


def _of_scenario(path: str | Path, scenarios: Mapping[str, Any], scenario: str) -> Any:
    if scenario not in scenarios:
        raise ValueError(f"{path}: expected statistics of scenario {scenario!r}, got those of {', '.join(scenarios)}")
    return scenarios[scenario]


def _described(path: str | Path, file: Any) -> dict[str, dict[str, Any]]:
    """Read the metadata of a file of statistics: counts and names by scenario."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {metadata.get('format')!r}")
    return json.loads(metadata["scenarios"])


def _shapes(statistic: Statistic, stored: Mapping[str, tuple[int, ...]], examples: int, model: Weights) -> Any:
    """Make the tree that a statistic is for a model, of abstract arrays.

    Of a traced model, sizes beside those of the units are as they are stored.
    """
    abstract = {place: jax.ShapeDtypeStruct(shape, jnp.float32) for place, shape in stored.items()}
    if not isinstance(model, TracedWeights):
        curvature = statistic.curvature(_tree(statistic, abstract)) if statistic.curvature else Curvature()
        return jax.eval_shape(lambda: statistic.init(model, Plan(examples, curvature)))
    if statistic.large:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), model)
    for place, shape in stored.items():
        at, name = statistic.axes(place).index("layers"), place.partition("/")[2] if statistic.kind else place
        units = units_of(model)[name].shape
        abstract[place] = jax.ShapeDtypeStruct((*shape[:at], *units, *shape[at + 2 :]), jnp.float32)
    return _tree(statistic, abstract)


def _tree(statistic: Statistic, arrays: Mapping[str, Any]) -> Any:
    """Make the value of a statistic, other than one like the model, from its arrays by path."""
    if statistic.kind is None:
        return arrays.get("", dict(arrays))
    fields = getattr(statistic.kind, "_fields")  # noqa: B009
    return statistic.kind(
        *(
            {place.removeprefix(f"{field}/"): array for place, array in arrays.items() if place.startswith(f"{field}/")}
            for field in fields
        )
    )


def _read(path: str | Path, file: Any, start: str, statistic: Statistic, examples: int, model: Weights) -> Any:
    """Read a statistic whose tensors begin with `start`; raise ValueError unless they are as the model calls for."""
    names = [name for name in file.keys() if f"{name}/".startswith(f"{start}/")]  # noqa: SIM118
    stored = {name.removeprefix(start).removeprefix("/"): tuple(file.get_slice(name).get_shape()) for name in names}
    like = _shapes(statistic, stored, examples, model)
    expected, homes = leaves_by_path(like), leaves_by_path(model) if statistic.large else {}
    for place in sorted(expected.keys() | stored.keys()):
        shape = expected[place].shape if place in expected else None
        if shape != stored.get(place):
            raise ValueError(
                f"{path}: expected tensor {start}/{place} of shape {shape} for this model, got {stored.get(place)}; "
                "load it with the model that the statistics were observed on"
            )
    arrays = [
        _placed(path, file, f"{start}/{place}".rstrip("/"), leaf, homes.get(place)) for place, leaf in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), arrays)


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
