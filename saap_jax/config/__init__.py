"""What can be asked for: frozen dataclasses of plain values, one a command, of shared parts; checked when built."""
# ruff: noqa: F401

from saap_jax.config.jobs import (
    CompareConfig,
    FidelityConfig,
    FrontierConfig,
    JobConfig,
    PruneConfig,
    ScoreConfig,
    SensitivityConfig,
    SweepConfig,
    for_factory,
)
from saap_jax.config.mesh import MeshConfig
from saap_jax.config.method import CalibrationConfig, EvaluationConfig, ModelConfig, TargetsConfig, WindowsConfig
from saap_jax.config.recover import MethodConfig, RecoverConfig, TrainingConfig, TrainingTextConfig
from saap_jax.config.use import (
    AbConfig,
    BenchConfig,
    DiscoverConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    JudgedConfig,
    MethodsConfig,
    PlanConfig,
    ReportConfig,
    RunsConfig,
    TasksConfig,
)

__all__ = [*(name for name in dir() if name.endswith("Config")), "for_factory"]
