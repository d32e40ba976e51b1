"""Text: sources, windows of tokens cut from them, and scenarios, which are named calibration sets."""

from saap_jax.data.scenarios import Scenario, load_scenarios, parse_scenario
from saap_jax.data.sources import check_disjoint, read_texts
from saap_jax.data.windows import (
    Windows,
    batches,
    beginning,
    calibration_windows,
    concatenated,
    evaluation_windows,
    pairs,
)

__all__ = [
    "Scenario",
    "Windows",
    "batches",
    "beginning",
    "calibration_windows",
    "check_disjoint",
    "concatenated",
    "evaluation_windows",
    "load_scenarios",
    "pairs",
    "parse_scenario",
    "read_texts",
]
