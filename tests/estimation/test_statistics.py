"""Statistics are values: one that the package does not know is observed, checked and stored like its own."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import saap_jax
from saap_jax.data.windows import Windows
from saap_jax.estimation import storage
from saap_jax.estimation.base import Statistic, mean_over
from saap_jax.estimation.gates import GATE_GRADIENT
from saap_jax.estimation.observe import observe
from saap_jax.estimation.registry import STATISTICS
from saap_jax.estimation.storage import load_statistics, save_statistics
from saap_jax.types import STRUCTURES
from tests.helpers import dense_model, length_mask, random_model, random_tokens, spec_of

HOW_TO = Path(__file__).parents[2] / "docs" / "estimator.md"
PEAK = """

from saap_jax.estimation.base import Estimator


def peak() -> Estimator:
    return Estimator(needs=frozenset({LARGEST}), score=lambda statistics, params: statistics.of(LARGEST))
"""
TOKENS, MASK = random_tokens(5, 8), length_mask(8, 5, 7, 8, 3, seq=8)
BATCHES = [(np.pad(TOKENS, ((0, 1), (0, 0)))[i : i + 2], np.pad(MASK, ((0, 1), (0, 0)))[i : i + 2]) for i in (0, 2, 4)]


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "mine.py"
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", HOW_TO.read_text(), re.S) if "LARGEST" in block)
    path.write_text(block + PEAK)
    return path


def plain_maximum(model) -> dict[str, np.ndarray]:
    """Return the largest |activation| of each unit, by a forward pass that keeps all of them."""
    (points,) = model.hidden(jnp.asarray(TOKENS), observe=lambda _, activation: activation)[1]
    layers = {name: np.abs(np.asarray(points[name])) for name in STRUCTURES}
    layers = {name: x.reshape(*x.shape[:4], -1).max(axis=-1) for name, x in layers.items()}
    return {name: np.where(MASK[None, :, :, None], x, 0).max(axis=(1, 2)) for name, x in layers.items()}


@pytest.mark.slow
def test_a_statistic_in_a_file_is_observed_and_scored(plugin):
    model = dense_model()
    largest = runpy.run_path(str(plugin))["LARGEST"]
    seen = observe(model, BATCHES, frozenset({largest, GATE_GRADIENT}))
    for name, expected in plain_maximum(model).items():
        np.testing.assert_allclose(seen.of(largest)[name], expected, rtol=1e-5)
        assert not np.allclose(expected, np.asarray(seen.of(largest)[name])[::-1], rtol=1e-2), "control"
    scored = saap_jax.score_units(model, Windows(TOKENS, MASK), [f"{plugin}:peak"])
    for name, expected in plain_maximum(model).items():
        np.testing.assert_allclose(scored.scores(f"{plugin}:peak")[name], expected, rtol=1e-5)


@pytest.mark.slow
def test_it_is_stored(plugin, tmp_path):
    model, largest = random_model(spec_of((2, 6), (1, 3))), runpy.run_path(str(plugin))["LARGEST"]
    needs = frozenset({largest, GATE_GRADIENT})
    whole = observe(model, BATCHES, needs)
    path = save_statistics(tmp_path / "s", whole)
    assert storage.kept_statistics(path) == {"largest_activation", "gate_gradient"}
    read = load_statistics(path, model, known=[largest])
    jax.tree.map(np.testing.assert_array_equal, read, whole)
    assert set(load_statistics(path, model).values) == {GATE_GRADIENT}, "what nobody knows is left alone"


def test_names_are_unlike():
    assert [statistic.name for statistic in STATISTICS.values()] == list(STATISTICS)
    other = Statistic(
        name="gate_hessian", init=lambda model, plan: {}, source="gates", accumulation=mean_over("tokens")
    )
    assert other != STATISTICS["gate_hessian"]
    for needs in ({other, STATISTICS["gate_hessian"]}, {other}):
        with pytest.raises(ValueError, match="expected statistics of different names, got 'gate_hessian' twice"):
            observe(dense_model(), BATCHES, frozenset(needs))
    with pytest.raises(ValueError, match="expected an identifier other than 'losses' as its name, got 'a/b'"):
        Statistic(name="a/b", init=lambda model, plan: {}, source="gates", accumulation=mean_over("tokens"))
