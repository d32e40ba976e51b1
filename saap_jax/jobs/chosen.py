"""Which units go, in `saap prune`: to a ratio, or as few as targets allow; by new scores or those of a run."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from saap_jax.config.method import CalibrationConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.evaluation.targets import Target
from saap_jax.jobs.score import source_run
from saap_jax.runtime.errors import reading
from saap_jax.steps.allocation.allocation import TOLERANCE
from saap_jax.steps.base import State
from saap_jax.steps.chain import Chain
from saap_jax.steps.run import Runner
from saap_jax.types import Keep

DEFAULT_RATIO = 0.2
"""Share of the prunable parameters that goes where neither a ratio nor a target says more."""


def ratio_of(config: PruneConfig) -> float:
    """Return the share of the prunable parameters that goes where no target says how much."""
    return DEFAULT_RATIO if config.ratio is None else config.ratio


def smallest(
    runner: Runner,
    chain: Chain,
    least: float,
    costs: Callable[[Keep], Mapping[str, float]],
    targets: Sequence[Target],
) -> tuple[State, float]:
    """Choose the units to keep at the smallest ratio, to `TOLERANCE`, at which all targets hold; return that too.

    Found by bisection, since each target is met the better the more goes. Rounds on the way are run once.

    Raises:
        ValueError: targets that do not hold at the largest ratio that the chain can meet, or a refinement, whose
            outcome has other widths than those that met them.
    """
    if other := next((each for each in chain.steps if each.kind == "refinement"), None):
        raise ValueError(
            f"targets: expected no {other.name} beside them: what comes of it has other widths than those that met "
            "them; leave one of the two out"
        )
    top = runner.most_removable(chain)
    if least > top:
        raise ValueError(f"ratio: expected at most {top:.4f}, the largest that the chain can meet, got {least}")

    def missed(state: State) -> list[str]:
        found = costs(state.keep)
        return [f"{t.name} {t.asked} ({found[t.name]:.4g})" for t in targets if not t.holds(found[t.name])]

    if not missed(state := runner.choose(chain, least)):
        return state, least
    if still := missed(state := runner.choose(chain, top)):
        raise ValueError(
            f"targets: cannot be met by removing {top:.2%} of the prunable parameters, the most that the chain can: "
            f"{', '.join(still)}; ask for less, or relax min_keep, max_ratio, protect, … of `within`"
        )
    low, high = least, top
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        tried = runner.choose(chain, middle)
        if missed(tried):
            low = middle
        else:
            high, state = middle, tried
    return state, high


def calibration_of(path: str, model: str) -> CalibrationConfig:
    """Return on which text a run's scores were made: of several seeds, the first."""
    record = source_run(path, model)
    if record["config"].get("from_run"):
        record = source_run(record["config"]["from_run"], model)
    with reading(f"{path}/run.json", "the fields of a calibration"):
        calibration = record["config"]["calibration"]
        known = CalibrationConfig(**{**calibration, "scenarios": tuple(calibration["scenarios"])})
        return dataclasses.replace(known, seed=record.get("seeds", {}).get("calibration", [known.seed])[0])
