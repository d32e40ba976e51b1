"""Pruning in steps: against cutting for good at every step, and what a comparison keeps of it."""

import dataclasses

import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import SearchConfig
from saap_jax.selection import calibrate
from saap_jax.selection.choose import checkpoints, choose_calibrated

import saap_jax
from saap_jax.api import select_path
from saap_jax.config.jobs import CompareConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, FusionConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.jobs import compare, prune
from saap_jax.llama.files.load import load_keep
from saap_jax.llama.segments import existing_units
from saap_jax.subjects.llama import LlamaSubject
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, random_tokens

STEPS = SearchConfig(allocation="global", rescore_every=0.2)
WINDOWS = saap_jax.data.Windows(random_tokens(6, 12), np.ones((6, 12), bool))
MODEL = dense_model(layers=3, mlp=16)


def path(estimator, ratios, search, model=MODEL):
    scenarios = {"calibration": WINDOWS}
    stability = search.allocation == "adaptive"
    calibrated = saap_jax.calibrate(model, WINDOWS, [estimator], stability=stability, batch_size=3)
    return select_path(model, calibrated, scenarios, estimator, ratios, search, batch_size=3)


def cut_path(estimator, ratios, search, every):
    """Do the same by cutting for good: score the smaller model as a new one, and number its units as the first one's.

    Each step asks for what is missing to the next ratio, as a share of what is left.
    """
    stability = search.allocation == "adaptive"
    keep = existing_units(MODEL.segments)
    whole = saap_jax.prunable_parameters(saap_jax.discover(MODEL))
    keeps, model = {}, MODEL
    for ratio in checkpoints(ratios, every):
        left = saap_jax.prunable_parameters(saap_jax.discover(model))
        calibrated = saap_jax.calibrate(model, WINDOWS, [estimator], stability=stability, batch_size=3)
        share = 1 - (1 - ratio) * whole / left
        smaller = choose_calibrated(LlamaSubject(model), calibrated, estimator, share, search).keep
        for name in STRUCTURES:
            for layer in range(len(keep[name])):
                units = np.flatnonzero(keep[name][layer])
                keep[name][layer, units] = smaller[name][layer, : len(units)]
        keeps[ratio] = {name: kept.copy() for name, kept in keep.items()}
        model = saap_jax.cut(MODEL, keep)
    return keeps


def same(first, second) -> bool:
    return all(np.array_equal(first[name], second[name]) for name in STRUCTURES)


@pytest.mark.parametrize(
    "estimator",
    ["gate_fisher", "gate_taylor+taylor_element", "taylor_element", "wanda"],
)
@pytest.mark.parametrize("options", [{}, {"allocation": "adaptive", "stability_weight": 0.5}], ids=["global", "λ"])
@pytest.mark.slow
def test_steps_by_masks_are_steps_by_cutting(estimator, options):
    search = dataclasses.replace(STEPS, **options)
    found, ratios = path(estimator, (0.6, 0.3), search), (0.3, 0.6)
    expected = cut_path(estimator, ratios, search, 0.2)
    assert list(found) == [0.6, 0.3]
    for ratio in ratios:
        assert same(found[ratio].keep, expected[ratio])
        assert ratio <= found[ratio].actual < ratio + 0.15
    once = path(estimator, ratios, dataclasses.replace(search, rescore_every=None))
    assert not same(once[0.6].keep, found[0.6].keep), "estimating again makes a difference"


@pytest.mark.slow
def test_what_is_gone_stays_gone():
    found = path("gate_fisher", (0.2, 0.4, 0.6), STEPS)
    for low, high in ((0.2, 0.4), (0.4, 0.6)):
        for name in STRUCTURES:
            assert not (found[high].keep[name] & ~found[low].keep[name]).any()


def test_attention_has_its_part_of_a_ratio_all_along_the_way_there():
    """With `attention_from` each ratio has a way of its own: it is the one with the share that it has at its end."""
    start = dataclasses.replace(STEPS, attention_share=0.5, attention_from=0.2)
    found = path("gate_fisher", (0.2, 0.6), start)
    for ratio, share in ((0.2, 0.0), (0.6, 0.5 * 0.4 / 0.6)):
        alone = dataclasses.replace(STEPS, attention_share=share)
        assert start.at_ratio(ratio).attention_share == pytest.approx(share)
        assert same(found[ratio].keep, path("gate_fisher", (ratio,), alone)[ratio].keep)
    assert found[0.2].keep["attention"].all()
    assert not found[0.6].keep["attention"].all()


def test_without_steps_nothing_is_observed_again(monkeypatch):
    monkeypatch.setattr("saap_jax.selection.choose.calibrate", lambda *_, **__: pytest.fail("observed again"))
    path("gate_fisher", (0.3, 0.6), dataclasses.replace(STEPS, rescore_every=None))
    path("gate_fisher", (0.3,), dataclasses.replace(STEPS, rescore_every=0.3))


@pytest.mark.slow
def test_attention_and_mlp_by_two_estimators():
    made = saap_jax.calibrate(MODEL, WINDOWS, ["gate_fisher", "wanda+magnitude", "gate_fisher/wanda+magnitude"])
    mixed = made.scores("gate_fisher/wanda+magnitude")
    np.testing.assert_array_equal(mixed["attention"], made.scores("gate_fisher")["attention"])
    np.testing.assert_array_equal(mixed["mlp"], made.scores("wanda+magnitude")["mlp"])
    assert not np.allclose(mixed["attention"], made.scores("wanda+magnitude")["attention"])
    assert list(made.fusions["calibration"]) == ["wanda+magnitude"]
    with pytest.raises(ValueError, match="unknown estimator"):
        calibrate.check_estimators(["gate_fisher/nonsense"], FusionConfig())


@pytest.fixture(scope="module")
def config(tiny_model_directory, tmp_path_factory) -> CompareConfig:
    return CompareConfig(
        name="steps",
        model=ModelConfig(name=str(tiny_model_directory)),
        calibration=CalibrationConfig(examples=3, length=16, batch_size=2),
        estimation=EstimationConfig(estimators=("gate_fisher", "gate_fisher/wanda")),
        search=SearchConfig(allocation="global", rescore_every=0.2),
        evaluation=EvaluationConfig(windows=3, length=16, batch_size=2),
        runs=str(tmp_path_factory.mktemp("runs")),
    )


@pytest.fixture(scope="module")
def run(config):
    return compare.compare(config)


@pytest.mark.slow
def test_a_comparison_in_steps_is_cut_as_prune_cuts(config, run, tmp_path):
    best = run.record["best"]["candidate"].partition("@")[0]
    options = {"model": config.model, "calibration": config.calibration, "search": config.search, "ratio": 0.2}
    options |= {"compensation": CompensationConfig(method="none")}
    prune.prune(PruneConfig(out=str(tmp_path / "pruned"), estimator=best, **options))
    assert same(load_keep(tmp_path / "pruned"), load_keep(run.path / "best"))
    # the run's own scores and text, whatever `calibration` says
    options |= {"calibration": CalibrationConfig(examples=1, length=8), "from_run": str(run.path)}
    prune.prune(PruneConfig(out=str(tmp_path / "reused"), estimator=best, **options))
    assert same(load_keep(tmp_path / "reused"), load_keep(run.path / "best"))


@pytest.mark.slow
def test_a_killed_comparison_searches_only_what_is_missing(config, run, tmp_path, monkeypatch):
    select, searched = select_path, []

    def killed(model, calibrated, scenarios, estimator, *rest, **options):
        searched.append(estimator)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return select(model, calibrated, scenarios, estimator, *rest, **options)

    monkeypatch.setattr(compare, "choose_path", killed)
    config = dataclasses.replace(config, runs=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        compare.compare(config)
    again = compare.compare(config)
    assert searched == ["gate_fisher", "gate_fisher/wanda", "gate_fisher/wanda"]
    for first, second in zip(again.candidates(), run.candidates(), strict=True):
        assert {**first, "seconds": 0} == {**second, "seconds": 0}
