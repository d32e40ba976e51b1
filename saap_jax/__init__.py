"""saap_jax: structured pruning of LLaMA-family language models in JAX and Flax.

The pipeline in order (each name is importable from here):

    load_model, load_tokenizer            a model and its tokenizer
    calibration_windows                   text to estimate importance on
    discover                              1.  coupled structures: which weights must go together
    score_units                           2a. importance of every unit, by any number of estimators, from one pass
    select_units                          2c. what to keep, under a parameter budget
    masks, cut                            2d. the pruned model, as gates or as smaller arrays
    evaluation_windows, perplexity        4.  what it costs in quality
    save_model                            the smaller model as a directory

A model of another library goes through `prune`, by an adapter of `saap_jax.adapters` or a `Problem`.

A name is imported when it is first used, so that the console script starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from saap_jax.version import __version__

if TYPE_CHECKING:
    from saap_jax.data import calibration_windows, evaluation_windows
    from saap_jax.discovery import count_parameters, discover, prunable_parameters
    from saap_jax.estimation import ESTIMATORS
    from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
    from saap_jax.options import SearchConfig
    from saap_jax.pipeline import perplexity, score_units, select_units
    from saap_jax.pruned import prune
    from saap_jax.surgery import cut, masks

__all__ = [
    "ESTIMATORS",
    "Llama",
    "SearchConfig",
    "__version__",
    "calibration_windows",
    "count_parameters",
    "cut",
    "discover",
    "evaluation_windows",
    "load_model",
    "load_tokenizer",
    "masks",
    "perplexity",
    "prunable_parameters",
    "prune",
    "save_model",
    "score_units",
    "select_units",
]

_HOMES = {
    "data": ("calibration_windows", "evaluation_windows"),
    "discovery": ("count_parameters", "discover", "prunable_parameters"),
    "estimation": ("ESTIMATORS",),
    "llama": ("Llama", "load_model", "load_tokenizer", "save_model"),
    "options": ("SearchConfig",),
    "pruned": ("prune",),
    "pipeline": ("perplexity", "score_units", "select_units"),
    "surgery": ("cut", "masks"),
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"saap_jax.{module}"), name)
    raise AttributeError(f"module 'saap_jax' has no attribute {name!r}")
