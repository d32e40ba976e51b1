"""How models come about, as their directories say it: a step a command, and the card that is made of all of them."""

from pathlib import Path
from typing import Any

from saap_jax.config.method import CalibrationConfig, is_factory
from saap_jax.errors import reading
from saap_jax.llama.files.config import config_from_spec
from saap_jax.llama.files.sources import CARD, loader_of, resolve, source_of
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import quantization_of
from saap_jax.report.card import card
from saap_jax.runs.origin import FILE, SCHEMA, Base, Origin, OriginStep, read_origin
from saap_jax.runtime.digests import versions
from saap_jax.subjects.llama import CutLlama


def origin_of(name: str, place: Path | None = None) -> Origin:
    """Read how a model came about, as far as its files say it.

    Args:
        place: of its files; None: where its name leads, see `llama.files.load.resolve`.

    Raises:
        ValueError: what its directory says of that is damaged.
    """
    base: dict[str, str] = {"name": name}
    if not is_factory(name):
        place = place or resolve(name)
        if place.is_dir() and (found := read_origin(place)) is not None:
            with reading(place / FILE, "how the model came about; remove the file to go on without it"):
                card(found, name)  # reads all that the card of the next model says of it
            return found
        base = source_of(name, place)
    return {"schema": SCHEMA, "base": Base(**base), "loader": "traced" if is_factory(name) else "saap_jax", "steps": []}


def files_of(origin: Origin, step: OriginStep, model: Any, name: str) -> dict[str, dict[str, Any] | str]:
    """Write the record and the card of a model that a step made, by file name.

    Args:
        model: what was made, or the loader of its files.
        name: the model's directory.
    """
    loader: Any = model if isinstance(model, str) else "traced"
    if isinstance(model, CutLlama):
        model = model.model
    if isinstance(model, Llama):
        per_layer = None
        if quantization_of(model) is not None:
            per_layer = True
        loader = loader_of(config_from_spec(model.spec, "float32", per_layer=per_layer))
    step["facts"] = {name: value for name, value in step["facts"].items() if value}
    made: Origin = {**origin, "loader": loader, "steps": [*origin["steps"], {**step, "versions": versions()}]}
    return {FILE: dict(made), CARD: card(made, name)}


def calibration_text(config: CalibrationConfig, traced: bool) -> str:
    """Say on which text a model was calibrated.

    >>> calibration_text(CalibrationConfig(), False)
    '32 windows of 128 tokens of builtin:reference, seed 0'
    >>> calibration_text(CalibrationConfig(scenarios=("a", "b"), examples=8), True)
    '8 examples of each of a, b, seed 0'
    """
    texts = "each of " * (len(config.scenarios) > 1) + ", ".join(config.scenarios)
    if traced:
        return f"{config.examples or 'all'} examples of {texts or 'each calibration set'}, seed {config.seed}"
    return f"{config.examples} windows of {config.length} tokens of {texts}, seed {config.seed}"
