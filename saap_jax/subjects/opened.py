"""From a name, a model or a problem to a subject."""

from collections.abc import Mapping
from typing import Any

from saap_jax.config.method import ModelConfig
from saap_jax.llama import Llama, load_model
from saap_jax.runtime.mesh import Layout
from saap_jax.subjects.base import Subject
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.trace.factory import made_problem
from saap_jax.trace.problem import Problem
from saap_jax.trace.subject import subject_of as traced_subject


def open_subject(
    config: ModelConfig,
    *,
    layout: Layout | None = None,
    lengths: Mapping[str, int] | None = None,
) -> Subject:
    """Load the model that a configuration names, or make the problem of its factory and trace it.

    Args:
        lengths: of the windows that it will read, as `load_model` takes them.

    Raises:
        ValueError: a name that is none, or a model or problem that cannot be pruned.
    """
    if config.traced:
        problem = made_problem(config.name)
        options = {"norms": config.norms, "refused": config.refused}
        return traced_subject(problem, name=config.name, layout=layout, **options)
    model = load_model(config.name, config.dtype, layout=layout, lengths=dict(lengths or {}))
    return LlamaSubject(model, config.name, config.name, layout)


def subject_of(model: Any) -> Subject:
    """Return a model of ours or a problem as a subject; a subject as it is.

    Raises:
        ValueError: something else.
    """
    if isinstance(model, Llama):
        return LlamaSubject(model)
    if isinstance(model, Problem):
        return traced_subject(model)
    if not isinstance(model, Subject):
        raise ValueError(f"model: expected one of saap_jax.load_model, or a Problem, got {type(model).__name__}")
    return model
