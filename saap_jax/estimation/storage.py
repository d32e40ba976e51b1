"""Statistics in a file, so that a new formula or fusion needs no new pass over the text.

One safetensors file holds all scenarios: tensors `SCENARIO/STATISTIC/PATH` and `SCENARIO/losses`, float32, and the
counts as JSON in the metadata. What a statistic looks like follows from the model, so nothing else is stored, and a
file of another model is refused.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from safetensors import SafetensorError, safe_open

from saap_jax.estimation.accumulate import ACCUMULATORS, Plan, statistics_dtype
from saap_jax.estimation.base import Curvature, GateHessian, Statistic, Statistics
from saap_jax.estimation.not_finite import leaves_by_path
from saap_jax.fetching import fetched
from saap_jax.llama.model import Llama
from saap_jax.llama.write import Tensor, write_tensors
from saap_jax.processes import first
from saap_jax.sharding import mesh_of

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
        kept = {key: value for key, value in observed.values.items() if only is None or key in only}
        for name, tree in {"losses": observed.losses, **kept}.items():
            tensors += [_tensor(key, leaf) for key, leaf in _flat(f"{scenario}/{name}", tree).items()]
        counts = {"examples": int(observed.examples), "tokens": int(observed.tokens)}
        scenarios[scenario] = {**counts, "statistics": sorted(kept), **_curvature(kept.get(Statistic.GATE_HESSIAN))}
    about = {"format": FORMAT, "scenarios": json.dumps(scenarios)}
    if not first():
        write_tensors(tensors, target, np.dtype(np.float32), about)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
        write_tensors(tensors, Path(temporary) / "file", np.dtype(np.float32), about)
        os.replace(Path(temporary) / "file", target)
    return target


def _tensor(name: str, leaf: Any) -> Tensor:
    """Return how an array of a statistic is written: layer by layer, or example by example."""

    def pieces() -> Iterator[np.ndarray]:
        return (fetched(leaf, index) for index in range(leaf.shape[0]))

    rows = pieces if leaf.ndim > 2 and leaf.size and mesh_of(leaf) else None
    return Tensor(name, tuple(leaf.shape), lambda: fetched(leaf), np.dtype(np.float32), rows)


def kept_statistics(path: str | Path) -> dict[str, frozenset[Statistic]]:
    """Return which statistics a file holds of each scenario; only its header is read.

    Raises:
        ValueError: no file of statistics.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            scenarios = json.loads(_metadata(path, file)["scenarios"])
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({str(error).splitlines()[0]})") from None
    return {scenario: frozenset(map(Statistic, about["statistics"])) for scenario, about in scenarios.items()}


def _metadata(path: str | Path, file: Any) -> dict[str, str]:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a file of {FORMAT!r}, got {metadata.get('format')!r}")
    return metadata


def load_statistics(path: str | Path, model: Llama) -> dict[str, Statistics]:
    """Read the statistics of each scenario, observed on `model` or one of the same shapes (abstract is enough).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of statistics, or one of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected a file of statistics, found none; observe them first")
    try:
        with safe_open(path, framework="numpy") as file:
            scenarios = json.loads(_metadata(path, file)["scenarios"])
            expected = {scenario: _expected(about, model) for scenario, about in scenarios.items()}
            _check_tensors(path, file, expected)
            homes = leaves_by_path(model)
            return {
                scenario: _read(file, scenario, scenarios[scenario], expected[scenario], homes) for scenario in expected
            }
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file ({str(error).splitlines()[0]})") from None


def _curvature(hessian: GateHessian | None) -> dict[str, Any]:
    """Return what the shapes of a gate Hessian depend on."""
    if hessian is None:
        return {}
    attention = "exact" if "attention" in hessian.exact else "probes"
    return {"curvature": {"probes": len(hessian.probed["mlp"]), "attention": attention}}


def _expected(about: dict[str, Any], model: Llama) -> dict[str, Any]:
    """Return the trees of a scenario as abstract arrays, by the name that begins their tensors' names."""
    plan = Plan(about["examples"], Curvature(**about.get("curvature", {})))
    trees: dict[str, Any] = {"losses": jax.ShapeDtypeStruct((plan.examples,), statistics_dtype(model))}
    for name in about["statistics"]:
        trees[name] = jax.eval_shape(lambda name=name: ACCUMULATORS[Statistic(name)].init(model, plan))
    return trees


def _flat(start: str, tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by the names that they have in the file."""
    return {f"{start}/{path}".rstrip("/"): leaf for path, leaf in leaves_by_path(tree).items()}


def _check_tensors(path: str | Path, file: Any, expected: dict[str, dict[str, Any]]) -> None:
    """Refuse a file whose tensors are not those that the model calls for."""
    trees = [_flat(f"{scenario}/{name}", tree) for scenario, named in expected.items() for name, tree in named.items()]
    wanted = {name: tuple(leaf.shape) for flat in trees for name, leaf in flat.items()}
    stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise ValueError(
                f"{path}: expected tensor {name} of shape {wanted.get(name)} for this model, got {stored.get(name)}; "
                "load it with the model that the statistics were observed on"
            )


def _placed(file: Any, name: str, leaf: Any, home: Any) -> jax.Array:
    """Read a tensor; where it is like a parameter that is spread over devices, what this process holds of that."""
    place = getattr(home, "sharding", None)
    if isinstance(place, NamedSharding) and home.shape == leaf.shape:
        view = file.get_slice(name)
        return jax.make_array_from_callback(
            leaf.shape, place, lambda part: np.asarray(view[part] if part else file.get_tensor(name), leaf.dtype)
        )
    return jnp.asarray(file.get_tensor(name), leaf.dtype)


def _read(
    file: Any, scenario: str, about: dict[str, Any], expected: dict[str, Any], homes: dict[str, Any]
) -> Statistics:
    def read(name: str, tree: Any) -> Any:
        start = f"{scenario}/{name}"
        leaves = [
            _placed(file, tensor, leaf, homes.get(tensor.removeprefix(f"{start}/")))
            for tensor, leaf in _flat(start, tree).items()
        ]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)

    trees = {name: read(name, tree) for name, tree in expected.items()}
    return Statistics(
        examples=jnp.asarray(about["examples"]),
        tokens=jnp.asarray(about["tokens"]),
        losses=trees.pop("losses"),
        values={Statistic(name): tree for name, tree in trees.items()},
    )
