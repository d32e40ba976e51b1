"""The package's own steps: importing this registers them, those of every file of a folder of steps."""

import importlib
import pkgutil

from saap_jax.steps import allocation, refinement, repair, score
from saap_jax.steps.best_of import BestOf
from saap_jax.steps.limits import Within
from saap_jax.steps.self_calibration import SelfCalibration

__all__ = ["BestOf", "SelfCalibration", "Within"]

for _folder in (score, allocation, refinement, repair):
    for _module in pkgutil.iter_modules(_folder.__path__):
        importlib.import_module(f"{_folder.__name__}.{_module.name}")
