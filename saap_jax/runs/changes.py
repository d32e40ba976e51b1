"""The exact changes of the loss that `saap fidelity` keeps, beside the scores that they judge."""

from pathlib import Path

import numpy as np

from saap_jax.estimation.ablation import changes_from_lines, changes_to_scores
from saap_jax.runs.directory import read_run
from saap_jax.runs.score_arrays import read_scores, structures_of
from saap_jax.steps.score.stability import reduce_scenarios
from saap_jax.types import Scores


def read_changes(path: Path) -> tuple[dict[str, Scores], Scores]:
    """Return the scores that a run keeps, scenarios reduced, and the exact changes, NaN where none was measured.

    Empty where it has not come that far. Changes of units that the scores do not have are left out.
    """
    scenarios, file = read_scores(path, structures_of(read_run(path))), path / "ablation.jsonl"
    if not scenarios or not file.exists():
        return {}, {}
    scores = {
        name: reduce_scenarios({scenario: each[name] for scenario, each in scenarios.items()}, "mean")
        for name in next(iter(scenarios.values()))
    }
    like = {name: np.ones(np.shape(values), bool) for name, values in next(iter(scores.values())).items()}
    changes = {
        unit: change
        for unit, change in changes_from_lines(file.read_text(errors="replace")).items()
        if unit.structure in like
        and unit.layer < len(like[unit.structure])
        and unit.number < like[unit.structure].shape[1]
    }
    return scores, changes_to_scores(changes, like)
