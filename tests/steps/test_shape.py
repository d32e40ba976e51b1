"""Layers that are alike: brute force over all shapes, limits and budget, the whole way to a plain export."""

import json

import numpy as np
import pytest

import saap_jax
from saap_jax.config.use import ExportConfig
from saap_jax.data.windows import Windows
from saap_jax.export.command import export_model
from saap_jax.llama.files.load import load_model
from saap_jax.llama.files.write import save_model
from saap_jax.steps.allocation.allocations import Uniform
from saap_jax.steps.limits import Within
from saap_jax.steps.refinement.shape import Shape, UniformShape, shapes_of
from saap_jax.subjects.llama import LlamaSubject
from tests.divergence import batches_of
from tests.helpers import random_model, spec_of
from tests.steps.refined import refined, start_of

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


@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_it_is_the_best_of_all_shapes(subject, ratio):
    """Of every number of layers, heads and channels that meets the ratio, when all are looked at by held-out text."""
    for seed in range(5):
        objective = Table(seed)
        start = start_of(subject, ratio, Uniform())
        done, scores = refined(subject, start, UniformShape(0.5, finalists=100), objective, ratio), start.scores
        order, best = np.argsort(objective.layers, kind="stable"), np.inf
        for gone in range(LAYERS // 2 + 1):
            for heads in range(1, HEADS + 1):
                for channels in range(1, CHANNELS + 1):
                    keep = {"attention": np.zeros((LAYERS, HEADS), bool), "mlp": np.zeros((LAYERS, CHANNELS), bool)}
                    keep["attention"][order[gone:], :heads] = keep["mlp"][order[gone:], :channels] = True
                    if subject.removed(keep) >= ratio * subject.prunable:
                        best = min(best, objective.judge(keep))
        assert subject.removed(done.keep) >= ratio * subject.prunable
        assert objective.judge(done.keep) == pytest.approx(best)
        assert done.metrics["price"] == [objective.judge(start.keep), objective.judge(done.keep)]
        stays = done.keep["attention"].any(axis=1)
        np.testing.assert_array_equal(stays, done.keep["mlp"].any(axis=1))
        for name, kept in done.keep.items():
            counts = kept[stays].sum(axis=1)
            assert len(set(counts.tolist())) == 1
            for layer in np.flatnonzero(stays):
                highest = np.sort(np.argsort(-scores[name][layer])[: counts[0]])
                np.testing.assert_array_equal(np.flatnonzero(kept[layer]), highest)


def test_shapes_keep_limits(subject):
    def shapes(ratio: float, within: Within = Within(), layers: float = 0.25):  # noqa: B008
        return shapes_of(subject.existing, subject.costs, ratio, within, layers)

    found = shapes(0.3, Within(multiple_of={"mlp": 2}, max_ratio={"attention": 0.34}))
    assert found
    assert all(shape.mlp % 2 == 0 and shape.attention >= 2 and shape.layers <= 1 for shape in found)
    free = shapes(0.3, layers=0.5)
    assert {shape.layers for shape in free} == {0, 1, 2}
    assert Shape(0, 3, 6) not in free, "the whole model removes nothing"
    with pytest.raises(ValueError, match=r"shape: no uniform shape removes 80.00% of the prunable parameters"):
        shapes(0.8, Within(max_ratio={"mlp": 0.1}))
    for multiple in ({"attention": 2}, {"mlp": 4}):  # of what is pruned: three heads stay three, where pairs go
        within = Within(multiple_of=multiple)
        assert shapes(0.0, within, 0.5) == [Shape(0, HEADS, CHANNELS)]
        for shape in shapes(0.2, within, 0.5):
            assert shape.attention == HEADS or shape.attention % multiple.get("attention", 1) == 0
            assert shape.mlp == CHANNELS or shape.mlp % multiple.get("mlp", 1) == 0


def test_shapes_round_a_limit_as_elsewhere_and_one_layer_stays():
    existing = {"attention": np.ones((4, 8), bool), "mlp": np.ones((4, 64), bool)}
    costs = {"attention": np.full(4, 8), "mlp": np.full(4, 1)}
    within = Within(multiple_of={"mlp": 16}, max_ratio={"attention": 0.7})
    found = shapes_of(existing, costs, 0.5, within, 1.0)
    assert {shape.mlp % 16 for shape in found} == {0}
    assert {shape.layers for shape in found} <= {0, 1, 2, 3}
    free = shapes_of(existing, costs, 0.5, Within(max_ratio={"attention": 0.7}), 1.0)
    assert min(shape.attention for shape in free) == 3, "of eight heads 0.7 is 5.6, so five may go"


def test_what_it_cannot_follow_is_refused(subject):
    text = Windows(*(np.concatenate(parts) for parts in zip(*batches_of(), strict=True)))
    other = LlamaSubject(random_model(spec_of((3, 6), (2, 6))))
    for model, chain, said in (
        (subject, "random > within(depth=True, min_keep=0) > global > shape", "shape: expected no depth"),
        (other, "random > uniform > shape", "shape: expected a model whose layers are alike"),
    ):
        with pytest.raises(ValueError, match=said):
            saap_jax.run_chain(model, chain, text, 0.2, batch_size=2)


@pytest.mark.slow
def test_the_whole_way_to_a_plain_export(tiny_model_directory, tmp_path):
    """Behind rounds too; the price is told; the export is plain, without holes."""
    model, tokenizer = load_model(tiny_model_directory), saap_jax.load_tokenizer(tiny_model_directory)
    windows = saap_jax.calibration_windows("builtin:reference", tokenizer, 8, 16, 0)
    chain = "wanda > within(protect=(0,)) > uniform > shape(0.5) > least_squares"
    done = saap_jax.run_chain(model, chain, windows, 0.3, batch_size=2)
    pairs = zip(*(kept.sum(axis=1).tolist() for kept in done.keep.values()), strict=True)
    counts = [pair for pair in pairs if any(pair)]
    assert len(set(counts)) == 1
    assert len(done.metrics["price"]) == 2
    small = save_model(done.subject.cut(done.keep).model, tmp_path / "pruned", tokenizer=tokenizer)
    export_model(ExportConfig(model=str(small), out=str(tmp_path / "plain"), format="hf"))
    said = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (said["num_hidden_layers"], said["num_key_value_heads"]) == (len(counts), counts[0][0])
    assert load_model(tmp_path / "plain").spec.uniform
