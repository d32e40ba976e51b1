"""A cut model as a directory: `params.safetensors` (arrays by path) and `pruned.json` (structures, what each keeps).

The program is not stored: `load_pruned` traces the same factory's function again and cuts it by what the record keeps.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from safetensors.flax import load_file, save

from saap_jax.config.checks import check_local
from saap_jax.llama.files.write import new_output, write_further, write_json
from saap_jax.runtime.errors import reading
from saap_jax.surgery.cut import keep_to_json
from saap_jax.trace.cut import kept_shapes
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject.problem import TracedProblem, cut_function
from saap_jax.trace.trace import Traced, TracedStructure, by_path, trace
from saap_jax.types import Keep

FORMAT = 1
"""Version of the record."""


def write_pruned(
    cut: Any,
    directory: str | Path,
    keep: Keep,
    about: Mapping[str, Any] = MappingProxyType({}),
    *,
    further: Mapping[str, dict[str, Any] | str] = MappingProxyType({}),
) -> None:
    """Write a cut model's parameters and what is kept to a new directory; `load_pruned` reads it.

    Args:
        cut: a `CutTraced`.
        about: further plain values for the record, under `about`.
        further: JSON objects and texts by file name.

    Raises:
        FileExistsError: the directory exists.
        OSError: the disk is full. Nothing is left behind in either case.
    """
    subject = cut.subject
    record = {
        "format": FORMAT,
        "structures": [described(each) for each in subject.structures if each.name in keep],
        "keep": keep_to_json(keep),
        "shapes": {path: list(shape) for path, shape in subject.traced.shapes.items()},
        "about": dict(about),
    }
    with new_output(check_local("directory", directory).expanduser(), "the pruned model") as place:
        content = save({path: jax.numpy.asarray(value) for path, value in by_path(cut.params).items()})
        (place / "params.safetensors").write_bytes(content)  # the library's writer raises no OSError on a full disk
        write_json(record, place / "pruned.json")
        write_further(further, place)


def load_pruned(directory: str | Path, problem: Problem) -> tuple[Callable[..., Any], Any]:
    """Read the cut model that a directory holds: `function(params, *inputs)` of any batch, and its parameters.

    Args:
        problem: what the factory returns that the model was pruned from; of its parameters, the shapes count.

    Raises:
        FileNotFoundError: the directory holds no pruned model.
        ValueError: a problem of other shapes or structures (with the first difference), or a damaged directory.
    """
    path = Path(directory).expanduser()
    for name in ("pruned.json", "params.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"expected a pruned traced model in {path}, found no {name}; check the directory")
    keep = {}
    traced = trace(problem.function, problem.params, *problem.example)
    with reading(path / "pruned.json", "the record of a pruned traced model"):
        record = json.loads((path / "pruned.json").read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"a record of format {record['format']}, where this version reads {FORMAT}")
        for name, each in record["keep"].items():
            keep[name] = np.array([np.isin(np.arange(each["units"]), kept) for kept in each["kept"]])
        difference = _difference(record, traced)
    if difference:
        raise ValueError(f"{path}: was pruned from another model than this factory's: {difference}")
    by_name = {each.name: each for each in traced.structures}
    subject = TracedProblem(problem, traced, tuple(by_name[name] for name in keep))
    with reading(path / "params.safetensors", "a whole safetensors file"):
        values = load_file(path / "params.safetensors")
    expected = kept_shapes(traced, subject.by_copies(keep))
    found = {name: tuple(value.shape) for name, value in values.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path / 'params.safetensors'}: expected {name} of shape {expected.get(name)}, got {found.get(name)}; "
                "the directory is damaged"
            )
    tree = jax.tree.structure(problem.params)
    return cut_function(subject, keep), jax.tree.unflatten(tree, [values[name] for name in expected])


def described(structure: TracedStructure) -> dict[str, Any]:
    """Describe a structure by plain values."""
    return {
        "name": structure.name,
        "units": structure.units,
        "copied": list(structure.copied),
        "parameters_per_unit": structure.parameters_per_unit,
        "members": [{"path": member.path, "axis": member.axis} for member in structure.members],
    }


def _difference(record: dict[str, Any], traced: Traced) -> str:
    """Find the first difference between what was pruned and what is traced now, "" if none."""
    before = {path: tuple(shape) for path, shape in record["shapes"].items()}
    for path in {**before, **traced.shapes}:
        old, new = (f"of shape {shapes[path]}" if path in shapes else "absent" for shapes in (before, traced.shapes))
        if old != new:
            return f"parameter {path} was {old}, and is {new}"
    now = {each.name: described(each) for each in traced.prunable}
    for structure in record["structures"]:
        if structure["name"] not in now:
            return f"structure {structure['name']} is not prunable any more"
        if fields := [f for f in structure if structure[f] != now[structure["name"]].get(f)]:
            return f"structure {structure['name']} has other {', '.join(fields)}"
    return ""
