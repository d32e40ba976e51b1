"""What of a configuration is for the kind of model: text and layers, or a factory's problem."""

import dataclasses
from typing import Any

from saap_jax.config.mesh import EXPERT, MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, GridConfig, ModelConfig
from saap_jax.config.registries import ALLOCATIONS
from saap_jax.config.search import SearchConfig, StabilityOver


def check_scenarios(calibration: CalibrationConfig, allocation: str, over: StabilityOver) -> None:
    """Raise ValueError where stability over scenarios is asked for and there is only one."""
    if ALLOCATIONS[allocation].stability and over == "scenarios" and len(calibration.scenarios) < 2:
        raise ValueError(
            "search.stability_over: 'scenarios' expects two or more calibration.scenarios, got "
            f"{len(calibration.scenarios)}"
        )


def check_kind(config: Any) -> None:
    """Raise ValueError for parts that are not for the kind of model: text and layers, or a factory's problem."""
    search, fusion = getattr(config, "search", SearchConfig()), config.fusion
    if not config.model.traced:
        config.calibration.check_text()
        return search.check_layers()
    searched(config).check_traced()
    if fusion.attention:
        raise ValueError(
            f"fusion.attention: expected none for a traced model, whose structures are all scored alike, got "
            f"{fusion.attention!r}"
        )
    of_text = {"model": ("dtype", "attention"), "calibration": ("length", "bos"), "evaluation": ("length", "bos")}
    usual = {"model": ModelConfig(), "calibration": CalibrationConfig(), "evaluation": EvaluationConfig()}
    for part, name in ((part, name) for part, names in of_text.items() if hasattr(config, part) for name in names):
        if (value := getattr(getattr(config, part), name)) != getattr(usual[part], name):
            raise ValueError(
                f"{part}.{name}: a factory's program is as it is, expected nothing said of it, got {value}"
            )
    mesh = getattr(config, "mesh", MeshConfig())
    named = [f"{axis} {size}" for axis in ("tensor", EXPERT) if (size := getattr(mesh, axis)) != 1]
    if named or mesh.rules:
        got = ", ".join(named) or f"rules {', '.join(mesh.rules)}"
        raise ValueError(f"mesh: expected data and fsdp alone for a traced model, whose axes have no names, got {got}")


def searched(config: Any) -> SearchConfig:
    """Return the search of a configuration, with the most steps of its grid."""
    search, grid = getattr(config, "search", SearchConfig()), getattr(config, "grid", GridConfig())
    learn = dataclasses.replace(search.learn, steps=max(grid.learn_steps, default=search.learn.steps))
    return dataclasses.replace(search, learn=learn)
