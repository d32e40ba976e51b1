"""What a job is of, as digests: equal ones stand for the same weights and the same text, to the last bit."""

import functools
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from saap_jax.runtime.gather import fetched
from saap_jax.runtime.mesh import mesh_of


def digest_of(tree: Any) -> str:
    """Return the SHA-256 of all arrays of a tree with their paths, shapes and types; one layer at a time is fetched.

    It does not depend on how the arrays are spread over devices. Of several processes, all have to call this.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {leaf.shape} {leaf.dtype.name};".encode())
        layers = range(leaf.shape[0]) if leaf.ndim > 2 and mesh_of(leaf) else (None,)
        for array in (fetched(leaf, index) for index in layers if leaf.size):
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def model_digest(model: Any) -> str:
    """Return a digest of a model's `spec`, with constants such as those of rotary embeddings, and its weights."""
    return hashlib.sha256(f"{model.spec!r};{digest_of(model)}".encode()).hexdigest()


def inputs_of(
    model: Mapping[str, str],
    calibration: Mapping[int, Mapping[str, Any]] | None = None,
    texts: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Digest what a run is of: its model, calibration text by seed and scenario, evaluation text by metric.

    The keys are what a refusal calls them, see `RunDirectory.begin`; `model` are the digests of the model.
    """
    drawn = {
        f"calibration text {scenario!r} of seed {seed}": windows
        for seed, scenarios in (calibration or {}).items()
        for scenario, windows in scenarios.items()
    }
    read = {f"evaluation text of {metric!r}": windows for metric, windows in (texts or {}).items()}
    return dict(model) | {name: digest_of(windows) for name, windows in (drawn | read).items()}


def code_digest(made: Any, source: str = "") -> str:
    """Digest the code of a function or class: its file, of the package's own all files together.

    Args:
        source: the file, where it is known; else Python is asked.
    """
    home = Path(__file__).parents[1]
    try:
        file = Path(source or inspect.getsourcefile(made) or "")
    except TypeError:  # of no file, as what the interpreter holds
        file = home
    own = home in file.parents or not file.is_file()
    return _digest_of_files(home, 0) if own else _digest_of_files(file, file.stat().st_mtime_ns)


@functools.cache
def _digest_of_files(place: Path, changed: int) -> str:
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
