"""What `saap discover` runs: the coupled structures of one of our models, or of a factory's function."""

from pathlib import Path
from typing import Any

from saap_jax.config.method import is_factory
from saap_jax.config.use import DiscoverConfig
from saap_jax.llama.files.load import load_model
from saap_jax.report.blocks import Code
from saap_jax.report.couplings import coupling_figure
from saap_jax.report.figures import saved
from saap_jax.runtime.files import check_target, write_atomically
from saap_jax.runtime.progress import Track, quiet
from saap_jax.trace.listing import coupling_record, describe, listing, traced_model, traced_tables
from saap_jax.trace.problem import traced_factory


def discover(config: DiscoverConfig, *, track: Track = quiet) -> list[Any]:
    """Find the structures, draw them if that is asked for, and return what is to be shown."""
    check_target("--drawing", config.drawing)
    found: list[Any]
    if is_factory(config.model):
        traced, verdicts = traced_factory(config.model)
        found = [*traced_tables(config.model, traced, verdicts), *([Code("", describe(traced))] * config.details)]
    else:
        model = load_model(config.model)
        traced = traced_model(model) if config.drawing else None
        found = [*listing(config.model, model)]
    if config.drawing and traced is not None:
        write_atomically(Path(config.drawing), saved(coupling_figure(coupling_record(traced))))
        found.append({"drawing": config.drawing})
    return found
