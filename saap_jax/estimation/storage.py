"""Statistics in a file, so that a new formula or fusion needs no new pass over the text.

One safetensors file holds all scenarios: tensors `SCENARIO/STATISTIC/PATH` and `SCENARIO/losses`, float32, and the
counts as JSON in the metadata. What a statistic looks like follows from the model, so nothing else is stored, and a
file of another model is refused. Those that neither this package nor the caller knows are left where they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from saap_jax.estimation.accumulate import statistics_dtype
from saap_jax.estimation.activations import ACTIVATION_USAGE, MULTIPLES, Moments
from saap_jax.estimation.base import Curvature, Plan, Statistic, Statistics
from saap_jax.estimation.hessian import GateHessian
from saap_jax.estimation.statistics import STATISTICS
from saap_jax.formats.json_files import parse_json, shown
from saap_jax.llama.files.write import Tensor, write_tensors
from saap_jax.runtime.finite import leaves_by_path
from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of
from saap_jax.runtime.processes import is_primary
from saap_jax.structures.weights import TracedWeights, Weights
from saap_jax.trace.trace import TracedStructure

FORMAT = "saap_jax statistics 1"

DAMAGED = "the file was changed or damaged: observe again"
"""What to do about a file that says something else than what was written."""

Of = TypeVar("Of")

_ABOUT = {"examples", "tokens", "statistics", "curvature"}


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
        kept = {key: value for key, value in observed.values.items() if only is None or key in only}
        named = {statistic.name: value for statistic, value in kept.items()}
        for name, tree in {"losses": observed.losses, **named}.items():
            tensors += [_tensor(key, leaf) for key, leaf in _flat(f"{scenario}/{name}", tree).items()]
        counts = {"examples": int(observed.examples), "tokens": int(observed.tokens)}
        scenarios[scenario] = {**counts, "statistics": sorted(named), **_curvature(kept)}
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
    """Return how an array of a statistic is written: layer by layer, or example by example."""

    def pieces() -> Iterator[np.ndarray]:
        return (fetched(leaf, index) for index in range(leaf.shape[0]))

    rows = pieces if leaf.ndim > 2 and leaf.size and mesh_of(leaf) else None
    return Tensor(name, tuple(leaf.shape), lambda: fetched(leaf), np.dtype(np.float32), rows)


def load_scenario(path: str | Path, model: Weights, scenario: str, known: Iterable[Statistic] = ()) -> Statistics:
    """Read the statistics of one scenario; raises as `load_statistics`, also where the file has another."""
    return _scenario(path, load_statistics(path, model, known), scenario)


def kept_statistics(path: str | Path, scenario: str) -> frozenset[str]:
    """Return the names of the statistics that a file holds of a scenario; only its header is read.

    Raises:
        ValueError: no file of statistics, or one without the scenario.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            scenarios = _described(path, file)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({str(error).splitlines()[0]})") from None
    return frozenset(_scenario(path, scenarios, scenario)["statistics"])


def _scenario(path: str | Path, scenarios: Mapping[str, Of], scenario: str) -> Of:
    if scenario not in scenarios:
        raise ValueError(f"{path}: expected statistics of scenario {scenario!r}, got those of {shown(list(scenarios))}")
    return scenarios[scenario]


def _described(path: str | Path, file: Any) -> dict[str, dict[str, Any]]:
    """Return what the metadata of a file of statistics say of each scenario."""
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {metadata.get('format')!r}")
    return _scenarios(str(path), metadata)


def load_statistics(path: str | Path, model: Weights, known: Iterable[Statistic] = ()) -> dict[str, Statistics]:
    """Read the statistics of each scenario, observed on `model` or one of the same shapes (abstract is enough).

    `known` are statistics that may be in the file beside those of `STATISTICS`; of others nothing is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of statistics, one of another model, or one that is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file of statistics, found none; observe them first")
    try:
        with safe_open(path, framework="numpy") as file:
            scenarios = _described(path, file)
            by_name = STATISTICS | {statistic.name: statistic for statistic in known}
            expected = {scenario: _expected(about, model, by_name) for scenario, about in scenarios.items()}
            _check_tensors(path, file, expected)
            homes = leaves_by_path(model)
            return {
                scenario: _read(str(path), file, scenario, scenarios[scenario], trees, homes, by_name)
                for scenario, trees in expected.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({str(error).splitlines()[0]})") from None


def _scenarios(path: str, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return what the metadata say of each scenario, checked before anything is made of it."""
    scenarios = parse_json(metadata.get("scenarios", "").encode(), f"{path}: metadata `scenarios`")
    if not isinstance(scenarios, dict) or not scenarios:
        raise ValueError(f"{path}: expected an object of scenarios in its metadata, got {shown(scenarios)}; {DAMAGED}")
    for name, about in scenarios.items():
        if not _is_described(about):
            raise ValueError(
                f"{path}: expected examples, tokens and statistics of scenario {shown(name)} in its metadata, "
                f"got {shown(about)}; {DAMAGED}"
            )
    return scenarios


def _is_described(about: Any) -> bool:
    """Say whether the metadata of a scenario are such as `save_statistics` writes."""
    if not isinstance(about, dict) or not {"examples", "tokens", "statistics"} <= about.keys() <= _ABOUT:
        return False
    names, curvature = about["statistics"], about.get("curvature")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    if len(set(names)) < len(names) or not all(_is_count(about[key]) for key in ("examples", "tokens")):
        return False
    if curvature is None:
        return not any(name in STATISTICS and STATISTICS[name].curvature for name in names)
    return (
        isinstance(curvature, dict)
        and curvature.keys() == {"probes", "attention"}
        and _is_count(curvature["probes"])
        and curvature["attention"] in ("exact", "probes")
    )


def _is_count(value: Any) -> bool:
    """Say whether a value is a number of things that an array can have."""
    return type(value) is int and 0 < value < 2**31


def _curvature(values: Mapping[Statistic, Any]) -> dict[str, Any]:
    """Return what the shapes of some statistics depend on beside the model."""
    known = [statistic.curvature(value) for statistic, value in values.items() if statistic.curvature]
    return {"curvature": {"probes": known[0].probes, "attention": known[0].attention}} if known else {}


def _expected(about: dict[str, Any], model: Weights, by_name: Mapping[str, Statistic]) -> dict[str, Any]:
    """Return the trees of a scenario as abstract arrays, by the name that begins their tensors'; None: unknown."""
    plan = Plan(about["examples"], Curvature(**(about.get("curvature") or {})))
    dtype = jnp.float32 if isinstance(model, TracedWeights) else statistics_dtype(model)
    trees: dict[str, Any] = {"losses": jax.ShapeDtypeStruct((plan.examples,), dtype)}
    for name in about["statistics"]:
        trees[name] = _abstract(by_name[name], model, plan) if name in by_name else None
    return trees


def _abstract(statistic: Statistic, model: Weights, plan: Plan) -> Any:
    """Return the tree of a statistic as abstract arrays; of a traced model, as `trace.subject.observe` makes it."""
    if not isinstance(model, TracedWeights):
        return jax.eval_shape(lambda: statistic.init(model, plan))

    def gates(*before: int) -> dict[str, Any]:
        shapes = {each.name: (*before, each.copies, each.units) for each in model.structures}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    if statistic.source == "gates":
        return gates(plan.examples)
    if statistic.source == "activations":
        return _abstract_activations(statistic, model)
    if statistic.source == "step":
        return GateHessian(gates(), {}, gates(plan.curvature.probes))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), model)


def _abstract_activations(statistic: Statistic, model: TracedWeights) -> Any:
    def units(last: Callable[[TracedStructure], int]) -> dict[str, Any]:
        shapes = {each.name: (each.copies, each.units, last(each)) for each in model.structures}
        return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}

    if statistic.name == ACTIVATION_USAGE.name:
        return units(lambda structure: len(MULTIPLES))
    return Moments(units(model.coordinates), units(model.coordinates))


def _flat(start: str, tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by the names that they have in the file."""
    return {f"{start}/{path}".rstrip("/"): leaf for path, leaf in leaves_by_path(tree).items()}


def _check_tensors(path: str | Path, file: Any, expected: dict[str, dict[str, Any]]) -> None:
    """Refuse a file whose tensors are not those that the model calls for; those of unknown statistics may be any."""
    trees = [_flat(f"{scenario}/{name}", tree) for scenario, named in expected.items() for name, tree in named.items()]
    wanted = {name: tuple(leaf.shape) for flat in trees for name, leaf in flat.items()}
    unknown = tuple(f"{at}/{name}/" for at, named in expected.items() for name, tree in named.items() if tree is None)
    views = {name: file.get_slice(name) for name in file.keys() if not f"{name}/".startswith(unknown)}  # noqa: SIM118
    stored = {name: tuple(view.get_shape()) for name, view in views.items()}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise ValueError(
                f"{path}: expected tensor {name} of shape {wanted.get(name)} for this model, got {stored.get(name)}; "
                "load it with the model that the statistics were observed on"
            )
    for name, view in views.items():
        if view.get_dtype() != "F32":
            raise ValueError(f"{path}: expected tensor {name} of type F32, got {view.get_dtype()}; {DAMAGED}")


def _placed(path: str, file: Any, name: str, leaf: Any, home: Any) -> jax.Array:
    """Read a tensor; where it is like a parameter that is spread over devices, what this process holds of that."""

    def read(part: Any) -> np.ndarray:
        values = np.asarray(file.get_slice(name)[part] if part else file.get_tensor(name), leaf.dtype)
        if not (np.isfinite(values.min(initial=0)) and np.isfinite(values.max(initial=0))):  # NaN is either of them
            raise ValueError(f"{path}: expected finite numbers in tensor {name}, got others; {DAMAGED}")
        return values

    place = getattr(home, "sharding", None)
    if isinstance(place, NamedSharding) and home.shape == leaf.shape:
        return jax.make_array_from_callback(leaf.shape, place, read)
    return jnp.asarray(read(()))


def _read(
    path: str,
    file: Any,
    scenario: str,
    about: dict[str, Any],
    expected: dict[str, Any],
    homes: dict[str, Any],
    by_name: Mapping[str, Statistic],
) -> Statistics:
    def read(name: str, tree: Any) -> Any:
        start = f"{scenario}/{name}"
        leaves = [
            _placed(path, file, tensor, leaf, homes.get(tensor.removeprefix(f"{start}/")))
            for tensor, leaf in _flat(start, tree).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    trees = {name: read(name, tree) for name, tree in expected.items()}
    return Statistics(
        examples=jnp.asarray(about["examples"]),
        tokens=jnp.asarray(about["tokens"]),
        losses=trees.pop("losses"),
        values={by_name[name]: tree for name, tree in trees.items() if tree is not None},
    )
