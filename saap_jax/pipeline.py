"""The method from end to end: the calls in their order. Read this file first.

    load model and text -> observe and score (2a) -> fuse (2b) -> search (2c) -> mask and evaluate -> cut (2d) -> save

The first half are the few functions that a Python session needs, the second half what `saap score`, `saap prune`,
`saap evaluate` and `saap fidelity` run. The comparison of estimators is in `comparison`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saap_jax.config import (
    CalibrationConfig,
    CompareConfig,
    EvaluateConfig,
    FidelityConfig,
    FusionConfig,
    PruneConfig,
    ScoreConfig,
    SearchConfig,
)
from saap_jax.data import Windows, batches, calibration_windows, evaluation_windows
from saap_jax.discovery import count_parameters, discover, unit_costs
from saap_jax.estimation import Statistic, make_estimators, observe, score, union_of_needs
from saap_jax.estimation.ablation import (
    Unit,
    ablate,
    changes_from_lines,
    changes_to_lines,
    changes_to_scores,
    sample_units,
)
from saap_jax.estimation.observe import curvature_of
from saap_jax.evaluation.cost import directory_bytes, weight_bytes
from saap_jax.evaluation.fidelity import Fidelity, fidelity
from saap_jax.evaluation.perplexity import metric_name, window_losses
from saap_jax.fusion import Fused, PerExample, fuse
from saap_jax.llama import Llama, load_model, load_tokenizer, save_model
from saap_jax.llama.runs import existing_units
from saap_jax.report import RunDirectory, provenance, read_run
from saap_jax.search import Selection, search
from saap_jax.stability import fluctuation_of, stability_indicator
from saap_jax.surgery import cut, masks
from saap_jax.types import STRUCTURES, Keep, Remat, Scores

Track = Callable[[str, Iterable[Any], int], Iterator[Any]]
"""Wraps an iterable, to show progress: (what is being done, items, how many)."""


def quiet(doing: str, items: Iterable[Any], total: int) -> Iterator[Any]:
    """Show no progress."""
    return iter(items)


@contextlib.contextmanager
def step(track: Track, doing: str) -> Iterator[None]:
    """Show a step that cannot be counted as one item of work."""
    items = track(doing, [None], 1)
    next(items)
    yield
    next(items, None)


# --- what a Python session needs -----------------------------------------------------------------


class Calibrated(NamedTuple):
    """What one pass over the calibration text tells of every unit."""

    scores: dict[str, Scores]
    """`{estimator: {"attention": [layers, kv_heads], "mlp": [layers, mlp]}}`, larger = more important."""
    stability: Scores | None
    """Stability indicator ASI over examples, of |∂ℒ_n/∂g|; None where gate gradients were not observed."""
    fusions: dict[str, Fused]
    """Of the estimators that are fusions of others: how the fused scores came about."""


def calibrate(
    model: Llama,
    windows: Windows,
    estimators: Iterable[str],
    *,
    fusion: FusionConfig | None = None,
    stability: bool = False,
    batch_size: int = 8,
    remat: Remat = "dots",
    track: Track = quiet,
) -> Calibrated:
    """Score every unit of a model by every estimator named, from one pass over the calibration windows.

    Args:
        estimators: names, with hyper-parameters in brackets if any; `a+b` fuses the scores of two or more estimators,
            and `saap` those that `fusion` names.
        fusion: how scores are fused.
        stability: observe what the stability indicator needs, even if no estimator does.
    """
    estimators, fusion = tuple(estimators), fusion or FusionConfig()
    members = {name: fusion_members(name, fusion) for name in estimators}
    made = make_estimators(dict.fromkeys(member for names in members.values() for member in names))
    needs = union_of_needs(made.values()) | (frozenset({Statistic.GATE_GRADIENT}) if stability else frozenset())
    pairs = _pairs(windows, batch_size)
    statistics = observe(
        model,
        pairs,
        needs,
        curvature=curvature_of(made.values()),
        remat=remat,
        progress=lambda items: track("observe the calibration text", items, len(pairs)),
    )
    scores = score(made, statistics, model)
    examples: PerExample = {}
    if Statistic.GATE_GRADIENT in needs:
        gradients = statistics.of(Statistic.GATE_GRADIENT)
        examples = {n: np.where(existing_units(model.runs)[n], np.abs(g), np.nan) for n, g in gradients.items()}
    fusions = {
        name: fuse(
            {member: scores[member] for member in names},
            fusion.method,
            fusion.scope,
            fusion.scope_constant,
            {"gate_taylor": examples} if examples else None,
        )
        for name, names in members.items()
        if len(names) > 1
    }
    indicator = stability_indicator(fluctuation_of(examples)) if len(statistics.losses) > 1 and examples else None
    return Calibrated({n: fusions[n].scores if n in fusions else scores[n] for n in estimators}, indicator, fusions)


def fusion_members(name: str, fusion: FusionConfig) -> tuple[str, ...]:
    """Return the estimators that a name stands for: itself, or the parts of a fusion (`a+b`, `saap`).

    >>> fusion_members("gate_taylor+taylor_element", FusionConfig())
    ('gate_taylor', 'taylor_element')
    """
    return fusion.estimators if name == "saap" else tuple(part.strip() for part in name.split("+"))


def score_units(
    model: Llama, windows: Windows, estimators: Iterable[str], *, batch_size: int = 8, track: Track = quiet
) -> dict[str, Scores]:
    """Return the scores of `calibrate`: `{estimator: {structure: [layers, units]}}`, larger = more important."""
    return calibrate(model, windows, estimators, batch_size=batch_size, track=track).scores


def select_units(
    model: Llama, scores: Scores, ratio: float, config: SearchConfig | None = None, stability: Scores | None = None
) -> Selection:
    """Choose the units to keep so that at least `ratio` of the model's prunable parameters goes."""
    config, costs = config or SearchConfig(), unit_costs(discover(model))
    return search(scores, costs, existing_units(model.runs), ratio, config, stability)


def perplexity(model: Llama, windows: Windows, keep: Keep | None = None, *, batch_size: int = 8) -> float:
    """Return exp(mean next-token loss) over the windows; with `keep`, of the model with all other units masked."""
    return window_losses(model, _pairs(windows, batch_size), None if keep is None else masks(keep)).perplexity


def kept_parameters(model: Llama, keep: Keep) -> int:
    """Count the parameters that a model has after a cut."""
    exists, costs = existing_units(model.runs), unit_costs(discover(model))
    removed = sum(((exists[n] & ~keep[n]).sum(axis=1) * costs[n]).sum() for n in STRUCTURES)
    return count_parameters(model) - int(removed)


def _pairs(windows: Windows, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(batch.tokens, batch.mask) for batch, _ in batches(windows, min(batch_size, len(windows.tokens)))]


# --- what the commands run -----------------------------------------------------------------------


def score_run(
    config: ScoreConfig, *, overwrite: bool = False, track: Track = quiet
) -> tuple[RunDirectory, dict[str, Scores]]:
    """Score every unit by every estimator, and keep the scores in a run directory (or return those it holds)."""
    check_estimators(config.estimation.estimators, config.fusion)
    run = RunDirectory.open(Path(config.runs) / config.name, dataclasses.asdict(config), overwrite=overwrite)
    if not run.finished:
        with run.stage("load"):
            model, tokenizer = load_model(config.model.name, config.model.dtype), load_tokenizer(config.model.name)
        calibration = calibration_of(config.calibration, tokenizer)
        run.begin()
        with run.stage("score"):
            kept_scores(run, model, calibration, config, False, track)
        run.update(kind="score", status="finished", **provenance())
    return run, read_scores(run).scores


class Pruned(NamedTuple):
    """What `prune` did."""

    selection: Selection
    parameters: tuple[int, int]
    """Before and after."""
    bytes: tuple[int, int]
    """Of the weights in memory before, of the saved file after."""
    runs: int


def prune(config: PruneConfig, *, track: Track = quiet) -> Pruned:
    """Prune a model by one estimator at one ratio, and save the smaller model as a directory."""
    out = Path(config.out)
    if out.exists():
        raise ValueError(f"out: expected a directory that does not exist yet, found {out}; choose another --out")
    check_estimators([config.estimator], config.fusion)
    model = load_model(config.model.name, config.model.dtype)
    tokenizer = load_tokenizer(config.model.name)
    if config.from_run:
        calibrated = read_scores(RunDirectory(Path(config.from_run), read_run(config.from_run)))
        if config.estimator not in calibrated.scores:
            known = ", ".join(calibrated.scores)
            raise ValueError(f"from_run: {config.from_run} has no scores of {config.estimator}; it has {known}")
    else:
        calibrated = calibrate(
            model,
            calibration_of(config.calibration, tokenizer),
            [config.estimator],
            fusion=config.fusion,
            stability=config.search.allocation == "adaptive",
            batch_size=config.calibration.batch_size,
            remat=config.remat,
            track=track,
        )
    scores = calibrated.scores[config.estimator]
    selection = select_units(model, scores, config.ratio, config.search, calibrated.stability)
    pruned = cut(model, selection.keep)
    save_model(pruned, out, tokenizer=tokenizer, keep=selection.keep)
    return Pruned(
        selection=selection,
        parameters=(count_parameters(model), count_parameters(pruned)),
        bytes=(weight_bytes(model), directory_bytes(out, "*.safetensors")),
        runs=len(pruned.runs),
    )


class Evaluated(NamedTuple):
    """Perplexities of one model, by metric name."""

    parameters: int
    ppl: dict[str, float]


def evaluate(config: EvaluateConfig, *, track: Track = quiet) -> dict[str, Evaluated]:
    """Return the perplexity of every model on every text; one model is in memory at a time."""
    rows = {}
    for name in track("evaluate models", config.models, len(config.models)):
        model, tokenizer = load_model(name, config.dtype), load_tokenizer(name)
        ppl = {}
        for source in config.sources:
            windows = evaluation_windows(source, tokenizer, config.length, config.windows or None)
            ppl[metric_name(config.length, source)] = perplexity(model, windows, batch_size=config.batch_size)
        rows[name] = Evaluated(count_parameters(model), ppl)
    return rows


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
    windows = calibration_of(config.calibration, tokenizer)
    run.begin()
    with run.stage("score"):
        scores = kept_scores(run, model, windows, config, False, track).scores
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
            _pairs(windows, config.calibration.batch_size),
            units,
            done=done,
            save=save,
            progress=lambda groups: track("ablate units", groups, len(groups)),
        )
    exact = changes_to_scores({unit: changes[unit] for unit in units}, exists)
    rows = fidelity(scores, exact, resamples=config.resamples, seed=config.seed)
    run.save_json("fidelity", [row._asdict() for row in rows])
    run.update(kind="fidelity", status="finished", **provenance())
    return run, rows, scores, exact


def kept_scores(
    run: RunDirectory,
    model: Llama,
    calibration: Windows,
    config: CompareConfig | FidelityConfig | ScoreConfig,
    stability: bool,
    track: Track = quiet,
) -> Calibrated:
    """Return the scores that the run holds, or make and keep them."""
    if not (run.path / "scores.npz").exists():
        made = calibrate(
            model,
            calibration,
            config.estimation.estimators,
            fusion=config.fusion,
            stability=stability,
            batch_size=config.calibration.batch_size,
            remat=config.estimation.remat,
            track=track,
        )
        fusions = {name: f._asdict() | {"scores": None} for name, f in made.fusions.items()}
        run.update(fusions=fusions)
        run.save_arrays("stability", made.stability or {})
        flat = {f"{name}/{part}": value for name, s in made.scores.items() for part, value in s.items()}
        run.save_arrays("scores", flat)
    return read_scores(run)


def read_scores(run: RunDirectory) -> Calibrated:
    """Read the scores and the stability indicator that a run keeps."""
    scores: dict[str, Scores] = {}
    for key, value in run.load_arrays("scores").items():
        name, _, structure = key.rpartition("/")
        scores.setdefault(name, {})[structure] = value
    stability: Scores = dict(run.load_arrays("stability"))
    return Calibrated(scores, stability or None, {})


def check_estimators(names: Iterable[str], fusion: FusionConfig) -> None:
    """Raise ValueError for an unknown estimator, alone or within a fusion, or one that is named twice."""
    names = list(names)
    for name in names:
        make_estimators(fusion_members(name, fusion))
        if names.count(name) > 1:
            raise ValueError(f"estimator {name!r} is named twice")
    if not names:
        make_estimators(names)


def calibration_of(config: CalibrationConfig, tokenizer: Any) -> Windows:
    return calibration_windows(config.source, tokenizer, config.examples, config.length, config.seed)
