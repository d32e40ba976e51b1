"""Text: sources, windows of tokens cut from them, and scenarios, which are named calibration sets."""

from saap_jax.data.sources import check_disjoint, read_texts
from saap_jax.data.windows import (
    Scenario,
    Windows,
    beginning,
    calibration_windows,
    evaluation_windows,
    load_scenarios,
    pairs,
    parse_scenario,
)

__all__ = [
    "Scenario",
    "Windows",
    "beginning",
    "calibration_windows",
    "check_disjoint",
    "evaluation_windows",
    "load_scenarios",
    "pairs",
    "parse_scenario",
    "read_texts",
]
