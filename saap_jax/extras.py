"""Packages that are installed on demand: an extra of `pip install 'saap_jax[EXTRA]'` each.

    need("gguf", "GGUF files")
    import gguf

Whoever needs such a package says so before the import, and a missing one is one line. What only adds to a result, such
as figures to a page, asks by `missing` and goes on without.
"""

import importlib.util

EXTRAS = {
    "eval": "lm_eval",
    "figures": "matplotlib",
    "gguf": "gguf",
    "tensorboard": "tensorboardX",
    "tfds": "tensorflow_datasets",
    "tpu-plan": "libtpu",
}
"""Extra -> the module that it brings."""


def missing(extra: str, what: str) -> str:
    """Say in one line that `what` takes an extra that is not installed; empty where it is. Nothing is imported."""
    module = EXTRAS[extra]
    if importlib.util.find_spec(module) is not None:
        return ""
    return f"{what}: expected the package {module}, which is not installed; run pip install 'saap_jax[{extra}]'"


def need(extra: str, what: str) -> None:
    """Go on where an extra is installed.

    Raises:
        ValueError: it is not, with what it is needed for and how it is installed.
    """
    if line := missing(extra, what):
        raise ValueError(line)
