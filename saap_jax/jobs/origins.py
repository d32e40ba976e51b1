"""How models come about, as their directories say it: a step a command, and the card that is made of all of them."""

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saap_jax.config.jobs import CompareConfig, PruneConfig
from saap_jax.config.method import CalibrationConfig, is_factory
from saap_jax.config.recover import MethodConfig, RecoverConfig
from saap_jax.config.use import ExportConfig
from saap_jax.errors import reading
from saap_jax.llama.files.config import config_from_spec
from saap_jax.llama.files.sources import CARD, loader_of, resolve, source_of
from saap_jax.llama.model import Llama
from saap_jax.llama.quantized import quantization_of
from saap_jax.records import RECOVERY, Measured, Row, RunRecord
from saap_jax.report.card import card
from saap_jax.runs.commands import command_of, options, prune_command
from saap_jax.runs.origin import FILE, SCHEMA, Base, Origin, OriginStep, figures_of, read_origin
from saap_jax.runtime.digests import versions
from saap_jax.runtime.words import plural
from saap_jax.steps.allocation.allocation import Selection
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
    model = model.model if isinstance(model, CutLlama) else model
    if isinstance(model, Llama):
        per_layer = True if quantization_of(model) is not None else None
        loader = loader_of(config_from_spec(model.spec, "float32", per_layer=per_layer))
    step["facts"] = {name: value for name, value in step["facts"].items() if value}
    made: Origin = {**origin, "loader": loader, "steps": [*origin["steps"], {**step, "versions": versions()}]}
    return {FILE: dict(made), CARD: card(made, name)}


def pruned(
    config: PruneConfig, chain: str, calibration: CalibrationConfig, selection: Selection, parameters: tuple[int, int]
) -> OriginStep:
    """Write the step of `saap prune`; `chain` is the method in full, `parameters` are those before and after."""
    facts = {
        "method": config.chain,
        "chain": chain if chain != config.chain else "",
        "scores": f"of the run {config.from_run}" if config.from_run else "",
        "calibration": calibration_text(calibration, config.model.traced),
        "targets": ", ".join(f"{name} {limit}" for name, limit in config.targets.asked.items()),
    }
    command = " ".join(["saap prune", *options(dataclasses.asdict(config), PruneConfig())])
    ratio = (selection.asked, selection.actual)
    return OriginStep(
        kind="prune", command=command, model=config.model.name, parameters=parameters, ratio=ratio, facts=facts
    )


def chosen(config: CompareConfig, run: RunRecord, row: Row, parameters: int) -> OriginStep:
    """Write the step of `saap compare` that cuts the candidate of a row; `parameters` are those of the cut model."""
    calibration = dataclasses.replace(config.calibration, seed=row["seed"])
    facts = {
        "candidate": row["candidate"],
        "chain": row["chain"],
        "calibration": calibration_text(calibration, config.model.traced),
        "made alone by": prune_command(run, row),
    }
    return {
        "kind": "compare",
        "command": command_of(config),
        "model": config.model.name,
        "parameters": (run["model"]["parameters"], parameters),
        "ratio": (row["ratio_asked"], row["ratio_actual"]),
        "facts": facts,
        "figures": figures_of({"dense": run["dense"], "pruned": row}, run.get("articles", {})),
    }


def recovered(config: RecoverConfig, run: RunRecord) -> OriginStep:
    """Write the step of `saap recover`, whose record has what was measured of all models."""
    training, data = run["training"], run["data"]
    method = {name: value for name, value in dataclasses.asdict(config.method).items() if name != "name"}
    models: Mapping[str, Measured] = {label: run[key] for key, label in RECOVERY.items() if key in run}
    best = None if training["best_step"] == training["steps"] else training["best_step"]
    facts = {
        "method": " ".join([config.method.name, *options(method, MethodConfig())]),
        "text": f"{', '.join(config.data.sources)}: {plural(data['rows'], 'row')} of {config.data.length} tokens, "
        f"seed {config.data.seed}",
        "training": f"{plural(training['steps'], 'step')} of {plural(training['rows'], 'row')}, "
        f"seed {config.training.seed}" + (f"; the model is that of step {best}" if best else ""),
        "learned from": config.dense if config.training.distillation or config.training.hidden else "",
    }
    return {
        "kind": "recover",
        "command": command_of(config),
        "model": config.model,
        "parameters": (run["before"]["parameters"], run["after"]["parameters"]),
        "facts": facts,
        "figures": figures_of(models, run.get("articles", {})),
        "written": run.get("written", []),
    }


def exported(config: ExportConfig, parameters: tuple[int, int], notes: tuple[str, ...]) -> OriginStep:
    """Write the step of `saap export`."""
    words = options(dataclasses.asdict(config), ExportConfig(model=config.model, out=config.out))
    facts = {"format": config.format, "dtype": config.dtype, "notes": "; ".join(notes)}
    command = " ".join(["saap export", *map(shlex.quote, (config.model, config.out)), *words])
    return OriginStep(kind="export", command=command, model=config.model, parameters=parameters, facts=facts)


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
