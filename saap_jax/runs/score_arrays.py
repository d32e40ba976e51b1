"""The scores that a run keeps, read from `scores.npz` alone."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saap_jax.runs.reading import arrays_of
from saap_jax.types import STRUCTURES, Scores

ByScenario = dict[str, dict[str, Scores]]
"""`{scenario: {estimator: {structure: [layers, units]}}}`."""


def structures_of(run: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a run's structures, of a traced model its own."""
    return tuple(each["name"] for each in run.get("structures", ())) or STRUCTURES


def read_scores(run_dir: str | os.PathLike[str], structures: Sequence[str] = STRUCTURES) -> ByScenario:
    """Return the scores of `scores.npz`, whose arrays are named `scenario/estimator/structure`; empty without the file.

    Raises:
        ValueError: a damaged file, an array of another name, or one that is no matrix of numbers.
    """
    path = Path(run_dir) / "scores.npz"
    scores: ByScenario = {}
    for key, value in arrays_of(path.read_bytes(), path).items() if path.exists() else ():
        scenario, estimator, structure = parts_of(key, path, structures)
        if value.ndim != 2 or value.dtype.kind not in "iuf":
            raise ValueError(
                f"expected numbers [layers, units] at {key!r} in {path}, got {value.dtype} of shape {value.shape}; "
                "score again with --overwrite"
            )
        scores.setdefault(scenario, {}).setdefault(estimator, {})[structure] = value
    return scores


def parts_of(key: str, path: Path, structures: Sequence[str] = STRUCTURES) -> tuple[str, str, str]:
    """Return scenario, estimator and structure of the name of an array; both of the latter may hold slashes.

    Raises:
        ValueError: it is another name; `path` is that of the file.

    >>> parts_of("a/wanda/magnitude/mlp", Path("scores.npz"))
    ('a', 'wanda/magnitude', 'mlp')
    """
    scenario, _, rest = key.partition("/")
    structure = max((name for name in structures if rest.endswith(f"/{name}")), key=len, default="")
    estimator = rest.removesuffix(f"/{structure}")
    if not (scenario and structure and estimator and estimator != rest):
        raise ValueError(
            f"expected arrays named scenario/estimator/structure, got {key!r} in {path}; score again with --overwrite"
        )
    return scenario, estimator, structure
