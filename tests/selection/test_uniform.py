"""Layers that are alike: brute force over all shapes, limits and budget, the whole way to a plain export."""

import dataclasses
import json

import numpy as np
import pytest
from saap_jax.config.compensation import CompensationConfig
from saap_jax.config.search import (
    EvolveConfig,
    LearnConfig,
    PerStructure,
    SearchConfig,
    SharePerStructure,
    UniformConfig,
)
from saap_jax.selection.choose import choose, selection_of
from saap_jax.selection.uniform import Shape, shapes_of, uniform

from saap_jax.config.jobs import CompareConfig, ExportConfig
from saap_jax.config.method import CalibrationConfig, EstimationConfig, EvaluationConfig, ModelConfig
from saap_jax.config.prune import PruneConfig
from saap_jax.jobs import compare, prune
from saap_jax.jobs.export import export_model
from saap_jax.llama import load_model
from saap_jax.llama.files.load import load_keep
from saap_jax.subjects.llama import LlamaSubject
from tests.helpers import random_model, spec_of

SEARCH = SearchConfig(shape="uniform", uniform=UniformConfig(layers=0.5, finalists=100), min_keep=PerStructure(mlp=1))
LAYERS, HEADS, CHANNELS = 4, 3, 6


@pytest.fixture(scope="module")
def subject():
    return LlamaSubject(random_model(spec_of(*[(HEADS, CHANNELS)] * LAYERS)))


class Table:
    """Some function of how many units of each structure stay, the same on held-out text; of a layer alone, another."""

    parts = 2

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.layers = self.random.random(LAYERS)
        self.weights = {"attention": self.random.random(), "mlp": self.random.random()}

    def judge(self, keep) -> float:
        lost = sum(weight * (~keep[name]).mean() ** 2 for name, weight in self.weights.items())
        whole = ~keep["attention"].any(axis=1) & ~keep["mlp"].any(axis=1)
        return float(lost + self.layers[whole].sum() / 5)

    def value(self, keep, part: int) -> float:
        assert part == 0
        return self.judge(keep)

    def gradient(self, keep, part: int):
        raise AssertionError("it asks for no derivatives")


def run(subject, objective, ratio: float, config: SearchConfig = SEARCH):
    random = np.random.default_rng(0)
    scores = {name: random.random(units.shape) for name, units in subject.existing.items()}
    start = choose(subject, scores, ratio, dataclasses.replace(config, shape="free"))
    made = lambda keep: selection_of(subject, keep, ratio)  # noqa: E731
    return start, scores, uniform(start, scores, objective, subject.costs, subject.existing, config, made)


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_it_is_the_best_of_all_shapes(subject, ratio):
    """Of every number of layers, heads and channels that meets the ratio, when all are looked at by held-out text."""
    for seed in range(5):
        objective = Table(seed)
        start, scores, done = run(subject, objective, ratio)
        order, best = np.argsort(objective.layers, kind="stable"), np.inf
        for gone in range(LAYERS // 2 + 1):
            for heads in range(1, HEADS + 1):
                for channels in range(1, CHANNELS + 1):
                    keep = {"attention": np.zeros((LAYERS, HEADS), bool), "mlp": np.zeros((LAYERS, CHANNELS), bool)}
                    keep["attention"][order[gone:], :heads] = keep["mlp"][order[gone:], :channels] = True
                    if subject.removed(keep) >= ratio * subject.prunable:
                        best = min(best, objective.judge(keep))
        assert done.actual >= ratio
        assert objective.judge(done.keep) == pytest.approx(best)
        assert done.price == (objective.judge(start.keep), objective.judge(done.keep))
        stays = done.keep["attention"].any(axis=1)
        np.testing.assert_array_equal(stays, done.keep["mlp"].any(axis=1))
        for name, kept in done.keep.items():
            counts = kept[stays].sum(axis=1)
            assert len(set(counts.tolist())) == 1
            for layer in np.flatnonzero(stays):
                highest = np.sort(np.argsort(-scores[name][layer])[: counts[0]])
                np.testing.assert_array_equal(np.flatnonzero(kept[layer]), highest)


def test_shapes_keep_limits(subject):
    limited = dataclasses.replace(
        SEARCH,
        multiple_of=PerStructure(attention=1, mlp=2),
        max_ratio=SharePerStructure(attention=0.34, mlp=1.0),
        uniform=UniformConfig(layers=0.25),
    )
    found = shapes_of(subject.existing, subject.costs, 0.3, limited)
    assert found
    assert all(shape.mlp % 2 == 0 and shape.attention >= 2 and shape.layers <= 1 for shape in found)
    free = shapes_of(subject.existing, subject.costs, 0.3, SEARCH)
    assert {shape.layers for shape in free} == {0, 1, 2}
    assert Shape(0, 3, 6) not in free, "the whole model removes nothing"
    with pytest.raises(ValueError, match=r"no uniform shape removes 80.00% of the prunable parameters"):
        shapes_of(
            subject.existing, subject.costs, 0.8, dataclasses.replace(limited, max_ratio=SharePerStructure(mlp=0.1))
        )
    other = LlamaSubject(random_model(spec_of((3, 6), (2, 6))))
    with pytest.raises(ValueError, match="search.shape: expected a model whose layers are alike"):
        shapes_of(other.existing, other.costs, 0.2, SEARCH)


def test_what_nothing_goes_of_may_have_any_width(subject):
    """A multiple is of what is pruned: three heads stay three, where pairs go, and six channels six."""
    for multiple in (PerStructure(attention=2, mlp=1), PerStructure(attention=1, mlp=4)):
        search = dataclasses.replace(SEARCH, multiple_of=multiple)
        assert shapes_of(subject.existing, subject.costs, 0.0, search) == [Shape(0, HEADS, CHANNELS)]
        for shape in shapes_of(subject.existing, subject.costs, 0.2, search):
            assert shape.attention == HEADS or shape.attention % multiple.attention == 0
            assert shape.mlp == CHANNELS or shape.mlp % multiple.mlp == 0


def test_shapes_keep_what_the_search_keeps_of_limits_and_devices():
    """A limit is rounded as elsewhere, widths suit the device, and one layer stays whatever may go."""
    existing = {"attention": np.ones((4, 8), bool), "mlp": np.ones((4, 64), bool)}
    costs = {"attention": np.full(4, 8), "mlp": np.full(4, 1)}
    limited = dataclasses.replace(
        SEARCH, device="cpu", max_ratio=SharePerStructure(attention=0.7, mlp=1.0), uniform=UniformConfig(layers=1.0)
    )
    found = shapes_of(existing, costs, 0.5, limited)
    assert {shape.mlp % 16 for shape in found} == {0}
    assert {shape.layers for shape in found} <= {0, 1, 2, 3}
    free = shapes_of(existing, costs, 0.5, dataclasses.replace(limited, device="any"))
    assert {shape.mlp % 16 for shape in free} != {0}
    assert min(shape.attention for shape in free) == 3, "of eight heads 0.7 is 5.6, so five may go"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"learn": LearnConfig(steps=3)}, "expected no search.learn beside uniform"),
        ({"evolve": EvolveConfig(generations=3)}, "expected no search.evolve beside uniform"),
        ({"max_segments": 2}, "expected no search.max_segments beside uniform"),
    ],
)
def test_what_says_how_much_each_layer_keeps_is_refused_beside_it(options, said):
    with pytest.raises(ValueError, match=said):
        SearchConfig(shape="uniform", **options)


@pytest.mark.slow
def test_the_whole_way(tiny_model_directory, tmp_path):
    """A comparison tells the price, `saap prune` makes the same units, and the export is plain, without holes."""
    model = ModelConfig(name=str(tiny_model_directory))
    calibration = CalibrationConfig(examples=8, length=16, batch_size=2)
    search = SearchConfig(shape="uniform", uniform=UniformConfig(layers=0.5), rescore_every=0.2, skip_layers=(0,))
    config = CompareConfig(
        model=model, calibration=calibration, search=search, ratios=(0.3,), runs=str(tmp_path / "runs"),
        estimation=EstimationConfig(estimators=("wanda",)),
        evaluation=EvaluationConfig(windows=4, length=16, batch_size=2),
    )  # fmt: skip
    done = compare.compare(config)
    [row] = done.candidates()
    assert len({counts for counts in zip(*row["kept"].values(), strict=True) if any(counts)}) == 1
    [price] = done.record["prices"].values()
    page = (done.path / "report.html").read_text()
    assert "The price of layers that are alike" in page
    assert f"{price[1]:.4f}" in page
    pruned = prune.prune(
        PruneConfig(
            out=str(tmp_path / "pruned"), model=model, calibration=calibration, search=search, ratio=0.3,
            estimator="wanda", compensation=CompensationConfig(),
        )
    )  # fmt: skip
    assert list(pruned.selection.price) == price
    assert "of free layers and of these" in str(prune.summary_rows(pruned))
    for name, kept in load_keep(tmp_path / "pruned").items():
        np.testing.assert_array_equal(kept.sum(axis=1), row["kept"][name])
    export_model(ExportConfig(model=str(tmp_path / "pruned"), out=str(tmp_path / "plain"), format="hf"))
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    present = [heads for heads in row["kept"]["attention"] if heads]
    assert (said["num_hidden_layers"], said["num_key_value_heads"]) == (len(present), present[0])
    assert load_model(tmp_path / "plain").spec.uniform
