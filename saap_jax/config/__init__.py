"""What can be asked for: frozen dataclasses of plain values, one a command, of shared parts; checked when built.

A configuration file imports them from here: `from saap_jax.config import CompareConfig`.
"""

import importlib
from typing import Any

_HOMES = {
    "AbConfig": "use",
    "BenchConfig": "use",
    "CalibrationConfig": "method",
    "CompareConfig": "jobs",
    "DiscoverConfig": "use",
    "EvaluateConfig": "use",
    "EvaluationConfig": "method",
    "ExportConfig": "use",
    "FidelityConfig": "jobs",
    "FrontierConfig": "jobs",
    "GenerateConfig": "use",
    "JobConfig": "jobs",
    "JudgedConfig": "use",
    "MeshConfig": "mesh",
    "MethodConfig": "recover",
    "MethodsConfig": "use",
    "ModelConfig": "method",
    "PlanConfig": "use",
    "PruneConfig": "jobs",
    "RecoverConfig": "recover",
    "ReportConfig": "use",
    "RunsConfig": "use",
    "ScoreConfig": "jobs",
    "SensitivityConfig": "jobs",
    "SweepConfig": "jobs",
    "TargetsConfig": "method",
    "TasksConfig": "use",
    "TrainingConfig": "recover",
    "TrainingTextConfig": "recover",
    "WindowsConfig": "method",
    "for_factory": "jobs",
}
"""The module of each name."""

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saap_jax.config' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saap_jax.config.{_HOMES[name]}"), name)
