"""A cut model as a directory: `params.safetensors` (arrays by path) and `pruned.json` (structures, what each keeps).

The program is not stored: `load_pruned` traces the same factory's function again and cuts it by what the record keeps.
Its digest is, so that a function that computes something else is refused.
"""

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file, save

from saap_jax.checks import check_local
from saap_jax.errors import Doubt, reading
from saap_jax.llama.files.write import new_output, write_further, write_json
from saap_jax.runtime.digests import digest_of
from saap_jax.surgery.cut import keep_to_json
from saap_jax.trace.cut import kept_shapes
from saap_jax.trace.jaxpr import alive, constants_of, derivatives_of
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
        "program": _program_of(subject.problem),
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
        ValueError: a problem of other shapes or structures (with the first difference), one whose function is another
            program, or a damaged directory.
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
    _check_program(path, record, problem)
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


# --- the program -----------------------------------------------------------------------------------


def program_digest(program: Any) -> str:
    """Digest a closed jaxpr: its text, the arrays that it holds, and the derivatives that it defines."""
    parts = [program, *derivatives_of(program)]
    held = [value if hasattr(value, "dtype") else np.asarray(value) for each in parts for value in constants_of(each)]
    held = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in held]
    text = re.sub(r"0x[0-9a-f]+", "", ";".join(str(each.jaxpr) for each in parts))
    return hashlib.sha256(f"{text};{digest_of(held)}".encode()).hexdigest()


def _program_of(problem: Problem, shapes: Sequence[Sequence[int]] = ()) -> dict[str, Any]:
    """Digest the program of a problem's function on one example, from shapes and types alone.

    Args:
        shapes: of the arrays of the example; those of the problem's own where none are given. An example of another
            length is another program, and no other model.
    """
    leaves, tree = jax.tree.flatten(problem.example)
    shapes = shapes or [leaf.shape for leaf in leaves]
    rows = [jax.ShapeDtypeStruct(tuple(shape), leaf.dtype) for shape, leaf in zip(shapes, leaves, strict=True)]
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype)), problem.params
    )
    program = jax.make_jaxpr(problem.function)(params, *jax.tree.unflatten(tree, rows))
    return {
        "digest": program_digest(alive(program)),
        "inputs": [list(shape) for shape in shapes],
        "made_by": _made_by(),
    }


def _made_by() -> str:
    """Name what the text of a program depends on beside the function."""
    return f"jax {jax.__version__} on {jax.default_backend()}"


def _check_program(path: Path, record: dict[str, Any], problem: Problem) -> None:
    """Raise ValueError where a problem's function is another program than the one that was pruned.

    What another version of jax wrote cannot be compared: that is a warning.
    """
    with reading(path / "pruned.json", "the program of a pruned traced model"):
        recorded = record.get("program") or {"digest": "", "inputs": [], "made_by": ""}
        digest, shapes, made_by = (recorded[name] for name in ("digest", "inputs", "made_by"))
        shapes = [tuple(map(int, shape)) for shape in shapes]
    with contextlib.suppress(Exception):  # whatever a function raises that does not take what it took
        if _program_of(problem, shapes)["digest"] == digest:
            return
    if made_by == _made_by():
        raise ValueError(
            f"{path}: was pruned from another program than this factory's function is (an activation, a constant or "
            "the order of parts has changed); load it with the code that it was pruned with, or prune again"
        )
    warnings.warn(
        f"{path}: was pruned with {made_by or 'a version that kept no digest'}, so that {_made_by()} cannot tell "
        "whether this factory's function still is the one that was pruned; prune again to have it checked",
        Doubt,
        stacklevel=3,
    )
