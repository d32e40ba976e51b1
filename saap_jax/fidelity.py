"""How well do estimators predict the exact effect of removing a unit? What `saap fidelity` runs."""

import dataclasses
from pathlib import Path

import numpy as np

from saap_jax.calibration import Track, check_estimators, pairs, quiet, scenarios_of
from saap_jax.config import FidelityConfig
from saap_jax.data import Windows
from saap_jax.estimation.ablation import (
    Unit,
    ablate,
    changes_from_lines,
    changes_to_lines,
    changes_to_scores,
    sample_units,
)
from saap_jax.evaluation.fidelity import Fidelity, fidelity
from saap_jax.kept import kept_scores
from saap_jax.llama import load_model, load_tokenizer
from saap_jax.llama.runs import existing_units
from saap_jax.pipeline import tokens_to_observe
from saap_jax.report import RunDirectory, provenance, write_scalars
from saap_jax.types import Scores


def judge(
    config: FidelityConfig, *, overwrite: bool = False, track: Track = quiet
) -> tuple[RunDirectory, list[Fidelity], dict[str, Scores], Scores]:
    """Compare every estimator's scores with the oracle, the exact change of loss on the calibration windows themselves.

    Ablation is the longest job: finished units are appended to `ablation.jsonl`, and the same call goes on from there.

    Returns:
        The run, the rank correlations, the scores, and the exact changes (NaN where a unit was not ablated).
    """
    check_estimators(config.estimation.estimators, config.fusion)
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    model, tokenizer = load_model(config.model.name, config.model.dtype), load_tokenizer(config.model.name)
    scenarios = scenarios_of(config.calibration, tokenizer)
    windows = Windows(*(np.concatenate(parts) for parts in zip(*scenarios.values(), strict=True)))
    run.begin()
    with run.stage("score") as stage:
        tokens = tokens_to_observe(run, scenarios)
        calibrated = kept_scores(run, model, scenarios, config, track=track)
        stage.tokens = tokens
    scores = {name: calibrated.scores(name) for name in calibrated.estimators}
    exists = existing_units(model.runs)
    units = sample_units(exists, config.channels_per_layer, config.seed)
    path = run.claim("ablation.jsonl")
    done = changes_from_lines(path.read_text()) if path.exists() else {}
    with run.stage("ablate"), open(path, "a") as file:

        def save(changes: list[tuple[Unit, float]]) -> None:
            file.write(changes_to_lines(changes))
            file.flush()

        changes = ablate(
            model,
            pairs(windows, config.calibration.batch_size),
            units,
            done=done,
            save=save,
            progress=lambda groups: track("ablate units", groups, len(groups)),
        )
    exact = changes_to_scores({unit: changes[unit] for unit in units}, exists)
    rows = fidelity(scores, exact, windows=len(windows.tokens), resamples=config.resamples, seed=config.seed)
    run.save_json("fidelity", [row._asdict() for row in rows])
    write_scalars(run)
    run.update(kind="fidelity", status="finished", **provenance())
    return run, rows, scores, exact
