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
    from saap_jax.config.jobs import CompareConfig
    from saap_jax.data.windows import calibration_windows, evaluation_windows
    from saap_jax.estimation.base import Estimator, Statistic
    from saap_jax.estimation.registry import ESTIMATORS, STATISTICS, register
    from saap_jax.jobs.compare import compare
    from saap_jax.llama.files.load import load_model
    from saap_jax.llama.files.tokenizer import load_tokenizer
    from saap_jax.llama.files.write import save_model
    from saap_jax.llama.model import Llama
    from saap_jax.llama.segments import masks
    from saap_jax.runs.scores import load_run
    from saap_jax.runtime.progress import bars
    from saap_jax.steps.base import Step, step
    from saap_jax.steps.chain import chain
    from saap_jax.steps.score.fusion import fuse
    from saap_jax.structures.discovery import count_parameters, discover, prunable_parameters
    from saap_jax.surgery.cut import cut
    from saap_jax.trace.problem import Problem
    from saap_jax.trace.subject.pruned import prune

_HOMES = {
    "bars": "runtime.progress",
    "calibration_windows": "data.windows",
    "chain": "steps.chain",
    "compare": "jobs.compare",
    "CompareConfig": "config.jobs",
    "count_parameters": "structures.discovery",
    "cut": "surgery.cut",
    "discover": "structures.discovery",
    "Estimator": "estimation.base",
    "ESTIMATORS": "estimation.registry",
    "evaluation_windows": "data.windows",
    "fuse": "steps.score.fusion",
    "Llama": "llama.model",
    "load_model": "llama.files.load",
    "load_run": "runs.scores",
    "load_tokenizer": "llama.files.tokenizer",
    "masks": "llama.segments",
    "perplexity": "api",
    "Problem": "trace.problem",
    "prunable_parameters": "structures.discovery",
    "prune": "trace.subject.pruned",
    "register": "estimation.registry",
    "run_chain": "api",
    "save_model": "llama.files.write",
    "score_units": "api",
    "select_units": "api",
    "Statistic": "estimation.base",
    "STATISTICS": "estimation.registry",
    "Step": "steps.base",
    "step": "steps.base",
}
"""The module of each name."""

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saap_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saap_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
