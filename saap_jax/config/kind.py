"""What of a configuration is for the kind of model: text and layers, or a factory's problem."""

from typing import Any

from saap_jax.config.mesh import EXPERT, MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig


def check_kind(config: Any) -> None:
    """Raise ValueError for parts that are not for the kind of model: text and layers, or a factory's problem."""
    if not config.model.traced:
        config.calibration.check_text()
        return
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
