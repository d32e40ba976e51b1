"""saap_jax: structured pruning of LLaMA-family language models in JAX and Flax.

The pipeline in order (each name is importable from here):

    load_model, load_tokenizer            a model and its tokenizer
    calibration_windows                   text to estimate importance on
    discover                              1.  coupled structures: which weights must go together
    register, Estimator, Statistic        an estimator of your own; step, Step: another step of chains
    score_units                           2a. importance of every unit, by any number of estimators, from one pass
    fuse                                  2b. several scores of a unit become one
    select_units                          2c. what to keep, under a parameter budget
    chain, run_chain                      all of 2, and what makes up for what went, as a chain of steps
    masks, cut                            2d. the pruned model, as gates or as smaller arrays
    evaluation_windows, perplexity        4.  what it costs in quality
    save_model                            the smaller model as a directory
    compare, load_run, bars               the main job, a run that one left, and progress as bars of a notebook

A model of another library goes through `prune`, by an adapter of `saap_jax.trace.adapters` or a `Problem`.

A name is imported when it is first used, so that the console script starts at once.
"""

# ruff: noqa: F401
import importlib
from typing import TYPE_CHECKING, Any

from saap_jax.version import __version__

if TYPE_CHECKING:
    from saap_jax.api import perplexity, run_chain, score_units, select_units
    from saap_jax.config import CompareConfig
    from saap_jax.data import calibration_windows, evaluation_windows
    from saap_jax.estimation import ESTIMATORS, STATISTICS, Estimator, Statistic, register
    from saap_jax.jobs.compare import compare
    from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
    from saap_jax.runs.scores import load_run
    from saap_jax.runtime.progress import bars
    from saap_jax.steps.base import Step, step
    from saap_jax.steps.chain import chain
    from saap_jax.steps.score.fusion import fuse
    from saap_jax.structures import count_parameters, discover, prunable_parameters
    from saap_jax.surgery import cut, masks
    from saap_jax.trace.problem import Problem
    from saap_jax.trace.subject.pruned import prune

_HOMES = {
    "api": ("perplexity", "run_chain", "score_units", "select_units"),
    "config": ("CompareConfig",),
    "data": ("calibration_windows", "evaluation_windows"),
    "structures": ("count_parameters", "discover", "prunable_parameters"),
    "trace.problem": ("Problem",),
    "estimation": ("ESTIMATORS", "STATISTICS", "Estimator", "Statistic", "register"),
    "jobs.compare": ("compare",),
    "llama": ("Llama", "load_model", "load_tokenizer", "save_model"),
    "trace.subject.pruned": ("prune",),
    "runs.scores": ("load_run",),
    "runtime.progress": ("bars",),
    "steps.base": ("Step", "step"),
    "steps.chain": ("chain",),
    "steps.score.fusion": ("fuse",),
    "surgery": ("cut", "masks"),
}
"""The module of each name."""

__all__ = ["__version__", *sorted(name for names in _HOMES.values() for name in names)]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"saap_jax.{module}"), name)
    raise AttributeError(f"module 'saap_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
