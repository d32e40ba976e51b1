"""The scores that a run keeps, read from `scores.npz` alone."""

import os
from pathlib import Path

import numpy as np

from saap_jax.types import STRUCTURES, Scores

ByScenario = dict[str, dict[str, Scores]]
"""`{scenario: {estimator: {structure: [layers, units]}}}`."""


def read_scores(run_dir: str | os.PathLike[str]) -> ByScenario:
    """Return the scores of `scores.npz`, whose arrays are named `scenario/estimator/structure`; empty without the file.

    Raises:
        ValueError: an array of another name.
    """
    path = Path(run_dir) / "scores.npz"
    scores: ByScenario = {}
    if not path.exists():
        return scores
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            scenario, _, rest = key.partition("/")
            estimator, _, structure = rest.rpartition("/")
            if not (scenario and estimator and structure in STRUCTURES):
                raise ValueError(
                    f"expected arrays named scenario/estimator/structure, got {key!r} in {path}; score again with "
                    "--overwrite"
                )
            scores.setdefault(scenario, {}).setdefault(estimator, {})[structure] = file[key]
    return scores
